"""`metrics.jsonl`: the record of a run, one JSON object a line, every training step exactly once.

Training rows have `step` (1-based) and `loss`; evaluation rows have `step` and `eval/loss`. Numbers are
written with the shortest digits that give the same float64 back, so a float32 survives exactly. JSON has no
non-finite numbers: they are the strings "nan", "inf" and "-inf", which `MetricsLog.read` turns back.

Durability: a row is one unbuffered `write`, so it outlives the process the moment `write` returns. It is safe
from the machine's end only after `sync`; an fsync each step would cost more than many a step does, and rows
above the last checkpoint are redone anyway. So `sync` is called before a checkpoint commits: then none
is ever ahead of its rows.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import RunFault
from common.files import replacing, sync

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of `metrics.jsonl`, newline included. Values: numbers, strings, None, or 0-d arrays."""
    assert isinstance(row.get("step"), int), f"a row needs an integer step: {dict(row)}"
    text = json.dumps({key: json_value(value) for key, value in row.items()}, allow_nan=False)
    return text.encode() + b"\n"


def json_value(value: Any) -> Any:
    """A number as JSON can hold it: 0-d arrays as numbers, non-finite ones as strings; others as they are."""
    if hasattr(value, "item"):  # numpy and JAX scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def decode_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line, or None where it is torn or no row (a prefix of an object is never an object)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


class MetricsLog:
    """An append-only log, cut back on opening to what the checkpoint that we resume from has seen.

    `missing` counts the training steps up to the checkpoint without a row (0 unless the file was damaged or
    deleted): the caller says so, nobody invents rows.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str], resume_step: int = 0) -> "MetricsLog":
        """Drop every row above `resume_step` and every torn line, then append; 0 begins anew.

        The cut is a rewrite beside the file and a rename, so a crash within it loses nothing. Raises OSError.
        """
        path = Path(path)
        steps = _cut(path, resume_step) if path.exists() else 0
        return cls(path, missing=resume_step - steps)

    def __init__(self, path: Path, missing: int = 0):
        self.path, self.missing = path, missing
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size
        sync(path.parent)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row whole, or raise RunFault and leave the file as it was."""
        line = encode_row(row)
        try:
            written = os.write(self._fd, line)
            while written < len(line):  # a nearly full disk takes a part, then says no
                written += os.write(self._fd, line[written:])
        except OSError as error:
            self._undo()
            raise RunFault(self._complaint("write", error)) from error
        self._size += len(line)

    def sync(self) -> None:
        """Return once every row is on the disk; call before a checkpoint commits. Raises RunFault."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise RunFault(self._complaint("sync", error)) from error

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """All rows, torn lines left out; safe while a run is writing. Raises OSError."""
        return [row for _, row in _rows(Path(path))]

    def _undo(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            pass  # the torn line stays; the next `open` drops it

    def _complaint(self, what: str, error: OSError) -> str:
        return (
            f"cannot {what} {self.path}: {error.strerror}; free space or fix the disk, "
            "then run the same command again to resume"
        )


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as lines:
        for line in lines:
            row = decode_row(line)
            if row is not None:
                yield line.rstrip(b"\r\n") + b"\n", row


def _cut(path: Path, resume_step: int) -> int:
    """Keep what `resume_step` has seen and return how many training steps that is."""
    seen: set[tuple[int, str]] = set()
    with replacing(path, durable=True) as aside, aside.open("wb") as kept:
        for line, row in _rows(path):
            key = (row["step"], "loss" if "loss" in row else " ".join(row))
            # Nothing of a run that begins anew is kept, not even an evaluation at step 0.
            if 0 < resume_step and row["step"] <= resume_step and key not in seen:
                seen.add(key)
                kept.write(line)
    return sum(kind == "loss" and 1 <= step for step, kind in seen)
