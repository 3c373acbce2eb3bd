"""Look into a run's checkpoints: `python scripts/checkpoint.py verify|list|diff|export|fetch ...`.

    verify RUN [step=N | all=true]    every file's sha256 and every array's digest, of the newest step
    list RUN [quick=true]             step, bytes, date, tokens, verified or why not; quick: small files only
    diff A B                          arrays that differ, and by how much; A, B: RUN or RUN:STEP
    export RUN output=DIR             weights as safetensors, with the config and the tokenizer; step=N,
                                      dtype=float32 or bfloat16, weights=raw or ema
    fetch URL DIR                     a run whose directory was lost, from the bucket it was sent to

RUN is a name in runs/ or a path. Where checkpoint.directory is a URL, what is not in the run's directory is
looked at in the bucket. Nothing is changed in either.

Exit status: 0 sound, or equal; 3 different (diff); 1 a damaged checkpoint; 2 bad input.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import command

from artifacts.load import find_run, open_saved, steps_until
from common.checks import choice
from scripts.command import parse, run

DIFFERENT = 3
PART = 1 << 30  # bytes of arrays that are read at a time
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class VerifyOptions:
    """The words of `verify`, after the verb."""

    run: str
    step: int | None = None  # the newest
    all: bool = False


@dataclass(frozen=True)
class ListOptions:
    """The words of `list`, after the verb."""

    run: str
    quick: bool = False


@dataclass(frozen=True)
class DiffOptions:
    """The words of `diff`: RUN or RUN:STEP, twice."""

    a: str
    b: str


@dataclass(frozen=True)
class ExportOptions:
    """The words of `export`, after the verb."""

    run: str
    output: Path
    step: int | None = None  # the newest
    dtype: str = "float32"
    weights: str = "raw"


@dataclass(frozen=True)
class FetchOptions:
    """The words of `fetch`: a run's checkpoint.directory, and the run's directory to make."""

    url: str
    directory: Path


def verify(options: VerifyOptions) -> int:
    """Name every bad file and array of the steps asked for; 1 where there is one."""
    from artifacts.checkpoints.inspect import bad_parts

    if options.all and options.step is not None:
        raise ValueError(f"step={options.step} and all=true both say which steps; use one of them")
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


def show_list(options: ListOptions) -> int:
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


def diff(options: DiffOptions) -> int:
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


def export(options: ExportOptions) -> int:
    """Write the directory, and say what was written."""
    choice("dtype", options.dtype, DTYPES)
    choice("weights", options.weights, ("raw", "ema"))
    from artifacts.checkpoints.inspect import export_weights

    directory = find_run(options.run)
    checkpoints = open_saved(directory)
    step = steps_until(checkpoints, options.step)[-1]
    item = "ema" if options.weights == "ema" else "params"
    written = export_weights(directory, checkpoints, step, options.output, item=item, dtype=options.dtype)
    print(f"{options.output}: {', '.join(written)} of step {step}")
    return 0


def fetch(options: FetchOptions) -> int:
    """Make a run's directory from what its bucket has of it; its checkpoints come when it is started."""
    from artifacts.checkpoints.remote import Remote
    from common.buckets import is_remote

    target = options.directory
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


# Verb → what does it, its words, and those that come without a key.
VERBS: dict[str, tuple[Callable[[Any], int], type, tuple[str, ...]]] = {
    "verify": (verify, VerifyOptions, ("run",)),
    "list": (show_list, ListOptions, ("run",)),
    "diff": (diff, DiffOptions, ("a", "b")),
    "export": (export, ExportOptions, ("run",)),
    "fetch": (fetch, FetchOptions, ("url", "directory")),
}


def do(arguments: Sequence[str]) -> int:
    """Do what the verb asks. Raises ValueError where there is none."""
    verb, *words = arguments or [""]
    choice("VERB", verb, VERBS)
    action, options, positional = VERBS[verb]
    return action(parse(words, options, positional))


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(do, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
