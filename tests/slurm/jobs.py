"""Runs submitted to a real Slurm, watched and disturbed."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch.slurm.follow import states
from tests.training.ground import ROOT, Ground

DEADLINE = 420  # seconds; only a hang takes so long
STEPS = 600
SMALL = (
    *("data.seq_len=16", "model.num_layers=1", "model.d_model=32", "model.d_ff=32", "model.num_heads=4"),
    *("model.num_kv_heads=4", "training.global_batch_size=8", "schedule=constant", "schedule.warmup_steps=1"),
    *(
        f"training.num_steps={STEPS}",
        "eval.every=100000",
        "eval.batches=1",
        "logging.every=100",
        "mesh.data=2",
    ),
)


STARTED: list[subprocess.Popen] = []  # whoever is to end with the tests


def client(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@dataclass
class Submitted:
    """One run that scripts/slurm.py has submitted and follows."""

    ground: Ground
    name: str
    process: subprocess.Popen
    seen: list[str] = field(default_factory=list)  # states that its job went through
    rows_before: int = 0  # steps with a row when the last start was over
    kind: str = "slurm"  # a run's job; of a server "server"

    @property
    def job(self) -> str:
        """Its number, once there is one."""
        path = self.directory / "job"
        self.until(path.exists)
        return path.read_text().strip()

    @property
    def log(self) -> str:
        return "".join(p.read_text(errors="replace") for p in self.directory.glob("log-*.txt"))

    @property
    def directory(self) -> Path:
        return self.ground.path / "runs" / f"{self.name}.{self.kind}" / "1"

    def until(self, there: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not there():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, (self.name, self.seen, self.log)
            time.sleep(0.05)

    def state(self) -> str:
        found = next(iter(states(self.job).values())).state
        if self.seen[-1:] != [found]:
            self.seen.append(found)
        return found

    def seconds(self) -> int:
        """Since this start."""
        minutes, seconds = client("squeue", "--noheader", f"--jobs={self.job}", "--format=%M").split(":")[-2:]
        return 60 * int(minutes) + int(seconds)

    def steps(self) -> int:
        path = self.ground.run(self.name) / "metrics.jsonl"
        return sum(b'"loss"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0

    def at_step(self, step: int) -> "Submitted":
        self.until(lambda: self.steps() >= step)
        return self

    def again(self, *changes: str) -> "Submitted":
        """Wait until it is to start again, then ten seconds instead of the two minutes that Slurm waits.

        Started at once it would be killed: nodes refuse a job whose credential they have just revoked, and
        the controller still counts down the nodes of its first start.
        """
        self.until(lambda: self.state() == "PENDING")
        self.rows_before = self.steps()
        client("scontrol", "update", f"JobId={self.job}", "StartTime=now+10", *changes)
        return self

    def task(self, number: int) -> int:
        """The process id of one of its processes; all nodes are this machine."""
        wanted = {f"CAMBRIAN_PROCESS={number}".encode(), f"SLURM_JOB_ID={self.job}".encode()}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if wanted <= set((place / "environ").read_bytes().split(b"\0")):
                    return int(place.name)
        raise AssertionError(f"no process {number} of job {self.job}")

    def end(self) -> int:
        """The exit status of scripts/slurm.py, which is the job's."""
        self.process.communicate(timeout=DEADLINE)
        return self.process.returncode


def submit(
    ground: Ground, paced: Path, name: str, *words: str, pause: float = 0.0, starts: int = 1
) -> Submitted:
    """On two nodes with one device each; so many starts take `pause` seconds a step, later ones none."""
    again = f"export PAUSE=$([ ${{SLURM_RESTART_COUNT:-0}} -lt {starts} ] && echo {pause} || echo 0)"
    command = [
        *(sys.executable, "scripts/slurm.py", *ground.words(name, *SMALL)),
        *("slurm.nodes=2", "slurm.time=30", "slurm.signal_seconds=5", f"slurm.python={paced}"),
        *(f"slurm.setup={again}", *words),
    ]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    STARTED.append(process)
    return Submitted(ground, name, process)
