"""Every step a row: metrics are read one step late, so that the devices never wait for the host."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from artifacts.ledger import Ledger
from artifacts.metrics import MetricsLog
from common.errors import RunFault
from training.flops import Flops
from training.input_watch import InputWatch
from training.local_sgd import host_scalars
from training.safety.signals import VOTE
from training.safety.skip_updates import IN_A_ROW, SKIPPED, reason_of, through_empty_batches

OWN = (SKIPPED, IN_A_ROW, VOTE)  # metrics by which the loop talks to itself
NOT_TIMED: Mapping[str, float] = {}


def ignored(what: str) -> None:
    """Nobody wants to know what comes next."""


class Recorder:
    """Turns the step's device scalars into rows of `metrics.jsonl`, TensorBoard and the live line.

    `push` a step when it has been dispatched; its row is written when the next one has been, or at `flush`.
    Every process of a job counts and looks for faults; `log` and `board` are None on all but the primary.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        flops: Flops,
        progress: Any,
        board: Any,
        *,
        tokens: int,
        every: int,
        ledger: Ledger | None = None,
        input_watch: InputWatch | None = None,
        announce: Callable[[str], None] = ignored,
    ):
        """`ledger`: of this start, from its beginning; one of its own where none is given.

        `announce`: told what comes next, of what is no step (`training.safety.watchdog`).
        """
        self.log, self.flops, self.progress, self.board = log, flops, progress, board
        self.tokens, self.every = tokens, every
        self.ledger = ledger or Ledger()
        self.input_watch, self.announce = input_watch, announce
        self._pending: tuple[int, Mapping[str, Any], float, Mapping[str, float]] | None = None
        self._mark = time.perf_counter()
        self.seconds = 0.0  # of steps alone, without evaluation and saving
        self.waited = 0.0  # of these, for data
        self.steps = 0
        self.skips = 0  # updates of this start that were not taken
        self.in_a_row = self.carried = 0  # of those, by `through_empty_batches`
        self.last: dict[str, Any] = {}
        self.last_event: dict[str, Any] = {}  # the newest value under every name
        self.read: Mapping[str, Any] = {}  # metrics of the last step whose row was written

    def push(
        self, step: int, metrics: Mapping[str, Any], wait: float, stages: Mapping[str, float] = NOT_TIMED
    ) -> None:
        """A step has been dispatched; the one before it is finished by now or soon.

        wait, stages: seconds that the step waited for its batch, and that making it took by stage.
        """
        self.ledger.waited(wait)
        pending, self._pending = self._pending, (step, metrics, wait, stages)
        if pending:
            self._write(*pending)

    def flush(self) -> None:
        """Wait for the last step and write its row."""
        pending, self._pending = self._pending, None
        if pending:
            self._write(*pending)

    def sync(self) -> None:
        """Return once every row so far is on the disk."""
        if self.log:
            self.log.sync()

    def go_back(self, tokens: int, log: MetricsLog | None, board: Any) -> None:
        """What was pending is of steps that are undone; the rows go on in a log that was cut."""
        self._pending, self.read, self.last = None, {}, {}
        self.in_a_row = self.carried = 0
        self.tokens, self.log, self.board = tokens, log, board

    def start_clock(self) -> None:
        """The next step begins now."""
        self._mark = time.perf_counter()

    @contextmanager
    def outside_steps(self, what: str) -> Iterator[None]:
        """Around what is no training step: the steps so far end before it, and its time is kept apart.

        what: a category of `artifacts.ledger`, in words.
        """
        self.flush()
        self.announce(what)
        with self.ledger.during(what.replace(" ", "_")):
            yield
        self.announce("the next step")
        self.start_clock()

    def goodput(self) -> dict[str, Any]:
        """Where the time of the run's life went, for the summary."""
        ledger = self.ledger
        seconds = ledger.totals()
        return {
            "seconds": sum(seconds.values()),
            "categories": seconds,
            "starts": ledger.before.starts + 1,
            "redone_steps": ledger.before.redone + ledger.redone,
            "input_wait_share": self.waited / self.seconds if self.seconds else 0.0,
            "input_bottleneck": self.input_watch.bottleneck() if self.input_watch else None,
        }

    def event(self, step: int, values: Mapping[str, Any]) -> None:
        """A row that is not a training step, such as an evaluation."""
        if self.log:
            self.log.write({"step": step, **values})
        self.last_event = {**self.last_event, "step": step, **values}
        self.progress.evaluated({"step": step, **values})
        if self.board:
            self.board.scalars(step, {k: v for k, v in values.items() if not isinstance(v, str)})

    def _write(self, step: int, metrics: Mapping[str, Any], wait: float, stages: Mapping[str, float]) -> None:
        values = host_scalars(metrics)
        self.in_a_row, self.carried = through_empty_batches(values, self.in_a_row, self.carried)
        self.read = {**values, IN_A_ROW: self.in_a_row}
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        tokens = int(values["tokens"])
        self.tokens += tokens
        self.seconds += seconds
        self.waited += wait
        self.steps += 1
        row: dict[str, Any] = {
            "step": step,
            "loss": float(values["loss"]),
            "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(values["learning_rate"]),
            "tokens": self.tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "input_wait_seconds": wait,
            **self.flops.mfu(tokens / seconds),
        }
        # What an objective or a router reports beside the loss is written as it is named.
        row |= {key: float(value) for key, value in values.items() if key not in row and key not in OWN}
        reason = reason_of(values)
        if reason:
            self.skips += 1
            row |= {"skipped": 1, "skip_reason": reason}
        if self.log:
            self.log.write(row)
        self.last = row
        self.ledger.stepped(step, skipped=bool(row.get("skipped")))
        self.progress.update(row)
        if reason:
            figures = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            self.progress.note(f"step {step}: update skipped, {reason} ({figures})")
        if self.input_watch and (line := self.input_watch.seen(step, seconds, wait, stages)):
            self.progress.note(line)
        if self.board and (step % self.every == 0 or step == 1):
            self.board.scalars(step, {k: v for k, v in row.items() if k not in ("step", "skip_reason")})
            self.board.flush()  # so that a running TensorBoard follows
        # What was not skipped has spoilt the weights, and under a loss that may still look sound.
        bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(row[key])), None)
        if bad and reason is None:
            raise RunFault(
                f"{bad}={row[bad]} at step {step}; in a new run.name=, lower optim.learning_rate "
                f"({row['learning_rate']:.3g} at that step) or set optim.grad_clip"
            )
