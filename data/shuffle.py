"""The shuffling of a TFDS build in bounded memory, and without TensorFlow.

TFDS keeps up to 1 GB of a split in memory before it turns to files, and those it writes through TensorFlow.
This stands in for its `Shuffler` while a corpus of ours is built: the same order, by the hash of each key.
"""

import contextlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELD_BYTES = 48 << 20  # examples kept in memory, with what Python needs for them
OBJECTS = 200  # bytes of Python objects for each
BUCKETS = 1024  # files past that, each sorted in memory by itself: 1 GB of a split of 1 TB
HEAD = struct.Struct("<16sQ")  # of an example in a file: hash and length


class Shuffler:
    """Takes (key, example), gives back (hash, example) in the order of the hashes."""

    def __init__(self, dirpath: Any, hash_salt: Any, *_: Any, **__: Any):
        from tensorflow_datasets.core import hashing

        self._hasher = hashing.Hasher(hash_salt)
        self._place = Path(dirpath)
        self._directory: Path | None = None  # of the files, once there are any
        self._held: list[tuple[int, bytes]] = []
        self._held_bytes = 0
        self.size = 0
        self.num_examples = 0

    @property
    def bucket_lengths(self) -> list[int]:
        """Return what TFDS lists its examples by: here they are in one piece."""
        return [self.num_examples]

    def add(self, key: Any, data: bytes) -> bool:
        """Take an example."""
        self._held.append((self._hasher.hash_key(key), data))
        self.size += len(data)
        self.num_examples += 1
        self._held_bytes += len(data) + OBJECTS
        if self._held_bytes > HELD_BYTES:
            self._spill()
        return True

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        if self._directory is None:
            yield from sorted(self._held)
            return
        self._spill()
        for bucket in range(BUCKETS):
            yield from sorted(self._read(self._directory / str(bucket)))
        self._directory.rmdir()

    def _spill(self) -> None:
        """Append what is held to the files, in order of hash, so that each is opened once."""
        self._held.sort()
        self._directory = self._directory or Path(tempfile.mkdtemp(dir=self._place, prefix=".shuffle-"))
        with contextlib.ExitStack() as stack:
            last, file = -1, None
            for key, data in self._held:
                bucket = key * BUCKETS >> 128
                if bucket != last or file is None:
                    stack.close()
                    last, file = bucket, stack.enter_context(open(self._directory / str(bucket), "ab"))
                file.write(HEAD.pack(key.to_bytes(16, "big"), len(data)))
                file.write(data)
        self._held, self._held_bytes = [], 0

    def _read(self, path: Path) -> Iterator[tuple[int, bytes]]:
        if not path.exists():
            return
        with open(path, "rb") as file:
            while head := file.read(HEAD.size):
                key, size = HEAD.unpack(head)
                yield int.from_bytes(key, "big"), file.read(size)
        path.unlink()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Have TFDS shuffle by this instead of its own, in this process."""
    from tensorflow_datasets.core import shuffle

    own = shuffle.Shuffler
    shuffle.Shuffler = Shuffler
    try:
        yield
    finally:
        shuffle.Shuffler = own
