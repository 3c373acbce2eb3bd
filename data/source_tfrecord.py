"""TFRecord through the extra `tensorflow`: read by a child process, so that the trainer never imports it."""

import importlib.util
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError

READER = Path(__file__).with_name("tfrecord_reader.py")
SIZE = struct.Struct("<Q")
END = 2**64 - 1


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
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(f"{path.absolute()}\n".encode())
            child.stdin.flush()
        except BrokenPipeError:
            raise self._died(path) from None
        while True:
            head = child.stdout.read(SIZE.size)
            size = SIZE.unpack(head)[0] if len(head) == SIZE.size else None
            if size == END:
                return
            record = child.stdout.read(size) if size is not None else b""
            if size is None or len(record) < size:
                raise self._died(path)
            yield record

    def _died(self, path: Path) -> ValueError:
        self._child.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines() or ["the reader died"]
        return ValueError(f"{path.name}: {lines[-1][:200]}")
