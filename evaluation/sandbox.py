"""Generated Python, executed where it can reach nothing: `run_program`, and `check_solution` for its tests.

Linux alone: namespaces of users, mounts, processes, network and IPC, Landlock, seccomp, limits, an output cap
and a clock. What each holds back, and what this is not, is in docs/sandbox.md; the work is `confine`'s.
"""

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.checks import choice, within
from evaluation import fences

ISOLATION = ("full", "none")
OUTPUT = 64 << 10  # bytes of stdout, and of stderr, that are kept; a program that writes more is ended
DISK = 16  # megabytes of files that a program may have at a time
STARTING = 20.0  # seconds for what comes before and after the program itself
ROOT = Path(__file__).parents[1]
# What is started: modules that need no package; nothing of ours is to be found from there afterwards.
INSIDE = """
import sys
sys.path.insert(0, {root!r})
from evaluation.confine import main
del sys.path[0]
main()
"""
Status = Literal["passed", "failed", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True)
class Execution:
    """How a program ended, what it printed, cut at `OUTPUT` bytes, and the seconds that it ran.

    killed: by a signal, such as a segmentation fault's. passed: ended with status 0, or all tests passed.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float


def run_program(
    source: str, *, seconds: float = 10.0, megabytes: int = 512, isolation: str = "full"
) -> Execution:
    """Execute a program by itself.

    megabytes: of address space; its files, at most `DISK` in a directory that goes with it, come on top.
    isolation: "none" is no sandbox. Raises ValueError where "full" cannot be had.
    """
    return _execute(source, None, seconds, megabytes, isolation)


def check_solution(
    program: str, tests: str, *, seconds: float = 10.0, megabytes: int = 512, isolation: str = "full"
) -> Execution:
    """Whether the tests, which name what the program defines, come to their end without an exception.

    They run in a process of their own, whose exit status decides: whatever the program does to its own, all
    it can do for its tests is to give the right answers. Raises ValueError as `run_program` does.
    """
    return _execute(program, tests, seconds, megabytes, isolation)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples is correct, without bias, from `correct` of `samples`.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.
    """
    within("k", k, 1, samples)
    within("correct", correct, 0, samples)
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


@functools.cache
def available() -> dict[str, str]:
    """What this kernel has of each fence that "full" needs: "yes", a version, or "" where it is missing."""
    if sys.platform != "linux":
        return {"namespaces": "", "landlock": "", "seccomp": ""}
    version = fences.landlock_version()
    found = {
        "landlock": f"version {version}" if version else "",
        "seccomp": "yes" if fences.has_seccomp() else "",
    }
    report = _started("", None, 5.0, 256, True, None)[0]
    return {"namespaces": "" if "namespaces" in report.get("missing", "") else "yes", **found}


def check_isolation(isolation: str) -> None:
    """Raise ValueError where "full" is asked for and this kernel has not what it needs."""
    choice("isolation", isolation, ISOLATION)
    missing = [name for name, what in available().items() if not what] if isolation == "full" else []
    if missing:
        raise ValueError(_refusal(", ".join(missing)))


def _execute(source: str, tests: str | None, seconds: float, megabytes: int, isolation: str) -> Execution:
    within("seconds", seconds, 0.01)
    within("megabytes", megabytes, 64)
    check_isolation(isolation)
    if isolation == "full":
        report, out, err = _started(source, tests, seconds, megabytes, True, None)
    else:
        _say_none()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            report, out, err = _started(source, tests, seconds, megabytes, False, folder)
    if "missing" in report:
        raise ValueError(_refusal(report["missing"]))
    return Execution(report["status"], out, err, report["seconds"])


def _refusal(what: str) -> str:
    return (
        f"isolation=full needs {what}, which this kernel or container does not give; see docs/sandbox.md for "
        "how to allow it, or name isolation=none, which keeps generated code from nothing"
    )


@functools.cache
def _say_none() -> None:
    print("isolation=none: generated code runs with your own rights and network", file=sys.stderr)


def _started(
    source: str, tests: str | None, seconds: float, megabytes: int, isolated: bool, folder: str | None
) -> tuple[dict[str, Any], str, str]:
    """(report, stdout, stderr) of one execution, of which no process is left."""
    began = time.monotonic()
    reads, writes = os.pipe()
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", INSIDE.format(root=str(ROOT))]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd=folder or "/", pass_fds=(writes,),
        start_new_session=True,
    ) as process, os.fdopen(reads, "rb", buffering=0) as report:  # fmt: skip
        try:
            os.close(writes)
            spec = {
                "source": source,
                "tests": tests,
                "seconds": seconds,
                "megabytes": megabytes,
                "disk": DISK,
            }
            spec |= {"report": writes, "isolated": isolated, "drop": _is_root()}
            assert process.stdin and process.stdout and process.stderr
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(spec).encode())
            files = (report, process.stdout, process.stderr)
            said, *texts, ended = _read([file.fileno() for file in files], began + seconds + STARTING)
        finally:
            _end(process, isolated)
    out, err = (text[:OUTPUT].decode("utf-8", "replace") for text in texts)
    if ended:
        return {"status": ended, "seconds": time.monotonic() - began}, out, err
    if not said:
        raise RuntimeError(f"the sandbox ended without a report: {err.strip()[-500:]}")
    return json.loads(said.splitlines()[0]), out, err


def _end(process: subprocess.Popen[bytes], isolated: bool) -> None:
    """End all that is left of it; isolated: and wait until the last has gone."""
    if isolated:
        # It ends the first process of the PID namespace and waits for it, which goes after all others in it.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STARTING)
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _is_root() -> bool:
    return os.geteuid() == 0


def _read(files: list[int], end: float) -> tuple[bytearray, bytearray, bytearray, str]:
    """What comes until the first of the files is closed, and why it was not waited for, or ""."""
    texts = {file: bytearray() for file in files}
    with selectors.DefaultSelector() as selector:
        for file in files:
            os.set_blocking(file, False)
            selector.register(file, selectors.EVENT_READ)
        over = False
        while not over or selector.get_map():
            ready = selector.select(0 if over else max(0.0, end - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                if got := os.read(key.fd, OUTPUT):
                    texts[key.fd] += got
                else:
                    selector.unregister(key.fd)
                    over |= key.fd == files[0]
            if any(len(texts[file]) > OUTPUT for file in files[1:]):
                return *texts.values(), "output"  # type: ignore[return-value]
    return *texts.values(), "" if over else "timeout"  # type: ignore[return-value]
