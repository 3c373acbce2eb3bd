"""The inside of `evaluation.sandbox`: what it starts, with the standard library alone.

this process     makes namespaces and a root directory of its own, waits
└ first process  of the PID namespace: starts the two below, waits for them, writes the report
  ├ program      the generated source; then it answers what the tests ask of it
  └ tests        decide by themselves: in the program's own process it could answer for them
"""

import ast
import builtins
import collections
import contextlib
import json
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

from evaluation import exchange, fences
from evaluation.exchange import Gone, Proxy, answer, remote_names
from evaluation.fences import called, confine, enter_namespaces

GONE, MEMORY = 78, 77  # exit statuses: the program left before its tests did; no memory
OURS = {__file__, exchange.__file__, fences.__file__}


def execute(source: str, name: str, names: dict[str, Any]) -> types.ModuleType:
    """The module that running `source` makes, where its own name finds it."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    exec(compile(source, f"{name.strip('_')}.py", "exec"), module.__dict__)
    return module


def without_disguise(tests: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names without those of builtins: `def all(x): return True` in a program is nothing to its tests.

    They count where tests use no other name of the program: some are written for a function `sum`.
    """
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    others = {name: value for name, value in names.items() if not hasattr(builtins, name)}
    return others if any(isinstance(others.get(name), Proxy) for name in used) else names


def start(spec: dict[str, Any], close: tuple[int, ...], work: Callable[[], Any]) -> int:
    """The id of a new process that confines itself, does the work and ends as a program does."""
    if pid := os.fork():
        return pid
    try:
        confine(spec)
    except OSError as error:
        tell(spec, missing=str(error))
        os._exit(1)
    for descriptor in (*close, spec["report"]):
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        work()
    except MemoryError:
        os._exit(MEMORY)  # at once: there is none to end in order
    except Gone as error:
        print(error, file=sys.stderr)
        sys.exit(GONE)
    except Exception as error:
        shown, trace = collections.deque[Any](maxlen=30), error.__traceback__  # of a million frames the last
        while trace is not None:
            if trace.tb_frame.f_code.co_filename not in OURS:
                shown.append(trace)
            trace = trace.tb_next
        traceback.print_exception(error.with_traceback(shown[0] if shown else None))
        sys.exit(1)
    sys.exit(0)


def judge(spec: dict[str, Any]) -> str:
    """Start program and tests, wait no longer than asked, and say how it went."""
    source, tests, end = spec["source"], spec["tests"], time.monotonic() + spec["seconds"]
    (asked, ask), (heard, say) = os.pipe(), os.pipe()

    def be_program() -> None:
        module = execute(source, "__main__" if tests is None else "program", {})
        if tests is not None:
            answer(module, os.fdopen(asked, encoding="utf-8"), os.fdopen(say, "w", encoding="utf-8"))

    def be_tests() -> None:
        pipes = os.fdopen(ask, "w", encoding="utf-8"), os.fdopen(heard, encoding="utf-8")
        names = remote_names(*pipes)
        execute(tests, "tests", without_disguise(tests, names))

    pids = [start(spec, (ask, heard) if tests is not None else (ask, heard, asked, say), be_program)]
    if tests is not None:
        pids.append(start(spec, (asked, say), be_tests))
    for descriptor in (ask, asked, heard, say):
        os.close(descriptor)
    try:
        status = left = wait(pids[-1], end)
        if gone := os.waitstatus_to_exitcode(left) == GONE and len(pids) > 1:
            status = wait(pids[0], end)
    except TimeoutError:
        return "timeout"
    finally:
        if not spec["isolated"]:  # else they end with this process, whatever their number
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return "timeout" if -code == signal.SIGXCPU else "killed"
    return "memory" if code == MEMORY else "passed" if code == 0 and not gone else "failed"


def wait(pid: int, end: float) -> int:
    """How a process ended. Raises TimeoutError where it has not by then."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.002)


def tell(spec: dict[str, Any], **what: Any) -> None:
    """A line for the host."""
    os.write(spec["report"], json.dumps(what).encode() + b"\n")


def main() -> None:
    """Read what to do from stdin, and do it."""
    spec = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    sys.set_int_max_str_digits(0)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # of `site`, which is not there
    if spec["isolated"]:
        try:
            enter_namespaces(spec["disk"], spec["drop"])
        except OSError as error:
            return tell(spec, missing=str(error))
    if pid := os.fork():
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
        os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what could be ended has ended; its id is free
        return None
    if spec["isolated"]:
        called("namespaces", "prctl", 1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG: with its parent
    began = time.monotonic()
    status = judge(spec)
    tell(spec, status=status, seconds=time.monotonic() - began)
    os._exit(0)
