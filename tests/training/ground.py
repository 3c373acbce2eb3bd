"""Small real runs: a folder of texts, and the words of a command that trains on it in a second or two."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from artifacts.checkpoints.location import open_checkpoints_of
from artifacts.load import stored_checkpoints
from artifacts.metrics import MetricsLog
from tests.configs.composing import config
from training.config import Config

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over lazy dogs and returns to import a class of def".split()
# A process that may write no file larger than its first argument says becomes the rest of its arguments.
LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


# Orbax drops the reads that it had begun beside a failing one; Python complains when it collects them.
DROPPED = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@dataclass(frozen=True)
class Ground:
    """A directory with texts, and caches that all runs on it share."""

    path: Path
    compiled: Path  # the compile cache

    def words(self, name: str, *extra: str) -> list[str]:
        """The command line of a run; later words win."""
        return [
            *("+experiment=debug", "data=folder", f"data.path={self.path}/texts", f"run.name={name}"),
            *(f"run.dir={self.path}/runs/{name}", f"run.compile_cache={self.compiled}"),
            *(f"data.cache_dir={self.path}/data", "data.workers=1", "data.seq_len=32"),
            *("hardware.peak_tflops=0.1", "logging.tensorboard=false", "sample.prompts=[]"),
            *extra,
        ]

    def config(self, name: str, *extra: str) -> Config:
        """The same, composed in this process."""
        return config(*self.words(name, *extra))

    def run(self, name: str) -> Path:
        """Where a run lies."""
        return self.path / "runs" / name

    def start(self, name: str, *extra: str, largest_file: int | None = None) -> subprocess.Popen:
        """The command itself, in a process of its own, on one device."""
        limit = [sys.executable, "-c", LIMIT, str(largest_file)] if largest_file else []
        return subprocess.Popen(
            [*limit, sys.executable, "train.py", *self.words(name, *extra)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )

    def rows(self, name: str) -> list[dict]:
        """What `metrics.jsonl` holds, without what depends on the clock."""
        timed = ("tokens_per_second", "step_seconds", "input_wait_seconds", "mfu_causal", "mfu_full")
        rows = MetricsLog.read(self.run(name) / "metrics.jsonl")
        return [{key: value for key, value in row.items() if key not in timed} for row in rows]

    def record(self, name: str, step: int) -> dict:
        """A checkpoint's record: digests of every array, data position, tokens."""
        where = stored_checkpoints(self.run(name))
        return open_checkpoints_of(self.run(name), where, read_only=True).record(step)

    def summary(self, name: str) -> dict:
        return json.loads((self.run(name) / "summary.json").read_text())


def make_ground(path: Path, compiled: Path | None = None) -> Ground:
    rng = random.Random(0)
    (path / "texts").mkdir(parents=True)
    for i in range(40):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(60, 200)))
        (path / "texts" / f"{i}.txt").write_text(text)
    return Ground(path, compiled or path / "xla")
