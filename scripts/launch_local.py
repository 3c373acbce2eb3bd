"""train.py as a job of several processes on this machine: `python scripts/launch_local.py --processes 4 ...`.

    --processes N              processes to start
    --devices-per-process D    CPU devices of each; by default eight in all, at least one each
    --grace SECONDS            between asking the processes to stop and killing them, 30 by default
    --script FILE              start this in place of train.py, such as scripts/check_cluster.py

Everything else is train.py's command line: `--processes 4 +experiment=debug mesh.data=8`. The processes share
the machine's cores, so this shows that a job is right, not that it is fast.

Rank 0's stdout is this command's stdout; every rank's stderr comes with its number before each line. When one
process fails the others are ended, and the exit status is that of the first; Ctrl-C, SIGTERM, SIGUSR1 and
SIGUSR2 are handed on. Nothing is left running.
"""

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import command

from launch.local import LocalJob, parse
from scripts.command import run


def launch(arguments: Sequence[str]) -> int:
    """The exit status: 0 all done, else that of the first process that failed."""
    options = parse(arguments)
    return LocalJob(options, [sys.executable, str(options.script), *options.words]).run()


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status, 2 for bad input."""
    return run(launch, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
