"""TFDS's shuffle with bounded memory and without TensorFlow: the same order, byte for byte.

TFDS sorts records by the hash of their key. Up to 1 GB it does so in memory; past that it spills into files
that it opens through TensorFlow, which is not here. `bounded_shuffle` puts in its place one that spills
plain files from BUFFER bytes on, and splits any of them that is larger than BUFFER.
"""

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUFFER = 48 << 20  # bytes held in memory, what Python needs for each record included
OBJECTS = 200  # of them, for the objects of a record
HEAD = struct.Struct(">16sQ")  # a record's hash, then its size


class Shuffler:
    """What TFDS's writer asks of `tfds.core.shuffle.Shuffler`."""

    def __init__(
        self, dirpath: Any, hash_salt: Any, disable_shuffling: bool = False, ignore_duplicates: bool = False
    ):
        from tensorflow_datasets.core import hashing

        self._directory = Path(dirpath)
        # Where a dataset keeps its order, its keys are integers and stand for themselves.
        self._hash = int if disable_shuffling else hashing.Hasher(hash_salt).hash_key
        self._seen: set[bytes] | None = set() if ignore_duplicates else None
        self._buffer: list[tuple[bytes, bytes]] = []
        self._buckets: _Buckets | None = None
        self.size = 0
        self.num_examples = 0

    @property
    def bucket_lengths(self) -> list[int]:
        """How many records each bucket has: TFDS only needs the sum."""
        return [self.num_examples]

    def add(self, key: Any, data: bytes) -> None:
        """Take a record."""
        record = (self._hash(key).to_bytes(16, "big"), data)
        if self._seen is not None:
            if record[0] in self._seen:
                return
            self._seen.add(record[0])
        self.size += len(data)
        self.num_examples += 1
        if self._buckets is None:
            self._buffer.append(record)
            if self.size + self.num_examples * OBJECTS <= BUFFER:
                return
            self._buckets = _Buckets(self._directory / f".shuffle-{id(self)}", 0)
            for one in self._buffer:
                self._buckets.add(*one)
            self._buffer = []
        else:
            self._buckets.add(*record)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        from tensorflow_datasets.core import shuffle

        before, previous = b"", b""  # no hash is empty
        for key, data in self._buckets or sorted(self._buffer):
            if key == before:
                raise shuffle.DuplicatedKeysError(data, previous)
            before, previous = key, data
            yield int.from_bytes(key, "big"), data


class _Buckets:
    """Records in 256 files by byte `depth` of their hash; iterating sorts one file after the other."""

    def __init__(self, directory: Path, depth: int):
        self._directory, self._depth = directory, depth
        self._files: dict[int, Any] = {}
        self._counts: Counter[int] = Counter()
        directory.mkdir()

    def add(self, key: bytes, data: bytes) -> None:
        bucket = key[self._depth]
        if bucket not in self._files:
            self._files[bucket] = open(self._directory / f"{bucket:03d}", "wb")
        self._files[bucket].write(HEAD.pack(key, len(data)))
        self._files[bucket].write(data)
        self._counts[bucket] += 1

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        for file in self._files.values():
            file.close()
        for bucket in sorted(self._files):
            path = self._directory / f"{bucket:03d}"
            # One record cannot be split. At the sixteenth byte all that is left has one hash, which is an
            # error that the caller finds.
            if path.stat().st_size > BUFFER and self._counts[bucket] > 1 and self._depth < 15:
                finer = _Buckets(self._directory / f"{bucket:03d}.d", self._depth + 1)
                for key, data in _records(path):
                    finer.add(key, data)
                path.unlink()
                yield from finer
            else:
                yield from sorted(_records(path))
                path.unlink()
        self._directory.rmdir()


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with open(path, "rb") as file:
        while head := file.read(HEAD.size):
            key, size = HEAD.unpack(head)
            yield key, file.read(size)


@contextlib.contextmanager
def bounded_shuffle() -> Iterator[None]:
    """Let TFDS's writer shuffle with `Shuffler` while it prepares a dataset."""
    from tensorflow_datasets.core import shuffle

    original = shuffle.Shuffler
    shuffle.Shuffler = Shuffler
    try:
        yield
    finally:
        shuffle.Shuffler = original
