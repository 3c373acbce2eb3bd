"""TFRecord through the extra `tensorflow`: read by a child process, so that the trainer never imports it."""

import importlib.util
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError

READER = Path(__file__).with_name("tfrecord_reader.py")
SIZE = struct.Struct("<Q")
END, BROKEN = 2**64 - 1, 2**64 - 2  # what tfrecord_reader.py writes in a size's place


def need_tensorflow(directory: Path) -> None:
    """Raise DataError with the command that installs TensorFlow where it is absent."""
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"data.path={directory} is stored as tfrecord; prepare it with file_format=array_record, which "
            "is read without TensorFlow, or install what reads it: pip install -e '.[tensorflow]'"
        )


class TFRecordReader:
    """`with TFRecordReader() as reader: reader.read(path)`, one child process for all files."""

    def __enter__(self) -> "TFRecordReader":
        self._said = tempfile.TemporaryFile()
        # -P: the script's own directory has modules whose names others use as well.
        command = [sys.executable, "-P", str(READER)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said)
        return self

    def __exit__(self, *error: object) -> None:
        self._child.kill()
        self._child.communicate()
        self._said.close()

    def read(self, path: Path) -> Iterator[bytes]:
        """Yield a file's records, their checksums verified. Raises ValueError where one fails or is cut."""
        stdin = self._child.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(str(path.absolute())).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._died(path) from None
        while (size := self._size(path)) != END:
            if size == BROKEN:
                said = self._bytes(path, self._size(path)).decode(errors="replace")
                raise ValueError(f"{path.name}: {said.splitlines()[0][:200]}")
            yield self._bytes(path, size)

    def _size(self, path: Path) -> int:
        return SIZE.unpack(self._bytes(path, SIZE.size))[0]

    def _bytes(self, path: Path, size: int) -> bytes:
        assert self._child.stdout is not None
        found = self._child.stdout.read(size)
        if len(found) < size:
            raise self._died(path)
        return found

    def _died(self, path: Path) -> ValueError:
        self._child.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines() or ["no word of it"]
        return ValueError(f"the reader died at {path.name}: {lines[-1][:200]}")
