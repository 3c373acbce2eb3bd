"""Where a thread that makes batches spends its time: named stages, timed only where somebody asked for it.

    plan      which pieces make up an epoch's rows
    read      documents, or pages of the token file, from the disk
    tokenize  text to ids, where that is done while training
    fill      copying pieces into rows
    place     to the devices

A stage within another counts for itself alone.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_here = threading.local()
Seconds = dict[str, float]


class InputTiming:
    """Seconds by stage since `take` was last called, of the thread that is within `watching`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._seconds = clock, Seconds()
        self._within: list[str] = []
        self._mark = 0.0

    def take(self) -> Seconds:
        """Return the seconds of each stage and begin anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, `stage` of this thread counts here."""
        _here.stages = self
        try:
            yield
        finally:
            _here.stages = None

    def _count(self) -> None:
        now = self._clock()
        if self._within:
            name = self._within[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._count()
        self._within.append(name)
        try:
            yield
        finally:
            self._count()
            self._within.pop()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one stage for another."""
        seconds = min(seconds, self._seconds.get(source, 0.0))
        self._seconds[source] = self._seconds.get(source, 0.0) - seconds
        self._seconds[target] = self._seconds.get(target, 0.0) + seconds


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """What is done here belongs to this stage, where the thread is watched."""
    stages = getattr(_here, "stages", None)
    if stages is None:
        yield
        return
    with stages._stage(name):
        yield


@contextlib.contextmanager
def copying(stages: InputTiming) -> Iterator[None]:
    """The stage `fill`; waiting for pages of a mapped file that had to come from the disk is `read`."""
    faults, busy, began = _major_faults(), time.thread_time(), time.perf_counter()
    with stages._stage("fill"):
        yield
    if _major_faults() > faults:
        stages.move(time.perf_counter() - began - (time.thread_time() - busy), "fill", "read")


def _major_faults() -> int:
    """How often this thread has waited for a page from the disk; 0 where the system does not say."""
    of_thread: Any = getattr(resource, "RUSAGE_THREAD", None)
    return resource.getrusage(of_thread).ru_majflt if of_thread is not None else 0
