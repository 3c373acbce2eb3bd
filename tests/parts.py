"""Parts of the suite, of which each commit runs one: after N commits in a row every test has run.

What is in a part is decided by a hash of its name, so that neither its neighbours nor their number move it.
A part of 2N lies in one of N: a slow machine may take half of its part and miss nothing for good.
"""

import zlib


def part_of(name: str, count: int) -> int:
    """The part of `count`, from 1, in which this is."""
    return zlib.crc32(name.encode()) % count + 1


def read_part(text: str) -> tuple[int, int]:
    """(part, count) of `--part 3/4`. Raises ValueError where there is no such part."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f"--part {text} is no part; use K/N with K from 1 to N, as in 3/4")
    return int(part), int(count)


def unit(item) -> str:
    """What stays together: a file, which shares what it compiles, but each case of the matrix by itself."""
    return item.nodeid if item.get_closest_marker("matrix") else item.nodeid.partition("::")[0]
