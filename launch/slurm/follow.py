"""Stay with a submitted job: print what it prints, say what becomes of it, return its exit status."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import Requeue

POLL_SECONDS = 2.0
# States that a job does not leave by itself; those of a job that is requeued pass by.
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"),
    *("BOOT_FAIL", "REVOKED", "SPECIAL_EXIT"),
}
GO_ON = {"TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}  # the job's end, not the run's


@dataclass(frozen=True)
class State:
    """What Slurm says of a job or an element: its state, why it waits, status and signal of its end."""

    state: str
    reason: str
    status: int
    signal: int
    starts: int

    @property
    def ended(self) -> bool:
        """Has it ended, so that Slurm will not start it again?"""
        return self.state in ENDED

    @property
    def exit_status(self) -> int:
        """As a shell has it; 75 where only Slurm's part has ended and the same command goes on."""
        if self.state in GO_ON:
            return Requeue.status
        if self.state == "COMPLETED":
            return 0
        return self.status or (128 + self.signal if self.signal else 1)


def client(*command: str) -> str:
    """What a client of Slurm's says. Raises OSError with its last words where it fails."""
    if shutil.which(command[0]) is None:
        raise OSError(
            f"{command[0]} is not on PATH: no Slurm here; run this on a login node, or use slurm.submit=false"
        )
    # A job inherits what sbatch has; this one is Hydra's, while it calls us.
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise OSError(f"{command[0]}: {said.removeprefix(f'{command[0]}: ').removeprefix('error: ')}")
    return done.stdout


def states(job: str) -> dict[str, State]:
    """By element (`12_0`, or `12` alone): from the controller, or from accounting once it has forgotten."""
    try:
        text = client("scontrol", "--oneliner", "show", "job", job)
    except OSError:
        return _accounted(job)
    return dict(map(_read, filter(None, text.splitlines())))


def _read(line: str) -> tuple[str, State]:
    values = dict(pair.partition("=")[::2] for pair in line.split(" ") if "=" in pair)
    name = values["JobId"]
    if "ArrayJobId" in values and "ArrayTaskId" in values:
        name = f"{values['ArrayJobId']}_{values['ArrayTaskId']}"
    status, _, signal = values.get("ExitCode", "0:0").partition(":")
    return name, State(
        values["JobState"],
        values.get("Reason", ""),
        int(status),
        int(signal or 0),
        int(values.get("Restarts", 0)) + 1,
    )


def _accounted(job: str) -> dict[str, State]:
    columns = "JobID,State,ExitCode,Restarts"
    try:
        text = client(
            "sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", f"--format={columns}"
        )
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, state, code, starts = line.split("|")
        status, _, signal = code.partition(":")
        found[name] = State(state.split(" ")[0], "", int(status), int(signal or 0), int(starts or 0) + 1)
    return found


def follow(
    job: str,
    log: Callable[[str], Path],
    *,
    poll: float = POLL_SECONDS,
    look: Callable[[str], dict[str, State]] = states,
    write: Callable[[str], object] | None = None,
) -> int:
    """Until every element has ended for good; the worst of their exit statuses.

    log: the file of an element; write: stdout's by default. Raises OSError where Slurm no longer knows the
    job. `job` itself goes on whatever happens to us.
    """
    write = write or sys.stdout.write
    tails: dict[str, Tail] = {}
    said: dict[str, tuple[str, str, int]] = {}
    ended = 0
    while True:
        now = look(job)
        if not now:
            raise OSError(f"Slurm no longer knows job {job}, and keeps no accounts; its log is {log(job)}")
        for name, state in now.items():
            if _single(name):
                tails.setdefault(name, Tail(log(name))).print(write)
            seen = (state.state, state.reason, state.starts)
            if said.get(name) != seen:
                said[name] = seen
                write(f"[{name}] {_words(state)}\n")
        # Twice, since a job that is requeued may show the end of one start for a moment.
        ended = ended + 1 if all(state.ended for state in now.values()) else 0
        if ended >= 2:
            for tail in tails.values():
                tail.print(write)
            return max(state.exit_status for state in now.values())
        time.sleep(poll)


def _single(name: str) -> bool:
    """Whether this is one element: those that wait are listed together, as `12_[0-3]`."""
    return re.fullmatch(r"\d+(_\d+)?", name) is not None


def _words(state: State) -> str:
    why = f", {state.reason}" if state.reason not in ("", "None") else ""
    again = f", start {state.starts}" if state.starts > 1 else ""
    return f"{state.state.lower()}{why}{again}"


class Tail:
    """Prints what has been added to a file since the last call; a file that is not there yet is empty."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0

    def print(self, write: Callable[[str], object]) -> None:
        """Print what the log has that was not printed yet."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                new = file.read()
        except FileNotFoundError:
            return
        self.at += len(new)
        if new:
            write(new.decode(errors="replace"))
