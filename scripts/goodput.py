"""Where a run's time went, alive, finished or killed: `python scripts/goodput.py RUN`.

    RUN              a directory in runs/, or a path to one
    --runs DIR       where runs lie, runs/ by default

Reads `ledger.jsonl` (`artifacts/ledger.py`); nothing is written. Exit status: 0 done, 2 bad input.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from artifacts.ledger import CATEGORIES, NAME, Start, account_of_run, last_step, read_starts
from common.terminal import steady_streams
from common.text import counted, duration


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    run_dir = next((p for p in (options.runs / options.run, Path(options.run)) if (p / NAME).is_file()), None)
    if run_dir is None:
        where = options.runs / options.run
        print(
            f"error: {where} has no {NAME}; give the name of a run that has reached its steps",
            file=sys.stderr,
        )
        return 2
    print("\n".join(lines(run_dir)))
    return 0


if __name__ == "__main__":
    steady_streams()
    sys.exit(main())
