"""Somebody else's shards: their sha256, taken once and remembered, so that a change in place is found.

The digest of a prepared directory is made of names and sizes, which a flipped byte does not change. So the
first start hashes every shard; later ones hash only those whose size or time of change differs.
"""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.files import file_digest, write_text
from data.cache import digest_of
from data.errors import DataError
from data.sources.documents import Say, silent


class ShardRecord:
    """What is known about the shards of one directory: kept in the cache, under the digest of its inputs."""

    def __init__(self, directory: Path, names: list[str], path: Path):
        self.directory, self.names, self.path = directory, names, path
        self._known = _load(path)

    def check(self, workers: int, say: Say = silent) -> None:
        """Hash what is new or was touched. Raises DataError where a shard that is held changed."""
        shards = self._known["shards"]
        stale = [name for name in self.names if shards.get(name, [None])[:2] != self._stat(name)]
        if not stale:
            return
        total = sum((self.directory / name).stat().st_size for name in stale) >> 20
        say(f"hashing {len(stale)} files of {self.directory} ({total} MB)")
        stats = [self._stat(name) for name in stale]  # before hashing: what is written meanwhile stays stale
        with ThreadPoolExecutor(workers) as pool:
            digests = list(pool.map(self._digest, stale))
        for name, stat, digest in zip(stale, stats, digests, strict=True):
            if self._known["prepared"] and name in shards and shards[name][2] != digest:
                raise DataError(
                    f"{self.directory / name} changed since it was prepared (its sha256 was "
                    f"{shards[name][2][:12]} and is {digest[:12]}); restore it, or, if the change is meant, "
                    "choose another data.cache_dir"
                )
            if name in shards and shards[name][2] != digest:
                self._known["read"] = []  # what was mended is read again
            shards[name] = [*stat, digest]
        self._save()

    def freeze(self) -> None:
        """Hold the shards to their sha256 from now on: something was made from them, or is read from them."""
        if not self._known["prepared"]:
            self._known["prepared"] = True
            self._save()

    def is_verified(self, split: str) -> bool:
        """Say whether `read(split)` was said of these shards as they are."""
        return split in self._known["read"]

    def mark_verified(self, split: str) -> None:
        """Remember that every record of a split has been read and found sound."""
        self._known["read"].append(split)
        self._save()

    def _stat(self, name: str) -> list[int]:
        found = (self.directory / name).stat()
        return [found.st_size, found.st_mtime_ns]

    def _digest(self, name: str) -> str:
        try:
            return file_digest(self.directory / name)
        except OSError as error:
            raise DataError(
                f"data.path: {self.directory / name} cannot be read ({error.strerror}); grant access or "
                "copy it again"
            ) from None

    def _save(self) -> None:
        known = {key: value for key, value in self._known.items() if key != "digest"}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(known | {"digest": digest_of(known)}), shared=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.path} cannot be written ({error}); free space or choose another"
            ) from None


def _load(path: Path) -> dict[str, Any]:
    """A record that is absent or broken is none: all is hashed again."""
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
        known = json.loads(path.read_text("utf-8"))
        if known.pop("digest") == digest_of(known):
            return known
    return {"shards": {}, "read": [], "prepared": False}
