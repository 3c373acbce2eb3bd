"""Arrays of a directory in safetensors files, by name: read as views of the files, written one at a time.

A file is 8 bytes of length, a JSON table {name: {dtype, shape, data_offsets}}, and the arrays. As views
nothing is read but what is touched, so that a process of many takes its part of each array and no more; the
format's own library gives whole arrays or slices along their first dims, and writes a file from memory.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interop.places import Place, size_of, view

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KINDS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(kind): name for name, kind in KINDS.items()}
SCALES, BLOCK = "_scale_inv", 128  # what the scales of an array's blocks are called, and how wide they are
LARGEST_HEADER = 100 << 20  # bytes; the format's own limit
SHARD = 5 * 10**9  # bytes of arrays in a file, as others write them


class Tensors:
    """The arrays of a directory, or of one file; `[name]` is a view of its file."""

    def __init__(self, path: Place):
        """Raises ValueError, naming the file, for what is no such directory or is cut short."""
        self.path = path
        self.entries: dict[str, tuple[Place, np.dtype[Any], tuple[int, ...], int]] = {}
        index = path / INDEX
        if path.is_file():
            files: dict[str, list[str] | None] = {path.name: None}
        elif index.is_file():
            files = _of_index(index)
        else:
            files = {SINGLE: None}
        home = path if path.is_dir() else path.parent
        for name, wanted in files.items():
            found = dict(_table(home / name))
            if wanted is not None and (other := set(wanted) ^ set(found)):
                raise ValueError(f"{home / name} and {INDEX} disagree about {sorted(other)[0]}")
            if twice := self.entries.keys() & found.keys():
                raise ValueError(f"{home} holds {sorted(twice)[0]} twice")
            self.entries |= found

        for name in set(self.entries) - set(self):
            self._check_scales(name.removesuffix(SCALES), name)
        # Devices ask for their parts of an array one after another, and a pair's two in turn.
        self._scaled = lru_cache(maxsize=2)(self._scale)

    def __iter__(self) -> Iterator[str]:
        """Names of arrays; scales of another's blocks are a part of that."""
        return (
            n for n in self.entries if not (n.endswith(SCALES) and n.removesuffix(SCALES) in self.entries)
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """A view [shape], or float32 where its blocks have scales; ValueError where there is none."""
        return self._scaled(name) if name + SCALES in self.entries else self._view(name)

    def _check_scales(self, name: str, scales: str) -> None:
        shape, there = self.entries[name][2], self.entries[scales][2]
        if there != (wanted := tuple(-(-size // BLOCK) for size in shape)):
            raise ValueError(
                f"{self.path}: {scales} is {list(there)}; of {list(shape)} it must be {list(wanted)}"
            )

    def _scale(self, name: str) -> np.ndarray:
        """An array [out, in] of which each block of 128 x 128 has a scale (DeepSeek-V3, arXiv:2412.19437)."""
        array, scales = self._view(name), np.asarray(self._view(name + SCALES), np.float32)
        for dim, size in enumerate(array.shape):
            scales = np.repeat(scales, BLOCK, axis=dim).take(np.arange(size), axis=dim)
        return array.astype(np.float32) * scales

    def _view(self, name: str) -> np.ndarray:
        if name not in self.entries:
            raise ValueError(f"{self.path} has no {name}")
        path, dtype, shape, offset = self.entries[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return view(path, dtype, offset, shape)


def _of_index(index: Place) -> dict[str, list[str] | None]:
    try:
        where = json.loads(index.read_text("utf-8"))["weight_map"]
        files: dict[str, Any] = {}
        for name, file in where.items():
            files.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of arrays; fetch it again") from error
    for file in files:
        if os.path.basename(file) != file:
            raise ValueError(f"{index} names {file}, which is not beside it")
    return files


def _table(path: Place) -> Iterator[tuple[str, tuple[Place, np.dtype[Any], tuple[int, ...], int]]]:
    try:
        with path.open("rb") as file:
            size = size_of(path)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError("its table is cut short")
            table = json.loads(file.read(length))
        begin = 8 + length
        end = 0
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if kind not in KINDS:
                raise ValueError(f"{name} is {kind}, which is not supported")
            dtype = np.dtype(KINDS[kind])
            if last - first != math.prod(shape) * dtype.itemsize or first < 0:
                raise ValueError(f"{name} has {last - first} bytes for {list(shape)} of {kind}")
            end = max(end, last)
            yield name, (path, dtype, shape, begin + first)
        if begin + end != size:
            raise ValueError(f"it has {size} bytes and its table says {begin + end}")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, struct.error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error


def write_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: Any,
    shard: int = SHARD,
) -> list[str]:
    """Write arrays [shape] as they come, as `dtype`, in files of at most `shard` bytes; the files' names.

    shapes: of all that will come, in any order; each array lies where the tables say before any has come.
    dtype: of all, or of each by name.
    """
    own = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    kinds = {name: np.dtype(own[name]) for name in shapes}
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes, key=_in_order):
        bytes_of = math.prod(shapes[name]) * kinds[name].itemsize
        if groups[-1] and size + bytes_of > shard:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_of
    many = len(groups) > 1
    files = [
        f"model-{i + 1:05}-of-{len(groups):05}.safetensors" if many else SINGLE for i in range(len(groups))
    ]
    places: dict[str, tuple[Path, int]] = {}
    for file, names in zip(files, groups, strict=True):
        places |= _begin(directory / file, {name: shapes[name] for name in names}, kinds)
    missing = set(shapes)
    for name, array in arrays:
        assert array.shape == shapes[name] and name in missing, (name, array.shape)
        path, offset = places[name]
        with path.open("r+b") as out:
            out.seek(offset)
            out.write(buffer_of(array.astype(kinds[name])))
        missing.remove(name)
    assert not missing, missing
    if many:
        total = sum(math.prod(shape) * kinds[name].itemsize for name, shape in shapes.items())
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        (directory / INDEX).write_text(text + "\n", "utf-8")
    return files


def buffer_of(array: np.ndarray) -> memoryview:
    """What an array holds, of whatever dtype: Python's buffers know nothing of bfloat16."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _in_order(name: str) -> list[Any]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _begin(
    path: Path, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, np.dtype[Any]]
) -> dict[str, tuple[Path, int]]:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * kinds[name].itemsize
        table[name] = {"dtype": NAMES[kinds[name]], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    start = 8 + len(text)
    return {name: (path, start + table[name]["data_offsets"][0]) for name in shapes}
