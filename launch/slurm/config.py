"""What is asked of Slurm: the `slurm.*` words of scripts/slurm.py, apart from the run's own configuration."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.checks import did_you_mean, require, within
from common.text import counted, first_line
from training.config import Config

PREFIX = "slurm."
LARGEST_SIGNAL = 65535  # seconds, of sbatch --signal
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


@dataclass
class SlurmConfig:
    """One job: its size, its limits, what is done before the run, and whether to wait for it."""

    nodes: int = 1  # machines
    tasks_per_node: int = 1  # processes on each; one sees all of a node's GPUs, more share them equally
    gpus_per_node: int = 0  # 0: a run on CPUs, one device a task
    cpus_per_task: int | None = None  # cores of each process; null: what the partition gives
    memory: str | None = None  # of a node, such as 64G; 0 is all of it
    exclusive: bool = False  # nobody else on these nodes
    time: str = "24:00:00"  # the limit of one start: MINUTES, HH:MM:SS or DAYS-HH:MM:SS
    partition: str | None = None  # where to run; null: the cluster's default
    account: str | None = None  # who pays
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that nodes must have
    exclude: str | None = None  # nodes that are not to be used: n[3,17]
    signal_seconds: int = 120  # before the limit that the run is told to save; more than that takes
    requeue: bool = True  # start again after preemption, a node's failure, the limit, and status 75
    array: str | None = None  # a run for each combination: 'seed=0,1 optim.learning_rate=1e-3,3e-4'; as -m
    array_limit: int = 0  # of an array: how many run at once; 0: as many as there is room for
    setup: list[str] = field(default_factory=list)  # lines of shell before the run: [module load cuda]
    python: str | None = None  # null: the one that submits; with setup or container `python`
    container: str | None = None  # image of each task, as --container-image of the plugin pyxis takes it
    mounts: list[str] = field(default_factory=list)  # beside the working directory: [/data:/data]
    options: list[str] = field(default_factory=list)  # further options of sbatch: [--mail-type=END]
    port: int = 0  # of process 0 for the others; 0: one that is free on its node
    file: str | None = None  # YAML with defaults of these keys, such as a cluster's
    submit: bool = True  # false: write the script and print it
    follow: bool = True  # stay, print the log, and exit with the job's status

    def __post_init__(self) -> None:
        """Each value by itself, and those of one node against each other."""
        least = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": 0, "array_limit": 0}
        for key, limit in least.items():
            within(f"slurm.{key}", getattr(self, key), limit)
        within("slurm.port", self.port, 0, 65535)
        self._check_tasks()
        most = min(seconds_of(self.time) - 1, LARGEST_SIGNAL)
        allowed = f"from 1 to {most}, within slurm.time={self.time}"
        require(0 < self.signal_seconds <= most, "slurm.signal_seconds", self.signal_seconds, allowed)
        for option in self.options:
            allowed = "options of sbatch, such as --mail-type=END"
            require(option.startswith("-"), "slurm.options", option, allowed)
        for key, value in vars(self).items():
            lines = value if isinstance(value, list) else [value]
            if any("\n" in line for line in lines if isinstance(line, str)):
                raise ValueError(f"slurm.{key} holds a line break; give a list with a line each")

    def _check_tasks(self) -> None:
        tasks, gpus = self.tasks_per_node, self.gpus_per_node
        if gpus % tasks:
            fitting = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
            raise ValueError(
                f"slurm.tasks_per_node={tasks} does not divide slurm.gpus_per_node={gpus}, which they share; "
                f"use slurm.tasks_per_node={fitting}"
            )

    @property
    def devices(self) -> int:
        """Devices of the whole job, over its nodes."""
        return self.nodes * (self.gpus_per_node or self.tasks_per_node)

    def said(self) -> str:
        """How these devices come about, in the keys that decide it."""
        each = "gpus_per_node" if self.gpus_per_node else "tasks_per_node"
        return f"slurm.nodes={self.nodes} * slurm.{each}={getattr(self, each)}"


def seconds_of(text: str) -> int:
    """A time limit of Slurm's, in seconds: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(f"slurm.time={text} is no time; give minutes, HH:MM:SS or DAYS-HH:MM:SS")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = [0, *parts][-3:]
    return (hours * 60 + minutes) * 60 + seconds


KINDS = {
    field.name: str(field.type).removeprefix("<class '").removesuffix("'>") for field in fields(SlurmConfig)
}
READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "bool": {"true": True, "false": False}.__getitem__,
    "str": str,
}


def split_words(words: Sequence[str]) -> tuple[SlurmConfig, list[str]]:
    """Return the job that the `slurm.*` words ask for, and the words that are left for the run.

    Raises ValueError where one is no key, has another type, or is out of range.
    """
    own = [word for word in words if word.lstrip("+").startswith(PREFIX)]
    return slurm_config(own), [word for word in words if word not in own]


def slurm_config(words: Sequence[str]) -> SlurmConfig:
    """The defaults, then a file's values, then these words."""
    given = dict(word.lstrip("+").removeprefix(PREFIX).partition("=")[::2] for word in words)
    return SlurmConfig(
        **{key: _value(key, value) for key, value in (_from_file(given.get("file")) | given).items()}
    )


def _value(key: str, given: Any) -> Any:
    """Text or, from a file, a list of texts, as the key's type. ValueError where it is of another."""
    if key not in KINDS:
        raise ValueError(f"slurm.{key} is not a key; {did_you_mean(key, KINDS)}")
    kind, *null = KINDS[key].split(" | ")
    if isinstance(given, list) and kind == "list[str]":
        return list(map(str, given))
    text = str(given)
    if null and text in ("", "null"):
        return None
    if kind == "list[str]":
        return _list(key, text)
    try:
        return READ[kind](text)
    except (ValueError, KeyError):
        words = {"int": "a whole number", "bool": "true or false"}[kind]
        raise ValueError(f"slurm.{key}={text} must be {words}{' or null' if null else ''}") from None


def _list(key: str, text: str) -> list[str]:
    import yaml

    try:
        value = yaml.load(text, yaml.BaseLoader)  # text stays text
    except yaml.YAMLError as error:
        raise ValueError(f"slurm.{key}={text} cannot be read; write slurm.{key}='[A, B]'") from error
    items = value if isinstance(value, list) else [text]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"slurm.{key}={text} is no list of texts; quote those that hold brackets or colons")
    return items


def _from_file(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    import yaml

    try:
        tree = yaml.load(Path(name).read_text(encoding="utf-8"), yaml.BaseLoader)  # 1:00:00 is no number
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"slurm.file={name} cannot be read: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"slurm.file={name} holds no keys; write lines such as `partition: gpu`")
    return {str(key): value for key, value in tree.items()}


def check_devices(config: Config, slurm: SlurmConfig) -> None:
    """ConfigError where the run's mesh is not that of the job's devices; both products are in the line."""
    from common.checks import ConfigError
    from training.legal.check import check

    try:
        check(config, slurm.devices)
    except ConfigError as error:
        raise ConfigError(f"{slurm.said()} is {counted(slurm.devices, 'device')}; {error}") from error
