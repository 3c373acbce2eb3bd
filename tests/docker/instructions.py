"""The Dockerfile as instructions, and the context that .dockerignore leaves of a directory."""

import io
import json
import re
import shlex
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Stage:
    """What a FROM begins: instructions in order, as (name, value), variables in them not yet filled in."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their defaults, and the stages."""
    given: dict[str, str] = {}
    found: list[Stage] = []
    for item in DockerfileParser(fileobj=io.BytesIO(text.encode())).structure:
        name, value = item["instruction"], item["value"]
        if name == "COMMENT":
            continue
        if name == "FROM":
            base, _, alias = value.partition(" AS ")
            found.append(Stage(alias.strip() or str(len(found)), base.strip()))
        elif found:
            found[-1].steps.append((name, value))
        else:
            assert name == "ARG", name
            given |= dict([pair(value)])
    return given, found


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE; the value may be missing."""
    name, _, value = text.partition("=")
    return name.strip(), value.strip()


def pairs(text: str) -> dict[str, str]:
    """NAME=VALUE words of an ENV or LABEL, quotes taken off."""
    return dict(pair(word) for word in shlex.split(text))


def filled(text: str, values: dict[str, str]) -> str:
    """$NAME and ${NAME} replaced; KeyError for one that is not known."""
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: values[m[1] or m[2]], text)


def words(text: str) -> list[str]:
    """The exec form of an ENTRYPOINT or CMD."""
    found = json.loads(text)
    assert isinstance(found, list)
    return found


def context(root: Path = ROOT) -> list[Path]:
    """Files that `docker build` would see, relative to `root`: the last pattern that fits a path decides."""
    lines = (root / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    files = (path for path in root.rglob("*") if path.is_file() and ".venv" not in path.parts)
    return sorted(path.relative_to(root) for path in files if kept(path.relative_to(root), patterns))


def kept(path: Path, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves this one; a pattern that fits a directory fits all below it."""
    ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if any(fits(str(part), wanted) for part in (path, *path.parents)):
            ignored = not pattern.startswith("!")
    return not ignored


def fits(path: str, pattern: str) -> bool:
    """`*` stays within a directory, `**/` is any number of them."""
    if pattern.startswith("**/"):
        return fnmatch(path.rsplit("/", 1)[-1], pattern[3:])
    return path.count("/") == pattern.count("/") and path != "." and fnmatch(path, pattern)
