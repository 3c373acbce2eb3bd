"""A sha256 of every file of a checkpoint, listed in the checkpoint: `STEP/FILES.sha256`.

The list is what `sha256sum` writes, so `cd STEP && sha256sum -c FILES.sha256` checks a checkpoint anywhere.
It is made after the commit, by the primary, in the background (`artifacts.checkpoints.background`), and has
its name only once it is whole. A checkpoint without it is one whose run ended in between: its arrays have
their digests in the sealed record, and a restore that verifies those has the list made.
"""

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from artifacts.checkpoints.errors import CorruptCheckpoint
from common.files import file_digest, write_text

LIST = "FILES.sha256"
SMALL = 4 << 20  # bytes: what holds no arrays to speak of, checked at every restore
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def threads() -> int:
    """How many hash at once: a quarter of the cores, so that the loop hardly feels it."""
    return min(4, max(1, (os.cpu_count() or 1) // 4))


def files_of(directory: Path) -> list[str]:
    """Names of a checkpoint's files, as they stand in the list; without the list itself."""
    paths = (Path(top, name) for top, _, names in os.walk(directory) for name in names)
    found = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in found if not name.startswith((LIST, f".{LIST}")))


def list_files(directory: Path) -> dict[str, str]:
    """Hash the files of a committed checkpoint and write its list, whole or not at all."""
    names = files_of(directory)
    with ThreadPoolExecutor(threads()) as pool:
        listed = dict(zip(names, pool.map(lambda name: file_digest(directory / name), names), strict=True))
    write_text(directory / LIST, as_text(listed), durable=True)
    return listed


def as_text(listed: Mapping[str, str]) -> str:
    """The list's own text."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(listed.items()))


def parsed(text: str, where: str) -> dict[str, str]:
    """Name → sha256. Raises CorruptCheckpoint for what is no list, or leaves the checkpoint's directory."""
    listed = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2]) if match else None
        if match is None or name is None or name.is_absolute() or ".." in name.parts:
            raise CorruptCheckpoint(f"{where}: {LIST} was altered")
        listed[match[2]] = match[1]
    return listed


def read_list(directory: Path) -> dict[str, str] | None:
    """Name → sha256 as listed; None where no list was made. Raises CorruptCheckpoint where it was altered."""
    try:
        return parsed((directory / LIST).read_text("utf-8"), str(directory))
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise CorruptCheckpoint(f"{directory}: {LIST} was altered") from None


def bad_files(directory: Path, listed: Mapping[str, str], largest: int | None = None) -> dict[str, str]:
    """File → what is wrong with it: missing, not in the list, unreadable, or of another sha256.

    largest: leave the contents of files of more bytes alone.
    """
    here = set(files_of(directory))
    bad = {name: "is missing" for name in listed if name not in here}
    bad |= {name: "is not in the list" for name in here if name not in listed}

    def look(name: str) -> str | None:
        path = directory / name
        try:
            if largest is not None and path.stat().st_size > largest:
                return None
            return None if file_digest(path) == listed[name] else "is altered (sha256)"
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    names = sorted(here & set(listed))
    with ThreadPoolExecutor(threads()) as pool:
        verdicts = zip(names, pool.map(look, names), strict=True)
        bad |= {name: verdict for name, verdict in verdicts if verdict is not None}
    return dict(sorted(bad.items()))


def check_small_files(directory: Path) -> None:
    """Raise CorruptCheckpoint where a file is missing, added, or small and altered; nothing without a list.

    Large ones hold arrays, whose digests are taken where they arrive: to read them twice would cost a
    restore half its speed and find nothing more.
    """
    listed = read_list(directory)
    bad = bad_files(directory, listed, SMALL) if listed is not None else {}
    if bad:
        name, verdict = next(iter(bad.items()))
        raise CorruptCheckpoint(f"{directory}: {len(bad)} files are bad, first {name}, which {verdict}")
