"""Chat templates: a conversation as text, and which of its characters the assistant wrote.

A template is Hugging Face's: Jinja, rendered in a sandbox with `messages`, `tools`, `add_generation_prompt`,
`bos_token` and `eos_token`. What an assistant wrote is what stands in its `{% generation %}` blocks; where it
has none, it is what each assistant turn adds to the rendering of the turns before it.
"""

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.tokens.tokenizer import CONFIG, SEPARATOR, Tokenizer, read_beside, token_text

# For vocabularies whose one special token is the separator, `bpe` and `byte` among them: it closes each turn,
# and a role is what follows it. No new token, so a pretrained model's table fits; no text can write one.
DEFAULT = (
    "{% for message in messages %}"
    "{% if tools or message['tool_calls'] %}"
    "{{ raise_exception('the default template has no tools; give one that has by tokenizer.chat_template') }}"
    "{% endif %}"
    "{{ message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
# What a model that knows no turns goes on with: the prompt as it is, and the answer up to the separator.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)
# `strftime_now` says this day always, Llama 3's own default: a rendering must not depend on when it is made.
TODAY = datetime.datetime(2024, 7, 26)
# Unicode's noncharacters, never for interchange: marks inside a rendering, taken out again before anyone
# sees it.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# A conversation to see how a template goes on with: what is said begins and ends differently each time.
PROBE = [("user", "Quo vadis"), ("assistant", "Romam"), ("user", "Cur")]

Message = dict[str, Any]


class TemplateRefusal(Exception):
    """What a template says of a conversation that it cannot render."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    pieces: the text, cut where a message spells a special token, so that each piece can be tokenized with
    specials and none of a message's becomes one. spans: [start, end) of what the assistant wrote, in
    characters of the whole text, in order.
    """

    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class ChatTemplate:
    """A template in use. `specials` are the vocabulary's special tokens; `name` says where it comes from.

    form: what a record of conversations holds (`data.tokens.forms`).
    """

    text: str
    name: str
    bos_token: str
    eos_token: str
    specials: tuple[str, ...]
    form: str = "chat"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_compiled"}  # it does not travel to workers

    @property
    def facts(self) -> dict[str, str]:
        """What decides a rendering, json-able."""
        form = {} if self.form == "chat" else {"form": self.form}
        return {"text": self.text, "bos_token": self.bos_token, "eos_token": self.eos_token, **form}

    @property
    def inputs(self) -> dict[str, str]:
        """What decides which tokens are learnt, for a digest: facts, and the head that is taken away."""
        return self.facts if self._head == ("", "") else {**self.facts, "head": "".join(self._head or ())}

    def save(self, directory: Path) -> None:
        """Write it as `tokenizer_config.json` has it."""
        config = {"bos_token": self.bos_token, "eos_token": self.eos_token, "chat_template": self.text}
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def check(self) -> None:
        """Raise DataError where the template is no Jinja, so that it is said before anything is read."""
        assert self._compiled is not None
        if any(mark in self.text for mark in MARKS):
            raise DataError(f"tokenizer.chat_template: {self.name} holds a noncharacter U+FDD0..U+FDEF")

    @cached_property
    def _compiled(self) -> Any:
        return _compile(self.text, self.name)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def render(self, conversation: Mapping[str, Any]) -> Rendered:
        """Render a conversation `{"messages": [...], "tools": [...]?}`.

        Raises TemplateRefusal with the template's own words, or where it does not show what the assistant
        wrote.
        """
        marks = _free_marks(conversation)
        defused = self._defuse(conversation, marks[0])
        spans: list[tuple[int, int]] | None = None
        if GENERATION.search(self.text):
            marked = self._jinja(defused, marks)
        else:
            marked, spans = self._by_prefixes(defused, marks)
        rendered = _unmark(marked, marks, spans)
        if not rendered.spans:
            raise TemplateRefusal(f"the chat template {self.name} shows nothing that the assistant wrote")
        return rendered

    def prompt(self, conversation: Mapping[str, Any]) -> Rendered:
        """Render what a model answers to: all turns and the head of the next."""
        marks = _free_marks(conversation)
        defused = self._defuse(conversation, marks[0])
        return _unmark(self._prompt(defused, marks), marks, None)

    def _defuse(self, value: Any, mark: str) -> Any:
        """Put a mark behind the first character of every special token that a text of the value spells."""
        if isinstance(value, str):
            pattern = self._special_pattern
            return pattern.sub(lambda found: _broken(found[0], mark), value) if pattern else value
        if isinstance(value, Mapping):
            return {self._defuse(key, mark): self._defuse(item, mark) for key, item in value.items()}
        if isinstance(value, list):
            return [self._defuse(item, mark) for item in value]
        return value

    def _jinja(
        self, conversation: Mapping[str, Any], marks: Sequence[str], *, prompting: bool = False
    ) -> str:
        import jinja2

        try:
            return self._compiled.render(
                messages=conversation["messages"],
                tools=conversation.get("tools"),
                documents=None,
                add_generation_prompt=prompting,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                _open=marks[1],
                _close=marks[2],
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TemplateRefusal(f"the chat template {self.name} refuses it: {reason}") from None

    def _by_prefixes(
        self, conversation: Mapping[str, Any], marks: Sequence[str]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, marks and all, and what each assistant turn adds to that of the turns before it."""
        messages = conversation["messages"]
        whole = self._turns(conversation, marks)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._prompt({**conversation, "messages": messages[:number]}, marks)
            after = self._turns({**conversation, "messages": messages[: number + 1]}, marks)
            if not (whole.startswith(after) and after.startswith(before)):
                raise TemplateRefusal(
                    f"the chat template {self.name} does not render message {number + 1} as a continuation "
                    "of those before it, so what the assistant wrote cannot be told; give one with "
                    "{% generation %} blocks by tokenizer.chat_template=FILE"
                )
            spans.append((len(before), len(before) + self._learnt(after[len(before) :])))
        return whole, spans

    def _turns(self, conversation: Mapping[str, Any], marks: Sequence[str]) -> str:
        """The rendering of what was said, without a head that nobody asked for."""
        rendered = self._jinja(conversation, marks)
        if self._head is None or not rendered.endswith(self._head[0]):
            raise TemplateRefusal(
                f"the chat template {self.name} always writes the head of the next answer, and where a turn "
                "ends cannot be told from it; give one with {% generation %} blocks, or that minds "
                "add_generation_prompt, by tokenizer.chat_template=FILE"
            )
        return rendered.removesuffix(self._head[0])

    def _prompt(self, conversation: Mapping[str, Any], marks: Sequence[str]) -> str:
        """The rendering of what was said and of the next answer's head."""
        return self._jinja(conversation, marks, prompting=True) + (self._head or ("", ""))[1]

    @cached_property
    def _head(self) -> tuple[str, str] | None:
        """The next answer's head that a template writes unasked, and what of it is lost; None: it is unknown.

        Such a template renders an answered question the same whether prompting or not, and does not go on
        from that rendering when more is said. What Jinja takes from a template's end, a line break, is lost.
        """
        if GENERATION.search(self.text):
            return "", ""
        turns = [{"role": role, "content": content} for role, content in PROBE]
        for first in ([], [{"role": "system", "content": "Responde"}]):
            try:
                *said, prompted = (
                    self._jinja({"messages": [*first, *turns[:count]]}, MARKS, prompting=prompting)
                    for count, prompting in ((1, False), (2, False), (3, False), (2, True))
                )
            except TemplateRefusal:
                continue  # some want a system message
            asked, answered, further = said
            goes_on = further.startswith(answered) or not answered.startswith(asked)
            return ("", "") if prompted != answered or goes_on else self._cut_head(*said)
        return "", ""

    def _cut_head(self, asked: str, answered: str, further: str) -> tuple[str, str] | None:
        """The head that these renderings of PROBE end with, told from the end of the turn before it."""
        (_, question), (_, answer), (_, more) = PROBE
        try:
            opening, closing = asked.split(question)
            end = answered.rpartition(answer)[2]  # of the answer's turn, and the head
            between = further[further.rindex(answer) + len(answer) : further.rindex(more)]
            lost = answered[len(asked) : answered.rindex(answer)]
        except ValueError:
            return None
        # Where the turn ends. At the least: what a question's rendering does not end with is no head, and
        # what the first question does not begin with is not the next one's. At the most: nor is that a head.
        least = max(
            len(end) - _alike(closing[::-1], end[::-1]),
            len(between) - _alike(opening[::-1], between[::-1]),
        )
        most = _alike(end, between)
        specials = list(self._special_pattern.finditer(end)) if self._special_pattern else []
        before = [found.end() for found in specials if found.start() < least]
        if not before or before[-1] > least:  # it ends with a special token where it can, and a whole one
            least = next((found.end() for found in specials if least <= found.end() <= most), least)
            least += len(end[least:most]) - len(end[least:most].lstrip())
        if least > most or least == len(end):
            return None
        return end[least:], lost if lost.isspace() else ""

    def _learnt(self, turn: str) -> int:
        """Characters of a turn up to its end-of-turn token: the line break behind that, nobody generates."""
        pattern = self._special_pattern
        ends = [match.end() for match in pattern.finditer(turn)] if pattern else []
        return ends[-1] if ends and not turn[ends[-1] :].strip() else len(turn)


def _alike(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return len(os.path.commonprefix([a, b]))


def _free_marks(conversation: Mapping[str, Any]) -> list[str]:
    """Three marks that the conversation does not hold."""
    said = json.dumps(conversation, ensure_ascii=False)
    free = [mark for mark in MARKS if mark not in said][:3]
    if len(free) < 3:
        raise TemplateRefusal("it holds Unicode's noncharacters U+FDD0..U+FDEF; remove them")
    return free


def _broken(special: str, mark: str) -> str:
    if len(special) == 1:
        raise TemplateRefusal(f"it holds {special!r}, which is a special token; remove it")
    return special[:1] + mark + special[1:]


def _unmark(marked: str, marks: Sequence[str], spans: list[tuple[int, int]] | None) -> Rendered:
    """Take the marks out; spans count the text without them."""
    cut, opening, closing = marks
    if spans is None:
        starts = [i for i, char in enumerate(marked) if char == opening]
        ends = [i for i, char in enumerate(marked) if char == closing]
        spans = list(zip(starts, ends, strict=True))
    all_marks = re.compile("[" + "".join(marks) + "]")
    at = [match.start() for match in all_marks.finditer(marked)]

    def shifted(place: int) -> int:
        return place - sum(1 for mark in at if mark < place)

    plain = marked.replace(opening, "").replace(closing, "")
    kept = tuple((shifted(start), shifted(end)) for start, end in spans)
    return Rendered(tuple(plain.split(cut)), tuple(span for span in kept if span[0] < span[1]))


def _compile(text: str, name: str) -> Any:
    """The template in the sandbox and with the functions that templates on the hub are written for."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}`: its output between the two marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opening, closing = (jinja2.nodes.Name(name, "load", lineno=line) for name in ("_open", "_close"))
            return [
                jinja2.nodes.Output([opening], lineno=line),
                *body,
                jinja2.nodes.Output([closing], lineno=line),
            ]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)  # Jinja's own would escape < and >

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"tokenizer.chat_template: {name} is no Jinja template (line {error.lineno}: {error.message}); "
            "mend it or give another by tokenizer.chat_template=FILE"
        ) from None


def find_template(given: str | None, tokenizer_path: str | Path | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that goes with a tokenizer.

    In order: the file `given`, or "plain", which frames nothing; beside a tokenizer.json,
    `chat_template.jinja` or the `chat_template` of `tokenizer_config.json`; ours, where the vocabulary has no
    other special token to end a turn with.
    Raises DataError where there is none, or it cannot be read.
    """
    beside = Path(tokenizer_path).parent if tokenizer_path else None
    config = read_beside(beside / CONFIG) if beside else {}
    text, name = (PLAIN, given) if given == "plain" else _template_text(given, beside, config)
    bos, eos = (token_text(config.get(key)) for key in ("bos_token", "eos_token"))
    if text is None:
        if tokenizer.token(tokenizer.eos_id) != SEPARATOR:
            raise DataError(
                f"tokenizer.path={tokenizer_path} has no chat template beside it (chat_template.jinja, or "
                "chat_template in tokenizer_config.json); give one by tokenizer.chat_template=FILE"
            )
        text, name, bos, eos = DEFAULT, "default", None, None
    template = ChatTemplate(
        text,
        name,
        bos or tokenizer.token(tokenizer.bos_id),
        eos or tokenizer.token(tokenizer.eos_id),
        specials_of(tokenizer),
    )
    template.check()
    return template


def has_template(tokenizer_path: Path) -> bool:
    """Whether a template lies beside a tokenizer.json."""
    folder = tokenizer_path.parent
    return (folder / "chat_template.jinja").is_file() or bool(
        read_beside(folder / CONFIG).get("chat_template")
    )


def specials_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens of a vocabulary, as a template knows them."""
    return tuple(sorted(tokenizer.specials_by_id.values()))


def _template_text(
    given: str | None, beside: Path | None, config: Mapping[str, Any]
) -> tuple[str | None, str]:
    if given:
        return _read(Path(given), f"tokenizer.chat_template={given}"), given
    if beside is not None and (beside / "chat_template.jinja").is_file():
        return _read(beside / "chat_template.jinja", "chat template"), str(beside / "chat_template.jinja")
    text = config.get("chat_template")
    if isinstance(text, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, Mapping)}
        text = named.get("default")
    return text if isinstance(text, str) else None, str(beside and beside / CONFIG)


def _read(path: Path, key: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read ({error.strerror}); give a Jinja file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path} is not UTF-8 at byte {error.start}; give a Jinja file") from None
