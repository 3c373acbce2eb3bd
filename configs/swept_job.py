"""One job of a sweep that a launcher runs in another process: how it ends, and how the sweep hears of it.

Under `hydra/launcher=submitit_slurm` each job of `python train.py -m` is a job of Slurm's, and what it
returns comes back through a file.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec

from common.errors import Requeue

LAUNCHERS = {"submitit_slurm", "submitit_local"}


class EndedElsewhere(Exception):
    """A job of this sweep ended with another status than 0, and has said why where it ran."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def check_launcher(overrides: Sequence[str]) -> None:
    """Raise ValueError, with the install command, where a launcher of submitit's is asked for in vain."""
    for word in overrides:
        key, _, name = word.lstrip("+").partition("=")
        if key == "hydra/launcher" and name in LAUNCHERS and not _installed():
            raise ValueError(f"{word} needs the extra `slurm`; install it with: pip install -e '.[slurm]'")


def refusal_of(error: RuntimeError) -> str | None:
    """What Slurm said to a sweep that it did not take, its last line; None for anything else.

    Submitit raises the same class, which is not there to be named without it, for a job that failed later.
    """
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if all(line.startswith("sbatch: ") for line in lines) else None


def _installed() -> bool:
    try:
        return find_spec("hydra_plugins.hydra_submitit_launcher") is not None
    except ModuleNotFoundError:
        return False


def end_elsewhere(status: int) -> None:
    """End a job in another process than the sweep's. Returns where all is done.

    Submitit starts a job again that has not listened to a signal; ours has, and saved, so that we do it: it
    finds its run's directory and goes on. The sweep waits for it as long as no result is written.
    """
    if status == 0:
        return
    if status == Requeue.status and requeue():
        raise SystemExit(status)
    raise EndedElsewhere(status)


def requeue() -> bool:
    """Whether Slurm starts this job again: not where it runs none of ours, or a person has cancelled it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # by its number alone the last element is the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return True  # the first task says so for all
    state = _said("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    return state == "RUNNING" and _said("scontrol", "requeue", job) is not None


def _said(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
