"""A run again, and whether it comes out the same: `python scripts/reproduce.py RUN`.

    RUN              a directory in runs/, or a path to one
    steps=N          only the first N steps (the schedule stays that of the whole run)
    output=DIR       where the rerun writes; a new directory beside RUN by default
    check=true        say what differs in code, packages, devices, data and tokenizer; run nothing
    here=true         run with the code and the data that are here, whatever the manifest says
    tolerance=X      relative difference of losses that passes, for other hardware; 0: bit for bit
    runs=DIR         where runs lie, runs/ by default

Code that is not the present one is checked out into a temporary git worktree, its uncommitted changes
applied. Packages are never changed: what differs is said before anything starts.

Exit status: 0 every step compared is identical (check=true: nothing that matters differs), 1 differs, or the
rerun failed, 2 bad input, or what the run was made from is not here.
"""

from collections.abc import Sequence

if __name__ == "__main__":
    import command

from common.checks import require, within
from launch.reproduce import ReproduceOptions, reproduce
from scripts.command import parse, run


def parse_options(words: Sequence[str]) -> ReproduceOptions:
    """The command line. Raises ValueError for a figure out of range."""
    options = parse(words, ReproduceOptions)
    within("steps", options.steps, 1)
    require(0 <= options.tolerance < 1, "tolerance", options.tolerance, "0 or more, and below 1")
    return options


def main(words: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(lambda asked: reproduce(parse_options(asked)), words, __doc__)


if __name__ == "__main__":
    command.start(main)
