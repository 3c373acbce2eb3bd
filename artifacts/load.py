"""The one reader of what a run has left: found by name, its config, tokenizer, steps and verified weights.

The run may be alive: nothing in its directory is changed. This room knows no model, so whoever loads says how
a stored config becomes a typed one (`training.config.from_stored`), and for weights gives the abstract tree
that they are restored into (`training.opening.opened.trained_model`).
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import yaml

from artifacts.config import CheckpointConfig
from artifacts.directory import stored_config
from common.buckets import is_remote
from data.tokens.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from artifacts.checkpoints.manager import Checkpoints

RUNS = Path("runs")
LATEST = "latest"
# What command lines may say of what they load.
WEIGHTS = ("raw", "ema", "mean")
PRECISIONS = ("auto", "float32", "bfloat16")
BOS = ("auto", "true", "false")
ConfigT = TypeVar("ConfigT")


def find_run(name: str, runs: Path = RUNS) -> Path:
    """The directory of a run, by its name under `runs` or by path. ValueError, naming the runs there are."""
    for directory in (runs / name, Path(name)):
        if (directory / "config.yaml").is_file():
            return directory
    there = sorted(path.parent.name for path in runs.glob("*/config.yaml"))
    remedy = f"{runs}/ has {', '.join(there[:8])}" if there else f"{runs}/ has none; train one with train.py"
    raise ValueError(f"run={name} is no run's name or directory; {remedy}")


def load(name: str, typed: Callable[[Mapping[str, Any]], ConfigT], runs: Path = RUNS) -> "LoadedRun[ConfigT]":
    """The run of that name or path, its config made by `typed`. ValueError where it is none or broken."""
    path = find_run(name, runs)
    try:
        return LoadedRun(path, typed(stored_config(path, "run")))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path / 'config.yaml'} is no run's config ({reason}); restore it, or choose another run="
        ) from None


def stored_checkpoints(run: Path, config: CheckpointConfig | None = None) -> CheckpointConfig:
    """`config` (the defaults) with the directory that the run was made with; null where nothing says it."""
    try:
        stored = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        directory = stored["checkpoint"].get("directory")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        directory = None
    return replace(config or CheckpointConfig(), directory=directory)


def open_saved(run: Path) -> "Checkpoints":
    """A run's checkpoints, here and in its bucket, to read only. ValueError where there can be none yet."""
    from artifacts.checkpoints.location import open_checkpoints_of, place

    config = stored_checkpoints(run)
    if not (is_remote(config.directory) or place(run, config.directory).is_dir()):
        raise ValueError(f"{run} has no checkpoint yet; the first comes at checkpoint.every")
    return open_checkpoints_of(run, config, read_only=True)


def steps_until(checkpoints: "Checkpoints", step: str | int | None = LATEST) -> list[int]:
    """Steps that have a checkpoint, up to the wanted one. ValueError where that has none."""
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{checkpoints.directory} is empty; the first checkpoint comes at checkpoint.every")
    if step in (None, LATEST):
        return steps
    if str(step) not in map(str, steps):
        raise ValueError(f"step={step} has no checkpoint; use latest or one of {', '.join(map(str, steps))}")
    return [s for s in steps if s <= int(str(step))]


@dataclass(frozen=True)
class LoadedRun(Generic[ConfigT]):
    """A run's directory and its config; the rest is read when it is asked for."""

    path: Path
    config: ConfigT

    def manifest(self) -> dict[str, Any]:
        """How and from what it was made. ValueError where that cannot be read."""
        path = self.path / "manifest.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path} cannot be read ({reason}); restore it") from error

    def tokenizer(self, made_again: Callable[[], Tokenizer]) -> Tokenizer:
        """The run's own copy, or the one made again from its data while that is what it was trained with."""
        if (self.path / "tokenizer.json").is_file():
            return load_tokenizer(self.path / "tokenizer.json")
        tokenizer = made_again()
        expected = self.manifest()["tokenizer"]["digest"]
        if tokenizer.digest != expected:
            raise ValueError(
                f"{self.path} was trained with tokenizer {expected[:9]}, and its data now gives "
                f"{tokenizer.digest[:9]}; put the right tokenizer.json into {self.path}"
            )
        return tokenizer

    def weights(
        self, abstract: Any, *, step: str | int | None = LATEST, weights: str = "raw", mean_of: int = 0
    ) -> Any:
        """Verified parameters, placed as `abstract` says; what was read is told on stderr.

        weights: raw, ema, or mean, of the last `mean_of` checkpoints up to the step (0: of all). Raises
        ValueError where there are none, RunFault where they are damaged.
        """
        checkpoints = open_saved(self.path)
        steps = steps_until(checkpoints, step)
        if weights == "mean":
            steps = steps[-(mean_of or len(steps)) :]
            print(f"{self.path}: mean of steps {', '.join(map(str, steps))}", file=sys.stderr)
            return checkpoints.mean_weights(steps, abstract)
        print(f"{self.path}: step {steps[-1]}, {weights} weights", file=sys.stderr)
        return checkpoints.restore_weights(steps[-1], abstract, item="ema" if weights == "ema" else "params")
