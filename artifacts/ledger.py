"""Where a run's life went, over all of its starts: every second in one named category.

`ledger.jsonl` in the run's directory has rows of three kinds, each with the number of the `start`, the moment
`at` (seconds since 1970) and what the start has come to by then:

    begin   a start has reached the run's directory; what it took until then is in its seconds already
    beat    still alive: every second at first, later once in a thousandth of the start's age
    end     it has left, with its exit status

So a start that was killed is accounted for up to its last beat, and what lies between that and the next begin
is downtime. Seconds of a row are cumulative within its start and add up to its age, whatever happened: time
is moved between categories and never made. Only the primary of a job keeps a ledger.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from artifacts.metrics import decode_row

CATEGORIES = {
    "initialization": "imports, joining the other processes, devices, opening files, the first weights",
    "data_preparation": "making the prepared data, or checking it",
    "compilation": "tracing, lowering and compiling, whatever it was for",
    "restore": "reading a checkpoint",
    "steps": "training steps, done for the first time",
    "redone_steps": "training steps that an earlier start, or this one before a rollback, had done",
    "unfinished_step": "a step that has no row yet; where the start ended within it, it was lost",
    "input_wait": "steps that waited for their batch",
    "rollouts": "answers that the run draws for its own training",
    "evaluation": "held-out loss",
    "checkpoints": "what the loop waited for a save to begin, and at the end for the last one",
    "profile": "starting and writing a trace",
    "replica_check": "comparing devices that hold the same parameters",
    "samples": "generated text, averages, the plot and the summary",
    "rollback": "going back to a checkpoint within a start",
    "downtime": "between the last sign of one start and the begin of the next",
    "other": "none of these",
}
STEPPING = "unfinished_step"
NAME = "ledger.jsonl"
FIRST_BEAT = 1.0  # second
SHARE = 1e-3  # of a start's age, from one beat to the next
_TAIL = 1 << 16  # bytes of metrics.jsonl that surely hold a training row


class Ledger:
    """The account of this start: one category is open at a time, and the time goes there.

    began: when this start did, seconds since 1970; now by default. `compiling`: seconds of all compilations
    of this process so far: they are taken out of what they were needed for. `facts`: what a beat says beside
    the account, such as memory. Another thread may read and beat.
    """

    def __init__(self, began: float | None = None, facts: Callable[[], Mapping[str, Any]] = dict) -> None:
        now = time.time()
        self.began = now if began is None else min(began, now)
        self.facts = facts
        self.start, self.first, self.reached, self.step = 1, 0, 0, 0
        self.redone = self.skipped = 0
        self.before = Account()  # the starts before this one, and the time between
        self.saved: tuple[int, float] | None = None  # the last save that began: step and moment
        self.row_at = self.began  # when the last training row was written
        self.compiling: Callable[[], float] = lambda: 0.0
        self._seconds = {"initialization": now - self.began}
        self._category, self._mark, self._compiled, self._owed = (
            "initialization",
            time.perf_counter(),
            0.0,
            0.0,
        )
        self._lock = threading.RLock()
        self._fd, self._size = -1, 0
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def during(self, category: str) -> Iterator[None]:
        """Around work of a category; what is inside of another takes its own time out of that one's."""
        before = self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, category: str) -> str:
        """From here on the time is this category's; returns the one before."""
        assert category in CATEGORIES, category
        with self._lock:
            self._lap()
            before, self._category = self._category, category
        return before

    def waited(self, seconds: float) -> None:
        """So much of the step under way went to waiting for its batch."""
        with self._lock:
            self._lap()
            self._move(STEPPING, "input_wait", seconds)

    def stepped(self, step: int, *, skipped: bool = False) -> None:
        """A step has its row: what has been taken since the last one was for it, or for doing it again."""
        with self._lock:
            self._lap()
            again = step <= self.reached
            self._move(STEPPING, "redone_steps" if again else "steps", self._seconds.get(STEPPING, 0.0))
            self.step, self.reached, self.row_at = step, max(step, self.reached), time.time()
            self.redone += again
            self.skipped += skipped

    def save_began(self, step: int) -> None:
        """A checkpoint of this step is being written."""
        self.saved = step, time.time()

    def seconds(self) -> dict[str, float]:
        """Of this start by category, up to now; they add up to its age."""
        with self._lock:
            self._lap()
            return dict(self._seconds)

    def totals(self) -> dict[str, float]:
        """The same over the run's life, downtime included."""
        return _sum(self.before.seconds, self.seconds())

    def _lap(self) -> None:
        now, compiled = time.perf_counter(), self.compiling()
        self._add(self._category, now - self._mark)
        self._mark = now
        if self._category != "compilation":
            self._owed += compiled - self._compiled
        self._compiled = compiled
        # A compilation is told when it is over, and the beats meanwhile have counted it where it was needed.
        self._owed -= self._move(self._category, "compilation", self._owed)

    def _move(self, source: str, target: str, seconds: float) -> float:
        moved = min(seconds, self._seconds.get(source, 0.0))
        if moved > 0 and source != target:
            self._add(source, -moved)
            self._add(target, moved)
        return moved

    def _add(self, category: str, seconds: float) -> None:
        self._seconds[category] = self._seconds.get(category, 0.0) + seconds

    def open(self, run_dir: Path, first: int) -> None:
        """Read what earlier starts left and begin this one's rows, behind step `first`. Raises OSError.

        Before `metrics.jsonl` is cut back: that says to the step how far they came.
        """
        path = run_dir / NAME
        starts = read_starts(path)
        last = last_step(run_dir / "metrics.jsonl")
        self.before = account(starts, until=self.began, last_step=last)
        self.start = starts[-1].number + 1 if starts else 1
        self.first = self.step = first
        self.reached = max([first, last, *(start.row["reached"] for start in starts)])
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size
        if self._size and not path.read_bytes().endswith(b"\n"):  # torn by the machine's end
            self._append(b"\n")
        self._append(self._row("begin", began=self.began, first=first, found=last, reached=self.reached))
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Write down how things stand."""
        self._append(self._row("beat"))

    def leave(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """The last row, as an exit of a `with`: the status is that of the error on its way out."""
        if self._fd < 0:
            return
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        status = 0 if error is None else getattr(error, "status", 1)
        self._append(self._row("end", status=status))
        os.close(self._fd)
        self._fd = -1

    def _live(self) -> None:
        while not self._leaving.wait(max(FIRST_BEAT, SHARE * (time.time() - self.began))):
            self.beat()

    def _row(self, event: str, **more: Any) -> bytes:
        with self._lock:
            seconds = self.seconds()
            row = {
                "start": self.start,
                "event": event,
                "at": self.began + sum(seconds.values()),
                "step": self.step,
                "reached": self.reached,
                "redone": self.redone,
                "skipped": self.skipped,
                "saved": self.saved[0] if self.saved else None,
                **more,
                "seconds": {name: round(value, 6) for name, value in seconds.items() if value},
                **self.facts(),
            }
        return json.dumps(row).encode() + b"\n"

    def _append(self, line: bytes) -> None:
        # A full disk is said by what must be written: a row of the ledger is left out whole.
        with self._lock, contextlib.suppress(OSError):
            if self._fd < 0:
                return
            if os.write(self._fd, line) < len(line):
                os.ftruncate(self._fd, self._size)
            else:
                self._size += len(line)


@dataclass(frozen=True)
class Start:
    """What the ledger has of one start: its first row and its last."""

    begin: Mapping[str, Any]
    row: Mapping[str, Any]

    @property
    def number(self) -> int:
        """From 1."""
        return int(self.begin["start"])

    @property
    def status(self) -> int | None:
        """Its exit status; None where it was killed, or lives."""
        return self.row.get("status")


@dataclass
class Account:
    """What several starts came to. redone, skipped: numbers of steps."""

    seconds: dict[str, float] = field(default_factory=dict)
    starts: int = 0
    redone: int = 0
    skipped: int = 0

    @property
    def wall(self) -> float:
        """Seconds from the first begin to the last sign."""
        return sum(self.seconds.values())


def read_starts(path: Path) -> list[Start]:
    """The starts in a ledger, torn lines left out; none where there is no such file. Raises OSError."""
    found: dict[int, Start] = {}
    if not path.exists():
        return []
    with path.open("rb") as lines:
        for row in filter(None, map(decode_row, lines)):
            number = row.get("start", 0)
            if row.get("event") == "begin":
                found[number] = Start(row, row)
            elif number in found:
                found[number] = Start(found[number].begin, row)
    return list(found.values())


def account(starts: list[Start], *, until: float | None = None, last_step: int = 0) -> Account:
    """Add up starts and the time between them.

    until: the moment when the next one began, if one has. last_step: that `metrics.jsonl` ends with now,
    which is exact where a killed start's last beat is a little old.
    """
    total = Account(starts=len(starts))
    for start, after in zip(starts, [*starts[1:], None], strict=False):
        total.seconds = _sum(total.seconds, start.row["seconds"])
        begins = after.begin["began"] if after else until
        if begins is not None:
            total.seconds = _sum(total.seconds, {"downtime": max(0.0, begins - start.row["at"])})
        total.redone += _redone(start, after.begin["found"] if after else last_step)
        total.skipped += start.row["skipped"]
    return total


def _redone(start: Start, last: int) -> int:
    """Steps that a start did again; `last`: where the log of steps ended with it."""
    had = min(max(last, start.row["step"]), start.begin["reached"])
    return max(had - start.begin["first"], start.row["redone"], 0)


def _sum(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in CATEGORIES if name in a or name in b}


def last_step(metrics: Path) -> int:
    """The last training step that has a row in a `metrics.jsonl`; 0 where there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        rows = [row for row in map(decode_row, file) if row is not None and "loss" in row]
    return max((row["step"] for row in rows), default=0)


def account_of_run(run_dir: Path) -> Account:
    """The whole life of a run so far, alive, finished or killed."""
    return account(read_starts(run_dir / NAME), last_step=last_step(run_dir / "metrics.jsonl"))
