"""Several processes of one command on this machine, as one job: started, followed and ended together."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.errors import Requeue
from parallel.processes import COORDINATOR, PROCESS, PROCESSES, free_port

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
DEVICES = 8  # in all, by default: enough for every pair of mesh axes
FOLLOW_SECONDS = 8.0  # that the others have to come to the same end by themselves
MAX_PROCESSES = 256
# As which a process ends for want of another one: JAX and gloo abort it, or it has lost a connection.
AFTERMATH = (-signal.SIGABRT, Requeue.status)
_FORCED = re.compile(r"--xla_force_host_platform_device_count=\S+\s*")


@dataclass(frozen=True)
class LaunchOptions:
    """The command line of scripts/launch_local.py; `words` are train.py's."""

    processes: int
    devices: int
    grace: float
    words: list[str]
    script: Path = TRAIN


def parse(arguments: Sequence[str]) -> LaunchOptions:
    """ValueError, in one line, for what is out of range or missing."""
    values: dict[str, str] = {}
    words: list[str] = []
    known = ("--processes", "--devices-per-process", "--grace", "--script")
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in known:
            values[name] = value if equals else next(rest, "")
        elif word != "--":
            words.append(word)
    if "--processes" not in values:
        raise ValueError("--processes is missing; say how many, as in --processes 4")
    processes = _whole("--processes", values["--processes"], MAX_PROCESSES)
    each = values.get("--devices-per-process", str(max(1, DEVICES // processes)))
    grace = _whole("--grace", values.get("--grace", "30"), 3600)
    script = Path(values.get("--script", TRAIN))
    if not script.is_file():
        raise ValueError(f"--script={script} is no file; give one, such as scripts/check_cluster.py")
    return LaunchOptions(processes, _whole("--devices-per-process", each, 1024), grace, words, script)


def _whole(name: str, text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ValueError(f"{name}={text or '(nothing)'} must be a whole number from 1 to {most}")
    return int(text)


def environment(options: LaunchOptions, rank: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """What one process finds: its place, and CPU devices of its own."""
    flags = _FORCED.sub("", base.get("XLA_FLAGS", ""))
    return {
        **base,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={options.devices}".strip(),
        COORDINATOR: f"127.0.0.1:{port}",
        PROCESSES: str(options.processes),
        PROCESS: str(rank),
        "PYTHONUNBUFFERED": "1",
    }


# Linux: killing the launcher, which no handler can catch, ends its processes too. Said by each process before
# it becomes the command, and not between fork and exec: there nothing of ours is safe to run beside threads.
DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.execvp(sys.argv[1], sys.argv[1:])
"""


def cause(failed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the ranks found ended at one look, as (rank, status), the one that the others followed."""
    return min(failed, key=lambda found: (found[1] in AFTERMATH, found[0]))


class LocalJob:
    """The processes, from the first start to the last end."""

    def __init__(self, options: LaunchOptions, command: Sequence[str]):
        self.options, self.command = options, list(command)
        self.processes: list[subprocess.Popen] = []
        self.readers: list[threading.Thread] = []
        self.asked: int | None = None  # the signal that we were given
        self._printing = threading.Lock()

    def run(self) -> int:
        """Start all and wait; the exit status: 0, that of the first that failed, 75, or 128 + a signal."""
        before = {number: signal.signal(number, self._ask) for number in NOTICES}
        try:
            self._start()
            return self._wait()
        finally:
            self._kill()
            for reader in self.readers:
                reader.join(timeout=5)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = number

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.options.processes):
            process = subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=self._stdout(rank),
                stderr=subprocess.PIPE,
                env=environment(self.options, rank, port, os.environ),
                # A session of its own: Ctrl-C reaches us alone, and what it starts can be ended with it.
                start_new_session=True,
            )
            self.processes.append(process)
        for rank, process in enumerate(self.processes):
            reader = threading.Thread(target=self._forward, args=(rank, process.stderr), daemon=True)
            reader.start()
            self.readers.append(reader)
        if (out := self.processes[0].stdout) is not None:
            self.readers.append(threading.Thread(target=self._pass_on, args=(out,), daemon=True))
            self.readers[-1].start()

    def _stdout(self, rank: int) -> int | None:
        """Rank 0 has our terminal for its live line; into a file or a pipe, its lines go through us."""
        if rank:
            return subprocess.DEVNULL
        return None if sys.stdout.isatty() else subprocess.PIPE

    def _pass_on(self, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                if not line.startswith(b"[Gloo] "):  # which says there how many peers it has met
                    sys.stdout.buffer.write(line)
                    sys.stdout.flush()

    def _forward(self, rank: int, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                with self._printing:
                    sys.stderr.write(f"[{rank}] {line.decode(errors='replace')}")
                    sys.stderr.flush()

    def _wait(self) -> int:
        while True:
            statuses = [process.poll() for process in self.processes]
            failed = [(rank, status) for rank, status in enumerate(statuses) if status]
            if self.asked is not None:
                return self._stop(self.asked)
            if failed:
                return self._follow(*cause(failed))
            if None not in statuses:
                return 0
            time.sleep(0.05)

    def _stop(self, number: int) -> int:
        """Hand the signal on, and a second one, and wait while the processes end as they see fit."""
        end = time.monotonic() + self.options.grace
        while self._running() and time.monotonic() < end:
            if self.asked is not None:
                self._signal(self.asked)
                self.asked = None
            time.sleep(0.05)
        saved = any(process.poll() == Requeue.status for process in self.processes)
        return Requeue.status if saved else 128 + number

    def _follow(self, rank: int, status: int) -> int:
        """One has failed: the others are given a while to say the same, then asked, then killed."""
        if status < 0:
            self._say(f"rank {rank} was ended by {signal.Signals(-status).name}; ending the others")
        elif self._running():
            self._end_within(FOLLOW_SECONDS)
        if self._running():
            self._signal(signal.SIGTERM)
            self._end_within(2)
        return status if status > 0 else 128 - status

    def _say(self, line: str) -> None:
        with self._printing:
            print(line, file=sys.stderr, flush=True)

    def _running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def _end_within(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._running() and time.monotonic() < end:
            time.sleep(0.05)

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _kill(self) -> None:
        """End whatever is left, with what it has started: nothing of a job outlives its launcher."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # nobody is left of it
                pass
            process.wait()
