"""What a model is asked: one record a document, whichever format it was read from.

JSON Lines of one's own hold one such record a line, by `TaskRequest`'s names; NEEDS says what a kind needs.
BIG-bench's `task.json` is read by its own rules, with examples before the question where shots are asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.checks import choice, did_you_mean

NEEDS = {
    "choice": ("contexts", "continuations"),  # which continuation is likeliest; `gold` is the right one
    "bpb": ("contexts", "continuations"),  # bits per byte of the one continuation
    "rolling": ("continuations",),  # of a whole text, however long
    "generate": ("contexts", "answers"),  # greedy text up to a stop, held to the answers
    "program": ("contexts", "tests"),  # text up to a stop, executed behind `head` and tested
}
# Of each field of a line: the type that it must have, in JSON's words.
TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "doc": ((str, int), "a text or a number"),
    "kind": (str, "a text"),
    "head": (str, "a text"),
    "tests": (str, "a text"),
    "gold": (int, "a whole number"),
    "shots": (int, "a whole number"),
    "max_new_tokens": (int, "a whole number"),
    "bos": ((bool, type(None)), "true, false or null"),
    "metadata": (dict, "an object"),
}


@dataclass(frozen=True)
class Draws:
    """How many programs are written for a document, each drawn by a key from (seed, document, its number)."""

    samples: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TaskRequest:
    """A document of a task, with all that decides what is scored.

    contexts: one, or one for each continuation. bos: whether the text begins with the tokenizer's, null where
    that is the model's own custom. shots: solved examples within the context. head: what a program begins
    with, before the text that is written. draws: said by the suite.
    """

    task: str
    doc: str
    kind: str
    contexts: tuple[str, ...] = ("",)
    continuations: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64
    head: str = ""
    tests: str = ""
    draws: Draws = Draws()
    shots: int = 0
    bos: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a record that cannot be scored."""
        choice("kind", self.kind, NEEDS)
        for name in NEEDS[self.kind]:
            if not getattr(self, name):
                raise ValueError(f"{name} is missing, which kind={self.kind} needs")
        count = 1 if self.kind == "bpb" else len(self.continuations)
        if self.kind in ("choice", "bpb") and len(self.contexts) not in (1, count):
            raise ValueError(f"contexts has {len(self.contexts)} entries; give one, or {count}")
        if self.kind in ("bpb", "rolling") and len(self.continuations) != 1:
            raise ValueError(f"continuations has {len(self.continuations)} entries; {self.kind} scores one")
        if self.kind == "choice" and not 0 <= self.gold < count:
            raise ValueError(f"gold={self.gold} is none of {count} continuations; count from 0")
        if not all(self.continuations):
            raise ValueError("continuations has an empty one, which has no likelihood; leave it out")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")

    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of all that is scored."""
        contexts = self.contexts * (len(self.continuations) if len(self.contexts) == 1 else 1)
        return list(zip(contexts, self.continuations, strict=True))

    def of_the_gold(self) -> "TaskRequest":
        """The same document as its right continuation alone: a fraction of the work, and no noise of luck."""
        if self.kind != "choice":
            return self
        pair = self.pairs()[self.gold]
        return replace(self, kind="bpb", contexts=pair[:1], continuations=pair[1:], gold=0)

    def as_program(self, draws: Draws, max_new_tokens: int | None) -> "TaskRequest":
        """The same document as a program to be written and tested, where it has tests; else as it is."""
        if not self.tests:
            return self
        size = max_new_tokens or self.max_new_tokens
        return replace(self, kind="program", draws=draws, max_new_tokens=size)


def read_lines(path: Path, task: str) -> Iterator[TaskRequest]:
    """The records of a file of JSON Lines. ValueError with file, line, key and remedy for a bad one."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _of_line(json.loads(line), task, number)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: no JSON ({error.msg}); one object a line") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def _of_line(values: Any, task: str, number: int) -> TaskRequest:
    names = [f.name for f in fields(TaskRequest) if f.name not in ("task", "draws")]
    if not isinstance(values, dict):
        raise ValueError(f"{type(values).__name__} is no record; give an object with kind and its fields")
    # One of them may be written without the list around it.
    singular = {"context": "contexts", "continuation": "continuations", "text": "continuations"}
    made: dict[str, Any] = {"doc": number}
    for key, value in values.items():
        name = singular.get(key, key)
        if name not in names:
            raise ValueError(f"{key} is no key of a record; {did_you_mean(key, [*names, *singular])}")
        if name in TYPES:
            kind, words = TYPES[name]
            # A truth value is a whole number to Python, and to nobody else.
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
                raise ValueError(f"{key}={json.dumps(value)[:60]} must be {words}")
        else:
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
                raise ValueError(f"{key}={json.dumps(value)[:60]} must be a text or a list of texts")
            value = tuple(value)
        made[name] = value
    if "kind" not in made:
        raise ValueError(f"kind is missing; give one of {', '.join(NEEDS)}")
    return TaskRequest(task=task, **made | {"doc": str(made["doc"])})


def read_bigbench(path: Path, task: str, shots: int = 0, seed: int = 0) -> Iterator[TaskRequest]:
    """The examples of a `task.json`: choices where it has `target_scores`, else text to be generated.

    shots: other examples of the task before the question, drawn for each document by (seed, document).
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        examples = content["examples"]
        asked = [_question(content, one) for one in examples]
        answers = [_answers(one) for one in examples]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no BIG-bench task.json ({error!r}); fetch it again") from None
    if shots >= len(examples):
        raise ValueError(f"shots={shots} of {path}, which has {len(examples)} examples; use fewer")
    for number, one in enumerate(examples):
        others = np.random.default_rng((seed, number)).permutation(len(examples) - 1)[:shots]
        solved = [asked[i] + answers[i][0] for i in (int(n) + (n >= number) for n in others)]
        context = content.get("task_prefix", "") + "".join([*solved, asked[number]])
        common: dict[str, Any] = {"task": task, "doc": str(number), "contexts": (context,), "shots": shots}
        scores = one.get("target_scores")
        if scores:
            gold = max(range(len(scores)), key=list(scores.values()).__getitem__)
            yield TaskRequest(kind="choice", continuations=tuple(scores), gold=gold, **common)
        else:
            # Behind the answer the next example would begin.
            stop = (content.get("example_input_prefix", "\nQ: "), "\n")
            yield TaskRequest(kind="generate", answers=tuple(answers[number]), stop=stop, **common)


def _question(content: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    text = content.get("example_input_prefix", "\nQ: ") + one["input"]
    if one.get("target_scores") and content.get("append_choices_to_input", True):
        text += "".join(content.get("choice_prefix", "\n  choice: ") + x for x in one["target_scores"])
    return text + content.get("example_output_prefix", "\nA: ")


def _answers(one: Mapping[str, Any]) -> list[str]:
    if scores := one.get("target_scores"):
        return [max(scores, key=scores.__getitem__)]
    target = one["target"]
    return [target] if isinstance(target, str) else list(target)


def subset(requests: Sequence[TaskRequest], limit: int | None, seed: int) -> list[TaskRequest]:
    """At most `limit` of the documents, in their order: the same ones for a seed, whoever asks."""
    if limit is None or limit >= len(requests):
        return list(requests)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(requests))[:limit])
    return [requests[i] for i in chosen]
