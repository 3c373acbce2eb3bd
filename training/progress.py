"""What a person watches: a table of what was chosen and why, then one live line, or plain lines in a log.

Only process 0 prints. The live line shares its console with everything else that Python prints, which then
scrolls by above it; where stdout is no terminal there are plain lines every `logging.every` steps.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from common.text import duration, figures_line, human

_FIGURES = ("step", "loss", "speed", "mfu", "eta", "eval")


def startup_table(rows: Iterable[tuple[str, Any, str]], console: Console | None = None) -> None:
    """Print (name, value, why) rows: nothing is chosen silently.

    What is longer than the screen is wide goes on below itself; in a log each row is one line.
    """
    console = console or Console()
    rows = [(name, str(value), why) for name, value, why in rows]
    width = max(len(name) for name, _, _ in rows)
    for name, value, why in rows:
        text = Text.assemble((value, "cyan"), (f" ({why})", "dim"))
        if not console.is_terminal:
            console.print(f"{name:{width}}  {text}", markup=False, highlight=False, soft_wrap=True)
            continue
        row = Table.grid(Column(width=width, style="bold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
        row.add_row(Text(name), text)
        console.print(row)


class Progress:
    """A live line on a terminal, plain lines elsewhere, nothing on any process but the first.

    `update` and `evaluated` take rows of `metrics.jsonl` as they are written; `close` leaves the last state.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        every: int = 20,
        live: bool = True,
        primary: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`start_step`: steps already done before this start; `primary`: whether this process prints."""
        self._console = console or Console(quiet=not primary)
        self._num_steps, self._start, self._every, self._clock = num_steps, start_step, every, clock
        self._first: tuple[int, float] | None = None
        self._eval = ""
        self._live = _live_bar(self._console) if live and primary and self._console.is_terminal else None
        self._task: TaskID | None = None
        if self._live is not None:
            empty: dict[str, Any] = dict.fromkeys(_FIGURES, "")
            empty |= {"step": f"{start_step}/{num_steps}", "loss": "starting"}
            self._task = self._live.add_task("", total=num_steps, completed=start_step, **empty)
            self._live.start()

    def close(self) -> None:
        """Leave the last state of the line on the screen; a second call does nothing."""
        if self._live is not None:
            self._live.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """A training row."""
        figures = self._figures(row)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=row["step"], **figures)
        elif row["step"] in (self._start + 1, self._num_steps) or row["step"] % self._every == 0:
            self.note("  ".join(["step " + figures.pop("step"), *filter(None, figures.values())]))

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """A row that is no training step: a line that stays; a held-out loss is also on the live line."""
        loss, bits = row.get("eval/loss"), row.get("eval/bits_per_byte")
        others = {k: v for k, v in row.items() if k.split("/")[0] not in ("step", "eval", "mixture")}
        if others:
            self.note(f"at step {row['step']}: {figures_line(others)}")
        if loss is None:
            return
        self._eval = f"eval {bits:.3f} bit/B" if bits is not None else f"eval {loss:.3f}"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, eval=self._eval)
        text = f"eval at step {row['step']}: {loss:.4f} nats/token"
        self.note(text + (f", {bits:.4f} bits/byte" if bits is not None else ""))

    def note(self, text: str) -> None:
        """A line of its own, above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _figures(self, row: Mapping[str, Any]) -> dict[str, Any]:
        mfu = row.get("mfu_causal")
        return {
            "step": f"{row['step']}/{self._num_steps}",
            "loss": f"loss {row['loss']:.3f}",
            "speed": f"{human(row['tokens_per_second'])} tok/s" if "tokens_per_second" in row else "",
            "mfu": f"MFU {100 * mfu:.1f}%" if mfu is not None else "",
            "eta": self._eta(row["step"]),
            "eval": self._eval,
        }

    def _eta(self, step: int) -> str:
        """Time left at the pace since the first step, not counting that one: it may hold a compilation."""
        if self._first is None:
            self._first = (step, self._clock())
            return ""
        first, since = self._first
        if step <= first:
            return ""
        return "ETA " + duration((self._clock() - since) / (step - first) * (self._num_steps - step))


def _live_bar(console: Console) -> Bar:
    columns = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in _FIGURES]
    return Bar(BarColumn(bar_width=16), *columns, console=console, refresh_per_second=4)


class Counting:
    """A bar for things that are counted as they are done; nothing where stdout is no terminal."""

    def __init__(self, what: str, console: Console | None = None):
        self._bar = Bar(
            TextColumn(what), BarColumn(bar_width=30), TextColumn("{task.completed}/{task.total}")
        )
        self._console = console or Console()
        self._task: TaskID | None = None

    def __enter__(self) -> "Counting":
        if self._console.is_terminal:
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def tell(self, done: int, whole: int) -> None:
        """So many are done, of so many."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=whole)
