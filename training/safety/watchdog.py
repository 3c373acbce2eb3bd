"""A thread that ends a process which makes no progress: stacks of all threads, then exit status 75.

A collective whose other side is gone, a file system that hangs, a deadlock: none of them raises, and a job
that waits in one holds its machines for ever. The loop says what it goes on to (`announce`), and where it has
not said anything new within the bound of that, the stacks go to stderr and to `stacks/` in the run's
directory, and the process ends at once, to be started again from its last checkpoint. Every process of a job
watches itself.

Seconds are counted in ticks of the thread, so that a process which was itself stopped (Ctrl-Z, a laptop's
lid) is not taken for one that hangs. A main thread that hangs without giving up Python's lock stops this one
too: in a job of several processes the others' watchdogs end it then.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from common.errors import Requeue
from common.terminal import write_at_once

TICK = 0.5  # seconds between two looks
# What takes longer than a step may; `guard.stall_seconds`, where it is more.
BOUNDS = {
    "starting": 3600.0,  # restore or initialize, then the plan of the first epoch
    "evaluation": 7200.0,
    "checkpoints": 5400.0,  # beyond SEND_SECONDS and SAVE_SECONDS of the manager, which raise
    "profile": 1800.0,
    "rollback": 3600.0,
    "replica check": 1800.0,
    "samples": 7200.0,
    "the end": 7200.0,  # the summary; on other processes, the primary's samples
}
FLUSH_SECONDS = 2.0


class Watchdog:
    """Watches from `with` on; `announce` is progress.

    seconds: None or 0 for none. folder: of the run, which need not be there yet. process: its number.
    """

    def __init__(
        self,
        seconds: float | None,
        folder: Path,
        process: int,
        *,
        leave: Callable[[int], object] = os._exit,
    ):
        self.seconds, self.folder, self.process, self._leave = seconds or None, folder, process, leave
        self._what, self._left = "starting", self._bound("starting")
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def announce(self, what: str) -> None:
        """What was expected has come; `what` comes next, within its bound."""
        with self._lock:
            self._what, self._left = what, self._bound(what)

    def _bound(self, what: str) -> float:
        return max(self.seconds or 0.0, BOUNDS.get(what, 0.0))

    def _watch(self) -> None:
        assert self.seconds is not None
        tick = min(TICK, self.seconds / 4)
        while not self._closed.wait(tick):
            with self._lock:
                self._left -= tick
                late, what = self._left <= 0, self._what
            if late:
                self._give_up(what)
                return

    def _give_up(self, what: str) -> None:
        """Nothing here may wait for what the main thread holds."""
        path, where = self.folder / "stacks" / f"process{self.process}.txt", ""
        found = stacks()
        write_at_once(2, f"stopped: no progress in {self._bound(what):g} s at {what}; all threads:\n{found}")
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"no progress in {self._bound(what):g} s at {what}\n{found}")
                file.flush()
                os.fsync(file.fileno())
            where = f"; their stacks are in {path}"
        except OSError:  # the run's directory is not there yet, or its disk is what hangs
            pass
        words = f"stopped: no progress in {self._bound(what):g} s at {what}{where}"
        write_at_once(2, f"{words}; the same command goes on\n")
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
        self._leave(Requeue.status)


def stacks() -> str:
    """Where every thread stands, the main one first.

    Without the lines themselves: they would be read from files, and a file system may be what hangs. Python's
    own faulthandler stops after a hundred threads, before it comes to the oldest, which is the main one.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda pair: (pair[0] != main, pair[0]))
    lines = []
    for ident, frame in frames:
        lines.append(f"Thread {names.get(ident, ident)}, most recent call first:")
        at: FrameType | None = frame
        while at is not None:
            lines.append(f'  File "{at.f_code.co_filename}", line {at.f_lineno}, in {at.f_code.co_name}')
            at = at.f_back
    return "\n".join(lines) + "\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
