"""Where a run's time went, alive, finished or killed: `python scripts/goodput.py RUN`.

    RUN              a directory in runs/, or a path to one
    runs=DIR         where runs lie, runs/ by default

Reads `ledger.jsonl` (`artifacts/ledger.py`); nothing is written. Exit status: 0 done, 2 bad input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    import command

from artifacts.ledger import CATEGORIES, NAME, Start, account_of_run, last_step, read_starts
from common.text import counted, duration
from scripts.command import parse, run


def lines(run_dir: Path) -> Iterator[str]:
    """The table of categories, then a line for each start."""
    total, starts = account_of_run(run_dir), read_starts(run_dir / NAME)
    life = f"{duration(total.wall)} of life, {counted(len(starts), 'start')}"
    yield f"{run_dir.name}: {life}, {total.redone:,} steps redone"
    wide = max(map(len, total.seconds))
    for name, seconds in sorted(total.seconds.items(), key=lambda pair: -pair[1]):
        share = 100 * seconds / (total.wall or 1.0)
        yield f"  {name.replace('_', ' '):{wide}} {seconds:12,.1f} s {share:6.2f} %  {CATEGORIES[name]}"
    came_to = [start.begin["found"] for start in starts[1:]] + [last_step(run_dir / "metrics.jsonl")]
    yield from map(of_a_start, starts, came_to)


def of_a_start(start: Start, last: int) -> str:
    """How far it came, and how it ended."""
    ended = "killed, or still running" if start.status is None else f"exit status {start.status}"
    age = duration(sum(start.row["seconds"].values()))
    steps = f"from step {start.begin['first']:,} to {max(last, start.row['step']):,}"
    return f"  start {start.number}: {steps} in {age}, {ended}"


@dataclass(frozen=True)
class GoodputOptions:
    """The command line; see the module's docstring."""

    run: str
    runs: Path = Path("runs")


def print_account(arguments: Sequence[str]) -> int:
    """Print where the run's time went. Raises ValueError where it has no ledger."""
    options = parse(arguments, GoodputOptions)
    places = (options.runs / options.run, Path(options.run))
    run_dir = next((place for place in places if (place / NAME).is_file()), None)
    if run_dir is None:
        raise ValueError(f"{places[0]} has no {NAME}; give the name of a run that has reached its steps")
    print("\n".join(lines(run_dir)))
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(print_account, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
