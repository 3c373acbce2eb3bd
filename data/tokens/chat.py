"""Conversations as documents: JSON Lines to canonical text, and text to tokens with the assistant's weighted.

A conversation travels through a corpus as the JSON of `{"messages": [{"role": ..., "content": ...}, ...]}`,
so that documents stay texts; ShareGPT's `conversations` of `from` and `value` become the same. What else a
record may hold says `data.tokens.forms`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from common.text import first_line
from data.errors import DataError
from data.formats import FORMS, MISMATCHED
from data.sources.files import RECORDS, list_folder
from data.sources.lines import BYTE_ORDER_MARK, file_lines, load_json
from data.tokens.chat_template import ChatTemplate, Rendered, TemplateRefusal
from data.tokens.encoding import Encoded
from data.tokens.forms import canonical_text, conversations, said_in
from data.tokens.tokenizer import Tokenizer, load_tokenizer

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "bing": "assistant"},
    **{"function": "tool", "observation": "tool", "function_response": "tool"},
}
COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "label", "tools")
FORMAT = 1  # raise it when the same conversation and template give other tokens or weights


def needed(form: str) -> str:
    """Say what records of `data.format` look like."""
    return f"data.format={form} needs {FORMS[form]}"


def conversation_text(record: object, where: str, form: str = "chat") -> str:
    """Return a record's conversations as canonical JSON. `where`: its file and line, for the error.

    Raises DataError, in one line, for a record that is no conversation an assistant could learn from.
    """

    def refuse(reason: str) -> DataError:
        return DataError(f"data.path: {where} {reason}; mend or remove that record")

    if not isinstance(record, Mapping):
        raise refuse(f"is a {type(record).__name__}, where {needed(form)}")

    def checked(record: Mapping[str, Any]) -> dict[str, Any]:
        messages = _messages(record, refuse, form)
        if not any(message["role"] == "assistant" for message in messages):
            raise refuse("has no assistant message, so there is nothing to learn")
        return {"messages": messages} | ({"tools": record["tools"]} if record.get("tools") else {})

    return canonical_text(record, form, checked, refuse)


def _messages(
    record: Mapping[str, Any], refuse: Callable[[str], DataError], form: str
) -> list[dict[str, Any]]:
    if isinstance(record.get("messages"), list):
        found, role_key, content_key = record["messages"], "role", "content"
    elif isinstance(record.get("conversations"), list):
        found, role_key, content_key = record["conversations"], "from", "value"
    else:
        raise refuse(f"has no list of messages ({needed(form)})")
    if not found:
        raise refuse("has no messages")
    names = {role: role for role in ROLES} if role_key == "role" else SHAREGPT
    messages = []
    for number, message in enumerate(found, 1):
        if not isinstance(message, Mapping):
            raise refuse(f"has a message {number} that is a {type(message).__name__}, not an object")
        said = message.get(role_key)
        role = names.get(said) if isinstance(said, str) else None
        if role is None:
            raise refuse(f"has role {said!r} in message {number}; roles are {', '.join(names)}")
        content = message.get(content_key)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise refuse(f"has content of {type(content).__name__} in message {number}; only text is learnt")
        others = {k: message[k] for k in sorted(message) if k not in (role_key, content_key)}
        # Parquet gives every message the keys of all: one that says nothing is left out.
        messages.append(
            {"role": role, "content": content} | {k: v for k, v in others.items() if v is not None}
        )
    return messages


def plain_text(text: str) -> str:
    """What is said in a conversation, for a tokenizer to be trained on."""
    return "\n".join(said_in(json.loads(text)))


@dataclass(frozen=True)
class ChatEncoding:
    """Conversations, the assistant's tokens alone targets (a `data.tokens.encoding.Encoding`)."""

    tokenizer: Path
    template: ChatTemplate

    def open(self) -> "ChatEncoder":
        """Read the tokenizer."""
        return ChatEncoder(load_tokenizer(self.tokenizer), self.template)


class ChatEncoder:
    """Conversations to framed tokens, and the weight of each as a target."""

    weighted = True

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.template = template
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_id

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Return how many UTF-8 bytes each id stands for."""
        return self.tokenizer.token_bytes()

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return [bos] t1 .. tn [eos] and weights of conversations as `conversation_text` gives them.

        A token counts (weight 1) where its first character is one the assistant wrote, its end-of-turn token
        included: a token that begins in the prompt is never the model's to choose. A bos or eos that the
        template writes itself is not doubled; one that frames the document beyond it does not count.
        Two texts of one record follow each other, and weights are marks of `data.tokens.forms`.
        Raises DataError for a conversation that the template refuses, or that holds no text of an assistant.
        """
        rendered = [one for text in texts for one in self._rendered(text)]
        pieces = [piece for one, _ in rendered for piece in one.pieces]
        encoded = iter(self.tokenizer.encode_with_specials(pieces))
        found = [self._framed(one, [next(encoded) for _ in one.pieces], mark) for one, mark in rendered]
        return found if self.template.form != "labels" else _with_mismatched(found)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of turns and of the next one's head: what generation begins with."""
        try:
            rendered = self.template.prompt({"messages": [dict(message) for message in messages]})
        except TemplateRefusal as error:
            raise DataError(str(error)) from None
        pieces = self.tokenizer.encode_with_specials(rendered.pieces)
        ids = [int(i) for ids, _ in pieces for i in ids]
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def save(self, directory: Path) -> None:
        """Write the template as `tokenizer_config.json`, where `find_template` and other programs find it."""
        self.template.save(directory)

    @cached_property
    def stop_id(self) -> int:
        """The token that ends an assistant's turn; the tokenizer's eos where the template has none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        # Whatever form the records of the data have: this one is ours.
        encoder = ChatEncoder(self.tokenizer, replace(self.template, form="chat"))
        ids, weights = encoder.encode_batch([json.dumps({"messages": turns})])[0]
        assert weights is not None
        last = int(ids[np.flatnonzero(weights)[-1]])
        return last if last in self.tokenizer.specials_by_id else self.eos_id

    def _rendered(self, text: str) -> list[tuple[Rendered, int]]:
        form = self.template.form
        try:
            record = load_json(text)
            if form in ("chat", "completion"):
                # Documents of a dataset that somebody prepared are checked here, those of files have been.
                record = json.loads(conversation_text(record, _beginning(text), form))
            return [(self.template.render(one), mark) for one, mark in conversations(record, form)]
        except TemplateRefusal as error:
            raise DataError(f"data: {_beginning(text)}: {error}") from None
        except json.JSONDecodeError as error:
            raise DataError(f"data: {_beginning(text)} is not JSON ({error.msg}); {needed(form)}") from None

    def _framed(self, rendered: Rendered, pieces: Sequence[tuple], mark: int = 1) -> Encoded:
        ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int32)
        before = np.cumsum([0, *(len(piece) for piece in rendered.pieces)])
        begins = np.concatenate([starts + at for (_, starts), at in zip(pieces, before, strict=False)])
        weights = np.zeros(len(ids), np.uint8)
        for start, end in rendered.spans:
            weights[(begins >= start) & (begins < end)] = mark
        if not weights.any():
            raise DataError(f"data: {_beginning(rendered.text)} gives the assistant no token; remove it")
        front, back = int(ids[0] != self.bos_id), int(ids[-1] != self.eos_id)
        ids = np.concatenate([[self.bos_id] * front, ids, [self.eos_id] * back]).astype(np.int32)
        return Encoded(ids, np.pad(weights, (front, back)))


def _with_mismatched(texts: list[Encoded]) -> list[Encoded]:
    """Each text, and behind it its prompt with the answer of the text before it.

    What such answers' log-probabilities have moved by is how far the model has moved where nothing is wanted
    (KTO's reference point, arXiv:2402.01306).
    """
    found = []
    for number, own in enumerate(texts):
        other = texts[number - 1]
        assert own.weights is not None and other.weights is not None
        prompt, answer = (int(np.argmax(weights > 0)) for weights in (own.weights, other.weights))
        ids = np.concatenate([own.ids[:prompt], other.ids[answer:]])
        behind = np.where(other.weights[answer:] > 0, MISMATCHED, 0)
        found += [own, Encoded(ids, np.concatenate([own.weights[:prompt], behind]).astype(np.uint8))]
    return found


def _beginning(text: str) -> str:
    return f"the conversation {text[:80]!r}"


def list_chat(path: Path) -> tuple[Path, list[Path]]:
    """Return (root, files) of `data.path`: a folder of .jsonl(.gz, .zst) and .parquet files, or one file."""
    if path.is_file():
        root, files = path.parent, [path]
    else:
        root, files = path, list_folder(path)
    files = [file for file in files if file.name.endswith(RECORDS)]
    if not files:
        raise DataError(
            f"data.path={path} holds no conversations; data.format=chat reads files that end in "
            f"{' '.join(RECORDS)}"
        )
    return root, files


def stop(kind: str, message: str) -> None:
    """What is done with a bad record unless it may be skipped: raise DataError."""
    raise DataError(message)


def read_chat(path: Path, template: ChatTemplate, found: Callable[[str, str], None] = stop) -> Iterator[str]:
    """Yield a file's conversations as canonical JSON.

    `found(kind, message)` hears of each bad record, which is left out unless it raises. Each is rendered once
    only for the sake of that message, which can still name its line. Raises DataError for a damaged file.
    """
    for where, record in _records(path, found, template.form):
        try:
            text = conversation_text(record, where, template.form)
            for one, _ in conversations(json.loads(text), template.form):
                template.render(one)
        except TemplateRefusal as error:
            found("template", f"data.path: {where}: {error}")
        except DataError as error:
            found("conversation", str(error))
        else:
            yield text


def _records(path: Path, found: Callable[[str, str], None], form: str) -> Iterator[tuple[str, object]]:
    if path.suffix == ".parquet":
        records = enumerate(_parquet_records(path, form), 1)
        yield from ((f"{path}:{number}", record) for number, record in records)
        return
    for number, line in enumerate(file_lines(path), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode().removeprefix(BYTE_ORDER_MARK)
            if text.strip():
                yield where, load_json(text)
        except UnicodeDecodeError as error:
            found("utf8", f"data.path: {where} is not UTF-8 at byte {error.start}; convert it to UTF-8")
        except (json.JSONDecodeError, RecursionError) as error:  # the latter: brackets nested thousands deep
            reason = getattr(error, "msg", "nested too deep")
            found("json", f"data.path: {where} is not JSON ({reason}); mend or remove that line")


def is_padded(path: Path, form: str = "chat") -> bool:
    """Whether a parquet file's conversations have structs inside, of which nulls were once learnt."""
    import pyarrow.types

    def nested(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind) or pyarrow.types.is_map(kind):
            return True
        return pyarrow.types.is_nested(kind) and nested(kind.value_type)

    with _parquet(path, form) as (file, there):
        columns = {name: file.schema_arrow.field(name).type for name in there}
        tools, others = columns.pop("tools", None), columns.values()
        turns = [kind.value_type for kind in others if pyarrow.types.is_nested(kind)]
        fields = [field.type for turn in turns if pyarrow.types.is_struct(turn) for field in turn]
        return any(nested(kind) for kind in (*fields, tools) if kind is not None)


def _parquet_records(path: Path, form: str) -> Iterator[dict[str, Any]]:
    with _parquet(path, form) as (file, there):
        kinds = {name: file.schema_arrow.field(name).type for name in there}
        for batch in file.iter_batches(columns=there, batch_size=1024):
            for record in batch.to_pylist():
                yield {name: _without_padding(value, kinds[name]) for name, value in record.items()}


@contextlib.contextmanager
def _parquet(path: Path, form: str = "chat") -> Iterator[tuple[Any, list[str]]]:
    """A parquet file of conversations, open, and the columns that they are in."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = [name for name in COLUMNS if name in file.schema_arrow.names]
            if not {*there} - {"tools", "label"}:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"data.path: {path} has columns {columns}, where {needed(form)}")
            yield file, there
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data.path: {path} is not a sound parquet file ({first_line(error)}); fetch it again"
        ) from None


def _without_padding(value: Any, kind: Any) -> Any:
    """Return an Arrow value as JSON would have it.

    Every struct of a column has the keys of all of them, null where it has them not itself; a map is pairs.
    """
    import pyarrow.types

    kind = getattr(kind, "storage_type", kind)
    if value is None:
        return None
    if pyarrow.types.is_struct(kind):
        named = ((field.name, field.type, value[field.name]) for field in kind)
        return {name: _without_padding(item, inner) for name, inner, item in named if item is not None}
    if pyarrow.types.is_map(kind):
        return {key: _without_padding(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_without_padding(item, kind.value_type) for item in value]
    return value
