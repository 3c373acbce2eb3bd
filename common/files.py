"""Files that are whole or absent, what they hash to, and who may write beside them."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it becomes `path` when all is well, and is removed otherwise.

    durable: return once file and name are on the disk. shared: several processes may write it at once, each
    to a name of its own; a single writer has always the same, so that kills do not heap up leftovers.
    """
    own = f".{os.urandom(8).hex()}" if shared else ""
    aside = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield aside
        if durable:
            sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)  # a new name is on the disk only after its directory is


def write_text(path: Path, text: str, *, durable: bool = False, shared: bool = False) -> None:
    """Write a file in UTF-8, whole or not at all; see `replacing`."""
    with replacing(path, durable=durable, shared=shared) as aside:
        aside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Return once a file, or the names in a directory, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def text_digest(text: str) -> str:
    """The sha256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path, *, wait: bool) -> int:
    """Hold a lock file until the descriptor that is returned is closed, or the process ends, however it does.

    Raises BlockingIOError where another process has it and this one shall not `wait`, OSError where it cannot
    be made or its file system has no locks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(fd)
        raise
    return fd
