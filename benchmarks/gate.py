"""Did we become slower? Compares ratios of two results, never their times: another day's machine is another.

    python -m benchmarks.gate FRESH COMMITTED                 # files, or directories with files of one name
    make bench                                                # measures first, then compares

A ratio (ours over PyTorch's, a kernel over the reference) has fallen where its median is lower by more than
the tolerance and the spread of both results allow. Ratios hold for one kind of processor or card: beside
NAME.json may lie NAME.ANYTHING.json, measured on others, and the one of this machine's kind is compared.
Exit status: 0 none fell, 1 one fell, 2 no comparison.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, guarded, read_result

TOLERANCE = 0.05  # of the committed ratio
NOISIEST = 0.15  # a spread above this hides whatever the gate is there to see


class Incomparable(ValueError):
    """The two results do not answer the question; the message says what to do."""


def uncertainty(ratio: Mapping[str, float]) -> float:
    """Standard error of a ratio's median, as a share of it, from its quartiles and number.

    For normal noise the standard deviation is the quartiles' distance / 1.349 and the median's standard error
    1.253 of it over the root of n; quartiles hardly notice the few rounds in which something else ran.
    """
    deviation = (ratio["q3"] - ratio["q1"]) / 1.349
    return 1.253 * deviation / math.sqrt(ratio["n"]) / ratio["median"]


def judge(fresh: Mapping[str, float], committed: Mapping[str, float], tolerance: float) -> tuple[bool, str]:
    """Whether a ratio fell by more than `tolerance` and twice the uncertainty of both, and the figures.

    Raises Incomparable where the uncertainty is above NOISIEST and hides the answer: such a measurement would
    pass almost anything. A fall beyond even that is one.
    """
    noise = 2 * math.hypot(uncertainty(fresh), uncertainty(committed))
    change = fresh["median"] / committed["median"] - 1
    fell = change < -(tolerance + noise)
    if not (fell or noise <= NOISIEST):
        raise Incomparable(
            f"its spread of {noise:.0%} is above {NOISIEST:.0%}; measure again with more rounds"
        )
    figures = (
        f"{committed['median']:.3f} -> {fresh['median']:.3f} ({change:+.1%}; {tolerance + noise:.1%} allowed)"
    )
    return fell, figures


def compare(
    fresh: Mapping[str, Any], committed: Mapping[str, Any], tolerance: float = TOLERANCE
) -> list[tuple[str, bool, str]]:
    """(ratio, whether it fell, figures) for every ratio of the committed result.

    Raises Incomparable where the workloads differ, or a ratio is missing from the fresh one or too noisy.
    """
    if fresh.get("workload") != committed.get("workload"):
        raise Incomparable("the two results are of different workloads; measure the committed one's")
    if not committed.get("ratios"):
        raise Incomparable("the committed result holds no ratios; commit one that does")
    judged = []
    for name, before in committed["ratios"].items():
        if name not in fresh.get("ratios", {}):
            raise Incomparable(
                f"{name} is missing from the fresh result; measure all that the committed one has"
            )
        try:
            fell, figures = judge(fresh["ratios"][name], before, tolerance)
        except Incomparable as error:
            raise Incomparable(f"{name}: {error}") from error
        judged.append((name, fell, figures))
    return judged


def other_machine(fresh: Mapping[str, Any], committed: Mapping[str, Any]) -> str | None:
    """What of the machines differs that ratios depend on; None where they may be compared."""
    then, now = committed["machine"], fresh["machine"]
    differ = [
        f"{key} {then.get(key, 'unknown')}, here {now.get(key, 'unknown')}"
        for key in ("processor", "cores", "devices")
        if then.get(key) != now.get(key)
    ]
    return ", ".join(differ) or None


def namesake(path: Path, fresh: Mapping[str, Any], committed: Path, *, anywhere: bool = False) -> Path:
    """The committed file to compare with: NAME.json or NAME.*.json of this machine's kind, or the file given.

    anywhere: NAME.json, whatever it was measured on. Raises Incomparable where there is none.
    """
    if committed.is_dir():
        found = [committed / path.name, *sorted(committed.glob(f"{path.stem}.*.json"))]
        found = [file for file in found if file.exists()]
    else:
        found = [committed]
    if not found:
        raise Incomparable(f"{path.name} has no committed namesake; commit it, or remove it")
    differ = {file: None if anywhere else other_machine(fresh, read_result(file)) for file in found}
    alike = [file for file, difference in differ.items() if difference is None]
    if not alike:
        kinds = "; ".join(f"{file.name}: {difference}" for file, difference in differ.items())
        raise Incomparable(
            f"nothing was measured on a machine of this kind ({kinds}); measure the commit before the change "
            f"here and give its file, commit this one as {path.stem}.KIND.json, or pass --other-machine"
        )
    return alike[0]


def pairs(
    fresh: Path, committed: Path, *, anywhere: bool = False
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, fresh, committed) of a file, or of every file of a directory; `committed` may be a directory."""
    for path in [fresh] if fresh.is_file() else sorted(fresh.glob("*.json")):
        result = read_result(path)
        yield path.stem, result, read_result(namesake(path, result, committed, anywhere=anywhere))


@guarded
def main(argv: Sequence[str]) -> int:
    """Compare, print a line a ratio; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__.splitlines()[0])
    parser.add_argument("fresh", type=Path)
    parser.add_argument("committed", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share that a ratio may fall")
    parser.add_argument("--other-machine", action="store_true", help="compare with NAME.json in any case")
    asked = parser.parse_args(argv)
    fallen = compared = 0
    for name, fresh, committed in pairs(asked.fresh, asked.committed, anywhere=asked.other_machine):
        if difference := other_machine(fresh, committed):
            print(f"{name}: another machine: {difference}")
        for ratio, fell, figures in compare(fresh, committed, asked.tolerance):
            print(f"{'FELL' if fell else 'held'}  {name}: {ratio}: {figures}")
            fallen, compared = fallen + fell, compared + 1
    if not compared:
        raise Incomparable(f"nothing to compare in {asked.fresh.name}; run make bench")
    print(f"{compared - fallen} of {compared} ratios held")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
