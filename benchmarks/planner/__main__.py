"""The planner's checks, each a command of its own; all but `predicted` need compilers and no device.

    python -m benchmarks.planner described       # a step on one H200; with words of train.py: prints only
    python -m benchmarks.planner described_tpu   # a step on two slices of TPUs
    python -m benchmarks.planner golden          # eight programs against committed ones, or --rewrite
    python -m benchmarks.planner planned         # seven plans for clusters, analytic against compiled
    python -m benchmarks.planner searched        # a search against the meshes that were written by hand
    python -m benchmarks.planner predicted       # plans against a device that is here: memory, step time

The compilers: pip install -e '.[plan-gpu,plan-tpu]'. `predicted --help` lists its flags.
"""

import os
import sys
from collections.abc import Sequence

from benchmarks import measure

COMMANDS = ("described", "described_tpu", "golden", "planned", "searched", "predicted")


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Run one of the checks; its exit status."""
    command, *words = argv or ["--help"]
    if command not in COMMANDS:
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    if command != "predicted":  # no device of this machine is wanted, and none is waited for
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from benchmarks.planner import described, golden, plans

    checks = (described.gpu, described.tpu, golden.check, plans.planned, plans.searched, plans.predicted)
    try:
        return dict(zip(COMMANDS, checks, strict=True))[command](words)
    except ImportError as error:  # of a compiler, with the command that installs it
        raise ValueError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
