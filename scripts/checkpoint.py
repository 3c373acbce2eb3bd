"""Look into a run's checkpoints: `python scripts/checkpoint.py verify|list|diff|export|fetch ...`.

    verify RUN [--step N | --all]     every file's sha256 and every array's digest, of the newest step
    list RUN [--quick]                step, bytes, date, tokens, verified or why not
    diff A B                          arrays that differ, and by how much; A, B: RUN or RUN:STEP
    export RUN --output DIR           weights as safetensors, with the config and the tokenizer
    fetch URL DIR                     a run whose directory was lost, from the bucket it was sent to

RUN is a name in runs/ or a path. Where checkpoint.directory is a URL, what is not in the run's directory is
looked at in the bucket. Nothing is changed in either.

Exit status: 0 sound, or equal; 3 different (diff); 1 a damaged checkpoint; 2 bad input.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from artifacts.load import find_run, open_saved, steps_until
from common.terminal import steady_streams

DIFFERENT = 3
PART = 1 << 30  # bytes of arrays that are read at a time
DTYPES = ("float32", "bfloat16")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verify = verbs.add_parser("verify", help="every file and every array")
    verify.add_argument("run", help="a name in runs/, or a path")
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the step (the newest)")
    which.add_argument("--all", action="store_true", help="every step there is")
    listing = verbs.add_parser("list", help="what there is")
    listing.add_argument("run", help="a name in runs/, or a path")
    listing.add_argument("--quick", action="store_true", help="hash small files only, those of arrays not")
    diff = verbs.add_parser("diff", help="where two checkpoints differ")
    diff.add_argument("a", help="RUN or RUN:STEP")
    diff.add_argument("b", help="RUN or RUN:STEP")
    export = verbs.add_parser("export", help="weights for elsewhere")
    export.add_argument("run", help="a name in runs/, or a path")
    export.add_argument("--step", type=int, help="the step (the newest)")
    export.add_argument("--output", required=True, help="the directory to make")
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    export.add_argument("--weights", choices=("raw", "ema"), default="raw", help="or their average (raw)")
    fetch = verbs.add_parser("fetch", help="a run from its bucket")
    fetch.add_argument("url", help="its checkpoint.directory")
    fetch.add_argument("directory", help="the run's directory to make, such as runs/NAME")
    return parser.parse_args(arguments)


def verify(options: argparse.Namespace) -> int:
    """Name every bad file and array of the steps asked for; 1 where there is one."""
    from artifacts.checkpoints.inspect import bad_parts

    checkpoints = open_saved(find_run(options.run))
    newest = steps_until(checkpoints, options.step)[-1]
    status = 0
    for step in checkpoints.steps() if options.all else [newest]:
        with tempfile.TemporaryDirectory() as scratch:
            bad, what = bad_parts(checkpoints, step, Path(scratch), PART)
        for name, verdict in bad.items():
            print(f"{step}: {name} {verdict}")
        print(f"{step}: {f'DAMAGED, {len(bad)} parts' if bad else 'sound'} ({what})")
        status |= bool(bad)
    return status


def show_list(options: argparse.Namespace) -> int:
    """A line a step; 1 where one is damaged."""
    from artifacts.checkpoints.inspect import overview

    checkpoints = open_saved(find_run(options.run))
    rows = overview(checkpoints, quick=options.quick)
    if not rows:
        raise ValueError(f"{checkpoints.directory} is empty; the first checkpoint comes at checkpoint.every")
    print(f"{'step':>9} {'bytes':>15} {'date':<19} {'tokens':>15}  state")
    for row in rows:
        tokens = "?" if row.tokens is None else f"{row.tokens:,}"
        print(f"{row.step:>9} {row.num_bytes:>15,} {row.date:<19} {tokens:>15}  {row.state}")
    return int(any(row.damaged for row in rows))


def diff(options: argparse.Namespace) -> int:
    """A line for each array that is not the same in both; 3 where there is one."""
    from artifacts.checkpoints.inspect import differences

    sides = []
    for word in (options.a, options.b):
        name, colon, step = word.rpartition(":")
        if colon and not step.isdecimal():
            raise ValueError(f"{word} is no RUN:STEP; give a run's name, or one with a step, as in quick:200")
        checkpoints = open_saved(find_run(name if colon else word))
        sides.append((checkpoints, steps_until(checkpoints, step if colon else None)[-1]))
    lines, same = differences(sides[0], sides[1])
    for line in lines:
        print(line)
    print(f"{len(lines)} arrays differ, {same} are the same to the last bit")
    return DIFFERENT if lines else 0


def export(options: argparse.Namespace) -> int:
    """Write the directory; what was written."""
    from artifacts.checkpoints.inspect import export_weights

    run = find_run(options.run)
    checkpoints = open_saved(run)
    step = steps_until(checkpoints, options.step)[-1]
    item = "ema" if options.weights == "ema" else "params"
    written = export_weights(run, checkpoints, step, Path(options.output), item=item, dtype=options.dtype)
    print(f"{options.output}: {', '.join(written)} of step {step}")
    return 0


def fetch(options: argparse.Namespace) -> int:
    """Make a run's directory from what its bucket has of it; its checkpoints come when it is started."""
    from artifacts.checkpoints.remote import Remote
    from common.buckets import is_remote

    target = Path(options.directory)
    if not is_remote(options.url):
        raise ValueError(
            f"{options.url} is no URL; give the run's checkpoint.directory, as in s3://bucket/run"
        )
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is there already; remove it or choose another directory")
    remote = Remote(options.url)
    steps = remote.steps()
    if not steps:
        raise ValueError(f"{options.url} holds no checkpoint; look at the bucket")
    names = remote.fetch_run(target)
    print(f"{target}: {', '.join(names)}; the run's command goes on from step {steps[-1]}")
    return 0


VERBS: dict[str, Any] = {
    "verify": verify,
    "list": show_list,
    "diff": diff,
    "export": export,
    "fetch": fetch,
}


def main(arguments: Sequence[str]) -> int:
    """Do what is asked; the exit status."""
    from common.errors import RunFault

    options = parse(arguments)
    try:
        return VERBS[options.verb](options)
    except (ValueError, OSError, RunFault) as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        print("error: " + "; ".join(str(error).split("\n")), file=sys.stderr)
        return 1 if isinstance(error, RunFault) else 2


if __name__ == "__main__":
    steady_streams()
    sys.exit(main(sys.argv[1:]))
