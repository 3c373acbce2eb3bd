"""The lines of a file of records, compressed or not, to its very end, and the JSON of one."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError

BYTE_ORDER_MARK = "\ufeff"  # what Windows begins a file with: a signature, no text (Unicode 23.8)
ZSTD_CHUNK = 1 << 12  # a block of 128 KB may be 4 bytes, so that these become 128 MB at the very most
ZSTD_WINDOW = 1 << 27  # bytes: what zstd itself holds unless --long says more


class LongInteger:
    """A whole number of more digits than Python converts: whoever needs its value refuses it by this name."""


def file_lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines. Raises DataError where it is unreadable, truncated or corrupt."""
    try:
        if path.suffix == ".zst":
            yield from _split(_zstd_text(path))
        else:
            with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
                yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"data.path: {path} is truncated or corrupt ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(unreadable(path, error)) from None


def unreadable(path: Path | str, error: OSError) -> str:
    """Return the line for a file that the system does not give."""
    return f"data.path: {path} cannot be read ({error.strerror or error}); grant access or move it away"


def load_json(text: str) -> Any:
    """Return what `json.loads` does, a `LongInteger` in place of each whole number that it refuses.

    JSON has no limit for their digits (RFC 8259, section 6), and corpora of mathematics and code need none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | LongInteger:
    try:
        return int(digits)
    except ValueError:
        return LongInteger()


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a text that comes in pieces into lines."""
    begun: list[bytes] = []
    for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end, b"\n"])
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _zstd_text(path: Path) -> Iterator[bytes]:
    """Yield what the frames of a .zst file hold, each to its last block: zstandard's own reader takes the end
    of a file for that of a frame.
    """
    import zstandard  # only this format needs it

    try:
        with open(path, "rb") as file:
            rest = b""
            while rest := rest + file.read(ZSTD_CHUNK):
                _check_frame(path, zstandard.get_frame_parameters(rest))
                frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
                while not frame.eof:
                    if not rest:
                        raise EOFError("it ends within a frame")
                    yield frame.decompress(rest)
                    rest = frame.unused_data or file.read(ZSTD_CHUNK)
    except zstandard.ZstdError as error:
        raise EOFError(error) from None


def _check_frame(path: Path, frame: Any) -> None:
    """Raise DataError where a sound frame cannot be read for want of memory or of its dictionary."""
    if frame.window_size > ZSTD_WINDOW:
        raise DataError(
            f"data.path: {path} needs a window of {frame.window_size >> 20} MB, where {ZSTD_WINDOW >> 20} MB "
            "are held; compress it again without --long"
        )
    if frame.dict_id:
        raise DataError(
            f"data.path: {path} needs the zstd dictionary {frame.dict_id}, which is not in it; compress it "
            "again without one"
        )
