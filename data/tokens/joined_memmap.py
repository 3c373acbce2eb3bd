"""Any number of files as one array: mapped into memory beside each other, never copied."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from data.errors import DataError

ALIGN = 1 << 16  # entries; each file begins at a multiple, which is one of every system's page size as well
MAP_FIXED = 0x10  # of Linux, macOS and the BSDs; Python's mmap does not name it


def first_entries(counts: Sequence[int]) -> list[int]:
    """Return where each file of `counts` entries begins in the array that `mapped` gives."""
    firsts, end = [], 0
    for count in counts:
        firsts.append(end)
        end += -(-count // ALIGN) * ALIGN
    return firsts


def mapped(paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype) -> Integer[np.ndarray, " N"]:
    """Return the files, of `counts` entries each, as one read-only array: an ordinary memmap where it is one.

    Several lie in one stretch of addresses, file i from entry `first_entries(counts)[i]` on; the few entries
    between a file's end and the next one's beginning belong to nobody. So an address is an index, and reading
    by index costs what it costs in a single file.
    """
    if len(paths) == 1:
        return np.memmap(paths[0], dtype=dtype, mode="r")
    firsts = first_entries(counts)
    size = (firsts[-1] + counts[-1]) * dtype.itemsize
    # Reserved first, so that nothing else of this process comes between; it goes when the array goes.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    region = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
    array = np.frombuffer(region, dtype=dtype)
    for path, count, first in zip(paths, counts, firsts, strict=True):
        _place(path, count * dtype.itemsize, array.ctypes.data + first * dtype.itemsize)
    return array


def _place(path: Path, size: int, address: int) -> None:
    place = ctypes.CDLL(None, use_errno=True).mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    file = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(file).st_size != size:  # past a file's end a mapping kills the process that reads it
            raise DataError(f"{path} has not the {size} bytes that it had; delete it to build it again")
        if place(address, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, file, 0) != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(file)
