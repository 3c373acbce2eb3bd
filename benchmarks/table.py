"""Put what benchmarks/results/*.json say into docs/performance.md.

    python -m benchmarks.table            # rewrite the tables
    python -m benchmarks.table --check    # exit status 1 where the page says something else

The page has a pair of comments for each result, and everything between them is made here:

    <!-- results: versus_torch --> ... <!-- /results -->

A result that is not there says "not yet measured". `<!-- results: * -->` takes those that no other comment
names. The table is the result's own (`benchmarks/measure.py`, write_result); without one, its figures.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, as_table, guarded, read_result

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
MISSING = "*Not yet measured.*"


def rewritten(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with every block as the results have it. Raises ValueError where a result has no place."""
    named = {match[2] for match in BLOCK.finditer(page)}
    others = sorted(set(results) - named)
    if others and "*" not in named:
        raise ValueError(f"{others[0]} has no place in the page; add <!-- results: {others[0]} -->")

    def block(match: re.Match[str]) -> str:
        names = others if match[2] == "*" else [match[2]]
        parts = [section(name, results[name]) if name in results else MISSING for name in names]
        return match[1] + "\n\n".join(parts) + ("\n" if parts else "") + match[3]

    return BLOCK.sub(block, page)


def section(name: str, result: Mapping[str, Any]) -> str:
    """Title, table, and on what it was measured."""
    table = result.get("table") or [{"figure": key, "value": value} for key, value in figures(result)]
    parts = [f"**{result.get('title', name)}**", as_table(table)]
    parts += [result["note"]] if "note" in result else []
    parts += [f"*{machine_line(result['machine'])}*"] if "machine" in result else []
    return "\n\n".join(parts)


def figures(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every number and text, apart from the machine."""
    for key, value in result.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and name != "machine":
            yield from figures(value, name)
        elif isinstance(value, (int, float, str)) and key not in ("title", "note", "benchmark"):
            yield name, value


def machine_line(machine: Mapping[str, Any]) -> str:
    """One sentence for the reader who wants to know whether his own is alike."""
    flags = f" ({', '.join(machine['flags'])})" if machine.get("flags") else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    devices = f"; {machine['devices']}" if "cpu" not in machine.get("devices", "cpu") else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{flags}, {machine['memory_gib']:g} GiB{devices}; "
        f"{machine['os']}, Python {machine['python']}, {versions}"
    )


def read_all(directory: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every committed result, by its name."""
    return {path.stem: read_result(path) for path in sorted(directory.glob("*.json"))}


@guarded
def main(argv: Sequence[str]) -> int:
    """Rewrite or check; the exit status."""
    page = PAGE.read_text("utf-8")
    new = rewritten(page, read_all())
    if list(argv) == ["--check"]:
        return int(new != page)
    PAGE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
