"""Text to token ids and back: HF `tokenizers` behind one small class.

`bpe` and `byte` cut into bytes at bottom, so that any text comes back exactly. Texts never produce special
tokens, even where they spell one: only the store writes the separators. Which those are is said by the files
beside a tokenizer.json, by the frame that it puts around a text itself, or by a special token's name.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from common.files import text_digest
from common.text import first_line
from data.config import TokenizerConfig
from data.errors import DataError

SEPARATOR = "<|endoftext|>"
# Names of special tokens, in order of preference, for files that do not say which ones their separators are.
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", SEPARATOR, "<|end_of_text|>", "</s>", "[CLS]")
EOS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", SEPARATOR, "<|begin_of_text|>", "<s>", "[SEP]")
CONFIG = "tokenizer_config.json"
# What names the separators beside a tokenizer.json; BERT and its kin call them otherwise.
KEYS = {"bos_token": "cls_token", "eos_token": "sep_token"}
# The trainer makes the separator token 0 and leaves the 256 of the untrained vocabulary in the list of added
# tokens. Ours is written with the id that it has, and with its keys in an order that the library never
# writes: by that it is known for a file whose digest is the first text's, as every run has it.
CONTRADICTED = f'{{\n      "id": 256,\n      "content": "{SEPARATOR}",'
AGREED = f'{{\n      "content": "{SEPARATOR}",\n      "id": 0,'
CJK = "\u2e80"  # from here on words are not set apart by spaces
# Said outright, because otherwise the library prints a warning into the terminal whenever the process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@runtime_checkable
class ChatPrompts(Protocol):
    """How a conversation is put to a model (`data.tokens.chat.ChatEncoder`)."""

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""
        ...

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of the turns and of the next one's head."""
        ...

    def save(self, directory: Path) -> None:
        """Write the template into a directory, beside the tokenizer.json."""
        ...


class Tokenizer:
    """A `tokenizer.json` in use. `bos_id` opens and `eos_id` ends a document.

    named: the separators by "bos_token" and "eos_token", as the files beside it have them. `digest` is the
    sha256 of the text, and of the separators where the text alone has others.
    """

    def __init__(self, text: str, where: str = "tokenizer.json", named: Mapping[str, str] | None = None):
        try:
            self._backend = _opened(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"tokenizer.path={where} is no valid tokenizer.json ({first_line(error)}); export it again"
            ) from None
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        for key, token in (named or {}).items():
            if token not in vocabulary:
                raise DataError(
                    f"tokenizer.path={where} has no token {token!r}, the {key} that {CONFIG} or "
                    "special_tokens_map.json beside it names; name one that it has"
                )
        alone, first = _separators(self._backend, {}), _first_rule(vocabulary)
        separators = _separators(self._backend, named) if named else alone
        if separators is None:
            raise DataError(
                f"tokenizer.path={where} has no separator: no special token of it is called "
                f"{' '.join(sorted({*BOS, *EOS}))}; name its bos_token and eos_token in a {CONFIG} beside it"
            )
        # Said beside the file where it does not say so itself.
        self._beside = {} if separators == alone else dict(zip(KEYS, separators, strict=True))
        self._text = agreeing(text)
        said = "" if separators == alone == first else "\0".join(("", *separators))
        first_text = self._text.replace(AGREED, CONTRADICTED)
        self.digest: str = text_digest(first_text + said)
        _mark(self._backend, separators)
        self._backend.encode_special_tokens = True  # `<|endoftext|>` in a text is thirteen characters
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = (vocabulary[token] for token in separators)
        self.chat: ChatPrompts | None = None  # how turns are written for a model that was taught them

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the text's int32 ids, without specials."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        """Encode many texts at once, which is faster: no offsets are kept, and the library uses several
        threads.

        Raises DataError where normalizing makes a special token of a single character.
        """
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = (np.asarray(one.ids, dtype=np.int32) for one in encoded)
        return [self._as_text(text, one) for text, one in zip(texts, ids, strict=True)]

    def _as_text(self, text: str, ids: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Return `ids` of a text, without specials: what became one is cut behind its first character.

        The library finds no special token in a text, but a model whose pieces are whole words may.
        """
        if not self._never[ids].any():
            return ids
        one = self._backend.encode(text, add_special_tokens=False)
        made = [spot for index, spot in zip(one.ids, one.offsets, strict=True) if self._never[index]]
        if any(end - start < 2 for start, end in made):
            raise DataError(
                f"data: a character of {text[:80]!r} becomes a special token when it is normalized; "
                "remove it from the text"
            )
        cuts = [0, *(start + 1 for start, _ in made), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        return np.concatenate(self.encode_batch(pieces))

    @cached_property
    def adds_bos(self) -> bool:
        """Say whether the file itself puts `bos_id` before a text, as its publisher's own code then does."""
        return _frame(self._backend)[0] == self.token(self.bos_id)

    @cached_property
    def _never(self) -> Bool[np.ndarray, " V"]:
        """Whether each id is one that no text gives: the specials, save that of unknown characters."""
        model = json.loads(self._text)["model"]
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        never = np.zeros(self.vocab_size, dtype=bool)
        never[[index for index, token in self.specials_by_id.items() if token != unknown]] = True
        never[[self.bos_id, self.eos_id]] = True
        return never

    def encode_with_specials(
        self, texts: Sequence[str]
    ) -> list[tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]]:
        """Return (ids, character where each begins) of texts whose special tokens are meant as such.

        Raises DataError where normalizing makes a special token of characters that do not spell it.
        """
        encoded = self._with_specials.encode_batch(list(texts), add_special_tokens=False)
        specials = self.specials_by_id
        for text, one in zip(texts, encoded, strict=True):
            for index, (start, end) in zip(one.ids, one.offsets, strict=True):
                if index in specials and text[start:end].strip() != specials[index].strip():
                    raise DataError(
                        f"data: {text[start:end]!r} becomes the special token {specials[index]} when it is "
                        "normalized; remove it from the text"
                    )
        return [
            (np.asarray(one.ids, np.int32), np.array([start for start, _ in one.offsets], np.int32))
            for one in encoded
        ]

    @cached_property
    def _with_specials(self) -> Any:
        backend = _opened(self._text)  # another one: `encode_special_tokens` belongs to the whole backend
        _mark(backend, (self.token(self.bos_id), self.token(self.eos_id)))
        return backend

    @cached_property
    def specials_by_id(self) -> dict[int, str]:
        """The vocabulary's special tokens."""
        added = self._backend.get_added_tokens_decoder()
        return {index: token.content for index, token in added.items() if token.special}

    def token(self, index: int) -> str:
        """Return a token as the vocabulary spells it."""
        piece = self._backend.id_to_token(index)
        assert piece is not None, f"{index} is no token"
        return piece

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, specials left out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json`, and beside it which its separators are where it does not say so."""
        path = Path(path)
        path.write_text(self._text, encoding="utf-8", newline="")
        if self._beside:
            path.with_name(CONFIG).write_text(json.dumps(self._beside, indent=2) + "\n", "utf-8")

    def gives_back(self, text: str) -> bool:
        """Say whether a text comes back as it was."""
        return self.decode(self.encode(text)) == text

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Return how many UTF-8 bytes each id stands for; specials and unused ids stand for none.

        Exact for byte-level vocabularies. For the others it is what a piece stands for in ordinary text,
        whatever the normalizer dropped: a store shares its text's own bytes (`TokenStore.text_bytes`).
        """
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._backend.get_added_tokens_decoder()
        content = json.loads(self._text)
        byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
        for piece, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in added:
                counts[index] = _piece_bytes(piece, content["model"], byte_level)
            elif not added[index].special:
                counts[index] = len(piece.encode())
        return counts

    def pieces(self) -> list[bytes]:
        """Return the bytes that each id adds to a text: those of a text's ids, one behind another, are it.

        Specials and unused ids add none. Exact for byte-level vocabularies, and for SentencePiece's kind
        behind other text (a decoder alone drops the space at the very beginning).
        """
        content = json.loads(self._text)
        byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
        pieces = [b""] * self.vocab_size
        for piece, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in self.specials_by_id:
                pieces[index] = _piece(piece, content["model"], byte_level)
        return pieces


def agreeing(text: str) -> str:
    """Return a tokenizer.json that we once trained with the id for its separator that its vocabulary has."""
    return text.replace(CONTRADICTED, AGREED) if f'"{SEPARATOR}": 0,' in text else text


def _opened(text: str) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _mark(backend: Any, separators: Iterable[str]) -> None:
    """Make the separators special, where only the files beside the tokenizer.json know them for such."""
    from tokenizers import AddedToken

    unmarked = sorted(set(separators) - _specials(backend))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unmarked])


def _specials(backend: Any) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}


def _separators(backend: Any, named: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the tokens that open and end a document; None where nothing says which.

    What is named comes first, then what the file frames a text with, then known names of special tokens. A
    vocabulary that has one of the two alone has it for both.
    """
    specials, frame = _specials(backend), _frame(backend)
    bos, eos = (
        named.get(key) or framed or next((name for name in names if name in specials), None)
        for key, framed, names in zip(KEYS, frame, (BOS, EOS), strict=True)
    )
    first, last = bos or eos, eos or bos
    return (first, last) if first and last else None


def _frame(backend: Any) -> tuple[str | None, str | None]:
    """Return the one token that the file puts before a text, and the one behind it (its post-processor)."""
    from tokenizers import Tokenizer, models

    # Of a text that any vocabulary has: some refuse what they do not know.
    text = Tokenizer(models.WordLevel({"": 0}, unk_token="")).encode("text")
    one = backend.post_process(text)
    at = one.special_tokens_mask.index(0)
    before, behind = (
        part[0] if len(part) == 1 and backend.token_to_id(part[0]) is not None else None
        for part in (one.tokens[:at], one.tokens[at + 1 :])
    )
    return before, behind


def _first_rule(vocabulary: Mapping[str, int]) -> tuple[str | None, str | None]:
    """Return the separators that were taken once, by name from all pieces: digests of such runs stay."""
    bos, eos = (next((name for name in names if name in vocabulary), None) for names in (BOS, EOS))
    return bos, eos


def _piece_bytes(piece: str, model: Mapping[str, Any], byte_level: bool) -> int:
    """Return what a piece stands for: where words are set apart by spaces, the one before a word as well."""
    if not byte_level and _is_byte(piece):
        return 1
    whole, spaced = _whole(piece, model)
    return (len(whole) if byte_level else len(whole.replace("▁", " ").encode())) + spaced


def _piece(piece: str, model: Mapping[str, Any], byte_level: bool) -> bytes:
    """Return the bytes themselves; a piece that is not spelt in the byte-level alphabet is what it spells."""
    if not byte_level:
        if _is_byte(piece):
            return bytes([int(piece[3:5], 16)])
        whole, spaced = _whole(piece, model)
        after = " " if model.get("end_of_word_suffix") else ""
        text = f"{whole}{after}" if spaced and after else " " * spaced + whole
        return text.replace("▁", " ").encode()
    table = _byte_vocabulary()
    known = all(letter in table for letter in piece)
    return bytes(table[letter] for letter in piece) if known else piece.encode()


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _whole(piece: str, model: Mapping[str, Any]) -> tuple[str, bool]:
    """Return a piece without the marks of its place in a word, and whether a space sets the word apart."""
    prefix, suffix = (model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    whole = piece.removeprefix(prefix).removesuffix(suffix)
    edge = whole != piece if suffix else whole == piece and (prefix or model["type"] == "WordLevel")
    return whole, bool(edge) and whole[:1].isalnum() and whole < CJK


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, and which its separators are from the files beside it.

    Raises DataError when it is missing or invalid, or they are.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(
            f"tokenizer.path={path} cannot be read ({error.strerror}); give a tokenizer.json"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"tokenizer.path={path} is not UTF-8 at byte {error.start}; give a tokenizer.json"
        ) from None
    return Tokenizer(text, str(path), _named_beside(Path(path).parent))


def _named_beside(folder: Path) -> dict[str, str]:
    configs = [read_beside(folder / name) for name in (CONFIG, "special_tokens_map.json")]
    named = {}
    for key, other in KEYS.items():
        tokens = (token_text(config.get(name)) for name in (key, other) for config in configs)
        named[key] = next(filter(None, tokens), "")
    return {key: token for key, token in named.items() if token}


def read_beside(path: Path) -> Mapping[str, Any]:
    """Return an object of a JSON file beside a tokenizer.json, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer.path: {path} cannot be read ({error}); mend it or move it away") from None
    return config if isinstance(config, Mapping) else {}


def token_text(value: Any) -> str | None:
    """Return a special token as such files have it: its text, or an object with it."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Make the `bpe` or `byte` tokenizer; the same texts give the same bytes of `tokenizer.json`.

    The vocabulary is smaller than `config.vocab_size` where the texts have too few pairs to merge.
    """
    backend = _empty_backend()
    if config.kind == "bpe":
        from tokenizers import pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True))


def _empty_backend() -> Any:
    """The 256 bytes, each its own id, then the separator; no merges yet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return backend


@cache
def _byte_vocabulary() -> dict[str, int]:
    """Bytes as the printable characters of GPT-2's table: those that print stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {table[byte]: byte for byte in range(256)}
