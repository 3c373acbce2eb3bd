"""Sums and differences, whose answers can be verified: `python scripts/make_arithmetic.py sums.jsonl`.

    FILE.jsonl   where records {"prompt": "17+25=", "completion": "42"} go
    count=10000  how many, all of them different
    digits=2     of the numbers, at the most
    seed=0       which

For data.format=completion: objective=sft first, then objective=grpo with reward=number. The same arguments
write the same bytes. Exit status: 0 done, 2 bad input.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import command

from common.checks import require
from scripts.command import run

DEFAULTS = {"count": 10000, "digits": 2, "seed": 0}


def records(count: int, digits: int, seed: int) -> list[dict[str, str]]:
    """So many different ones in random order. ValueError where there are not twice as many."""
    most = 10 ** (2 * digits)
    require(1 <= digits <= 9, "digits", digits, "from 1 to 9")
    require(1 <= count <= most, "count", count, f"from 1 to {most} with digits={digits}")
    draw, found = random.Random(seed), dict[tuple[int, int, str], None]()
    while len(found) < count:
        a, b = draw.randrange(10**digits), draw.randrange(10**digits)
        found[a, b, draw.choice("+-")] = None
    return [
        {"prompt": f"{a}{sign}{b}=", "completion": str(a + b if sign == "+" else a - b)}
        for a, b, sign in found
    ]


def write(arguments: Sequence[str]) -> int:
    """Write the file that is named. Raises ValueError for what it cannot be told, OSError."""
    file, *words = arguments or [""]
    values = dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        if key not in values or not value.isdecimal():
            raise ValueError(f"{word}: give a whole number for one of {', '.join(values)}, as in count=500")
        values[key] = int(value)
    if not file.endswith(".jsonl"):
        raise ValueError("give the file to write, as in: make_arithmetic.py sums.jsonl digits=2")
    made = records(**values)
    Path(file).write_text("".join(f"{json.dumps(one)}\n" for one in made), encoding="utf-8")
    print(f"{file}: {len(made):,} sums and differences of numbers of up to {values['digits']} digits")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(write, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
