"""Directories that are whole or absent: built aside, listed with checksums, renamed into place.

Every cached thing (documents, tokenizer, token stores) is one directory named by the hash of its inputs, with
a `manifest.json` of the sha256 of every file in it. Nobody meets a half-built one: it becomes visible by one
rename.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import file_digest, lock, text_digest
from data.errors import DataError

FORMAT = 1  # raise it when the layout of any cached directory changes
MANIFEST = "manifest.json"


class CorruptCache(DataError):
    """A cached directory whose files are not those that its manifest lists."""


class Stopped(DataError):
    """Work that broke off for a reason outside of the corpus: what is finished can be gone on with."""


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a json-able value, whatever the order of its keys."""
    return text_digest(json.dumps(value, sort_keys=True))


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache for this process; the next one waits and then finds the work done."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = lock(root / ".lock", wait=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={root} cannot be written ({error.strerror}); choose another"
        ) from None
    try:
        _sweep(root)
        yield
    finally:
        os.close(held)


def _sweep(root: Path) -> None:
    """Remove what killed preparations left; only the lock's holder may, since nobody else builds."""
    for leftover in root.glob("*/.building-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def building(final: Path, description: dict[str, Any]) -> Iterator[Path]:
    """Yield a directory to fill; on success list it in its manifest and rename it to `final`, else remove it.

    `description` is stored under "about"; entries added to it while building are kept too.
    """
    aside = final.with_name(f".building-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _becoming(aside, final, description):
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def resuming(final: Path, description: dict[str, Any]) -> Iterator[Path]:
    """Like `building`, but what is in the directory stays when work breaks off, and the next one goes on.

    Whoever fills it must know again what of it is finished. It is removed where the work cannot ever be done:
    at a DataError about the corpus, unlike one about this machine (`Stopped`, OSError).
    """
    aside = final.with_name(f".partial-{final.name}")
    try:
        with _becoming(aside, final, description):
            yield aside
    except Stopped:
        raise
    except DataError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def _becoming(aside: Path, final: Path, description: dict[str, Any]) -> Iterator[None]:
    try:
        aside.mkdir(parents=True, exist_ok=True)
        yield
        _write_manifest(aside, description)
        shutil.rmtree(final, ignore_errors=True)  # only ever a directory that failed verification
        os.replace(aside, final)
    except OSError as error:
        raise Stopped(
            f"data.cache_dir: {final} cannot be written ({error}); free space or choose another"
        ) from error


def _write_manifest(directory: Path, description: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(directory)): {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "about": description, "files": files}
    # The manifest says its own digest, so that a flipped bit in a count is found as well.
    manifest["digest"] = digest_of(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")


def verify(directory: Path, *, contents: bool = True) -> dict[str, Any]:
    """Check every file against the manifest and return its "about".

    Without `contents` only names and sizes: for processes that follow one which has read it all. Raises
    CorruptCache, naming the first file that is missing, of another size or of other content.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        said = manifest.pop("digest")
        listed = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise CorruptCache(
            f"{directory / MANIFEST} is missing or broken; delete {directory} to build it again"
        ) from None
    if said != digest_of(manifest):
        raise CorruptCache(f"{directory / MANIFEST} was changed; delete {directory} to build it again")
    for name, entry in listed:
        path = directory / name
        if not path.is_file():
            raise CorruptCache(f"{path} is missing; delete {directory} to build it again")
        if path.stat().st_size != entry["bytes"] or (contents and file_digest(path) != entry["sha256"]):
            raise CorruptCache(
                f"{path} is corrupt: its sha256 is not the manifest's; delete {directory} to build it again"
            )
    return manifest["about"]
