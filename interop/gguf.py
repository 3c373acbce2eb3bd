"""A GGUF file, both ways: what it says of itself, and its arrays by name, made from blocks when asked for.

The format (version 3, little-endian): counts of arrays and of values, the values with their types, the table
of the arrays, and behind it the arrays, each at a multiple of the alignment. Blocks are what llama.cpp stores
quantized weights in: so many numbers of a row, and the scale that they share. The format's own package would
be one dependency more and is no shorter to use: it has neither views by name nor a writer array by array.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from interop.places import Place, size_of, view
from interop.safetensors import buffer_of

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
Blocks = np.ndarray  # uint8 [number of blocks, bytes of one]


def _numbers(blocks: Blocks, first: int, last: int, dtype: str) -> np.ndarray:
    """Bytes [first, last) of each block as numbers [blocks, count], in float32 where they are fractions."""
    found = np.ascontiguousarray(blocks[:, first:last]).view(dtype)
    return found.astype(np.float32) if found.dtype.kind == "f" else found


def _nibbles(blocks: Blocks, first: int, last: int) -> np.ndarray:
    """Four bits each, the low halves of all bytes before the high ones."""
    both = blocks[:, first:last]
    return np.concatenate([both & 15, both >> 4], axis=1)


def _bits(blocks: Blocks, first: int, last: int) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(blocks[:, first:last]), axis=1, bitorder="little")


def _q8_0(b: Blocks) -> np.ndarray:
    return _numbers(b, 0, 2, "<f2") * _numbers(b, 2, 34, "i1").astype(np.float32)


def _q4_0(b: Blocks) -> np.ndarray:
    return _numbers(b, 0, 2, "<f2") * (_nibbles(b, 2, 18).astype(np.float32) - 8)


def _q4_1(b: Blocks) -> np.ndarray:
    return _numbers(b, 0, 2, "<f2") * _nibbles(b, 4, 20).astype(np.float32) + _numbers(b, 2, 4, "<f2")


def _q5_0(b: Blocks) -> np.ndarray:
    levels = _nibbles(b, 6, 22) | _bits(b, 2, 6) << 4
    return _numbers(b, 0, 2, "<f2") * (levels.astype(np.float32) - 16)


def _q5_1(b: Blocks) -> np.ndarray:
    levels = _nibbles(b, 8, 24) | _bits(b, 4, 8) << 4
    return _numbers(b, 0, 2, "<f2") * levels.astype(np.float32) + _numbers(b, 2, 4, "<f2")


def _grid(b: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Of each eighth of a block of 256 its scale and its offset, [blocks, 8, 1]: of six bits each."""
    low, high, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([low & 63, rest & 15 | low >> 6 << 4], axis=1)
    offsets = np.concatenate([high & 63, rest >> 4 | high >> 6 << 4], axis=1)
    scales, offsets = (
        _numbers(b, at, at + 2, "<f2") * x.astype(np.float32) for at, x in ((0, scales), (2, offsets))
    )
    return scales[..., None], offsets[..., None]


def _q4_k(b: Blocks) -> np.ndarray:
    scales, offsets = _grid(b)
    pairs = b[:, 16:144].reshape(-1, 4, 1, 32)  # 64 numbers in 32 bytes, the low halves first
    levels = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    return (scales * levels.astype(np.float32) - offsets).reshape(len(b), -1)


def _q5_k(b: Blocks) -> np.ndarray:
    scales, offsets = _grid(b)
    pairs = b[:, 48:176].reshape(-1, 4, 1, 32)
    levels = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    fifth = b[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1  # bit k of a byte is of the k-th eighth
    levels = levels | fifth.transpose(0, 2, 1) << 4
    return (scales * levels.astype(np.float32) - offsets).reshape(len(b), -1)


def _q6_k(b: Blocks) -> np.ndarray:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    levels = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = _numbers(b, 208, 210, "<f2") * _numbers(b, 192, 208, "i1").astype(np.float32)
    return (scales[..., None] * levels).reshape(len(b), -1)


def quantized(x: np.ndarray) -> np.ndarray:
    """Numbers [..., multiple of 32] as blocks of Q8_0, uint8 [..., bytes]: the nearest of 255 levels each."""
    rows = x.astype(np.float32).reshape(-1, 32)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), 1 / scale)
    # Halves are rounded away from zero, as everyone's blocks are.
    levels = np.trunc(rows * inverse + np.copysign(np.float32(0.5), rows)).astype(np.int8)
    blocks = np.concatenate([scale.astype("<f2").view(np.uint8), levels.view(np.uint8)], axis=1)
    return blocks.reshape(*x.shape[:-1], -1)


class OnGrid(NamedTuple):
    """Numbers [..., multiple of 32] that are steps times a scale, of which 32 neighbours have one."""

    steps: np.ndarray  # int8
    scale: np.ndarray  # float32, of the same shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.steps.shape

    def numbers(self) -> np.ndarray:
        """What they are, in float32."""
        return self.steps.astype(np.float32) * self.scale

    def blocks(self, kind: str) -> np.ndarray:
        """As blocks of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, uint8 [..., bytes], which must have room for them."""
        steps, scale = (part.reshape(-1, 32) for part in self)
        scale = scale[:, :1]
        parts = [scale.astype("<f2").view(np.uint8)]
        bits = int(kind[1])
        least: Any = -(2 ** (bits - 1))
        if kind.endswith("_1"):
            least = steps.min(axis=1, keepdims=True).astype(np.int16)
            parts.append((least * scale).astype("<f2").view(np.uint8))
        levels = (steps - least).astype(np.uint8)
        if bits == 5:
            parts.append(np.packbits(levels >> 4, axis=1, bitorder="little"))
        low = levels & 15
        parts.append(steps.view(np.uint8) if bits == 8 else low[:, :16] | low[:, 16:] << 4)
        return np.concatenate(parts, axis=1).reshape(*self.shape[:-1], -1)


class Kind(NamedTuple):
    """How an array is stored."""

    number: int  # in the format's list
    size: int  # numbers in a block
    bytes: int  # of a block
    dtype: Any = None  # of one that is a view
    decode: Callable[[Blocks], np.ndarray] | None = None

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Of an array of this shape."""
        return math.prod(shape) // self.size * self.bytes


KINDS = {
    "F32": Kind(0, 1, 4, np.float32),
    "F16": Kind(1, 1, 2, np.float16),
    "BF16": Kind(30, 1, 2, jnp.bfloat16),
    "Q4_0": Kind(2, 32, 18, decode=_q4_0),
    "Q4_1": Kind(3, 32, 20, decode=_q4_1),
    "Q5_0": Kind(6, 32, 22, decode=_q5_0),
    "Q5_1": Kind(7, 32, 24, decode=_q5_1),
    "Q8_0": Kind(8, 32, 34, decode=_q8_0),
    "Q4_K": Kind(12, 256, 144, decode=_q4_k),
    "Q5_K": Kind(13, 256, 176, decode=_q5_k),
    "Q6_K": Kind(14, 256, 210, decode=_q6_k),
}
BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}


class GGUF:
    """The arrays and the values of a GGUF file; `[name]` is a view of it, or float32 made from its blocks."""

    def __init__(self, path: Place):
        """Raises ValueError for what is no such file, is cut short, or has other kinds of arrays."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, tuple[Place, str, tuple[int, ...], int]] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file, size_of(path))
        except (OSError, EOFError, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path} is damaged or no GGUF file ({error}); fetch it again") from error
        # Devices ask for their parts of an array one after another, and a pair's two in turn.
        self._decoded = lru_cache(maxsize=2)(self._decode)

    def _read_header(self, file: Any, size: int) -> None:
        magic, version = file.read(4), _scalar(file, "<u4")
        if magic != MAGIC or version not in (2, VERSION):
            raise ValueError(f"{self.path} is no GGUF file of version 2 or {VERSION}; fetch it again")
        arrays, values = _scalar(file, "<u8"), _scalar(file, "<u8")
        for _ in range(values):
            name = _string(file)
            self.metadata[name] = _value(file, _scalar(file, "<u4"))
        table = []
        for _ in range(arrays):
            name, dims = _string(file), _scalar(file, "<u4")
            shape = tuple(_scalar(file, "<u8") for _ in range(dims))[::-1]  # ours begins with the outermost
            table.append((name, shape, _scalar(file, "<u4"), _scalar(file, "<u8")))
        start = _aligned(file.tell(), self.metadata.get("general.alignment", ALIGNMENT))
        for name, shape, number, offset in table:
            if number not in BY_NUMBER:
                raise ValueError(
                    f"{self.path}: {name} is of kind {number}, which is not supported; use a file of "
                    f"{', '.join(KINDS)}"
                )
            kind = KINDS[BY_NUMBER[number]]
            if start + offset + kind.bytes_of(shape) > size or (shape and shape[-1] % kind.size):
                raise ValueError(f"{self.path} has {size} bytes, and {name} lies beyond; fetch it again")
            self.entries[name] = (self.path, BY_NUMBER[number], shape, start + offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """An array [shape] to be read, not written; ValueError where there is none of that name."""
        if name not in self.entries:
            raise ValueError(f"{self.path} has no {name}")
        path, kind, shape, offset = self.entries[name]
        if KINDS[kind].decode is None:
            return view(path, KINDS[kind].dtype, offset, shape)
        return self._decoded(name)

    def _decode(self, name: str) -> np.ndarray:
        path, name_of_kind, shape, offset = self.entries[name]
        kind = KINDS[name_of_kind]
        blocks = view(path, np.uint8, offset, (math.prod(shape) // kind.size, kind.bytes))
        assert kind.decode is not None
        return kind.decode(np.asarray(blocks)).reshape(shape)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _scalar(file: Any, dtype: str) -> Any:
    return _vector(file, dtype, 1)[0].item()


def _vector(file: Any, dtype: str, count: int) -> np.ndarray:
    wanted = count * np.dtype(dtype).itemsize
    found = file.read(wanted)
    if len(found) != wanted:
        raise EOFError("it ends in its header")
    return np.frombuffer(found, dtype)


def _string(file: Any) -> str:
    return _vector(file, "u1", _scalar(file, "<u8")).tobytes().decode("utf-8")


def _value(file: Any, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        kind, count = _scalar(file, "<u4"), _scalar(file, "<u8")
        return (
            [_value(file, kind) for _ in range(count)]
            if kind in (STRING, ARRAY)
            else _array(file, kind, count)
        )
    return _array(file, kind, 1)[0]


def _array(file: Any, kind: int, count: int) -> list[Any]:
    found = _vector(file, SCALARS[kind], count)
    # The shortest number that is the same in float32: what whoever wrote it has meant.
    return [float(str(x)) for x in found] if found.dtype == np.float32 else found.tolist()


# -- writing -----------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    arrays: Iterable[tuple[str, np.ndarray | OnGrid]],
) -> None:
    """Write a file of these values and arrays [shape], each as it comes, stored as `kinds` says.

    Of numbers on no grid only blocks of Q8_0 are written. A whole number becomes uint32, a fraction float32,
    a list one of int32, of float32 or of strings.
    """
    table, end = b"", 0
    offsets = {}
    for name, shape in shapes.items():
        kind = KINDS[kinds[name]]
        offsets[name] = end
        table += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind.number, end)
        end = _aligned(end + kind.bytes_of(shape), ALIGNMENT)
    header = MAGIC + struct.pack("<IQQ", VERSION, len(shapes), len(metadata))
    header += b"".join(_text(name) + _packed(value) for name, value in metadata.items()) + table
    start = _aligned(len(header), ALIGNMENT)
    missing = set(shapes)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(start + end)
        for name, array in arrays:
            assert array.shape == shapes[name] and name in missing, (name, array.shape)
            file.seek(start + offsets[name])
            file.write(buffer_of(stored(array, kinds[name])))
            missing.remove(name)
    assert not missing, missing


def stored(array: np.ndarray | OnGrid, kind: str) -> np.ndarray:
    """What lies in the file for it."""
    if isinstance(array, OnGrid):
        return array.blocks(kind)
    return quantized(array) if kind == "Q8_0" else array.astype(KINDS[kind].dtype)


def restored(array: np.ndarray | OnGrid, kind: str) -> np.ndarray:
    """What reading gives back for it."""
    if isinstance(array, OnGrid):
        return array.numbers()
    content, decode = stored(array, kind), KINDS[kind].decode
    return content if decode is None else decode(content.reshape(-1, KINDS[kind].bytes)).reshape(array.shape)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _packed(value: Any) -> bytes:
    """A value behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        if not value or isinstance(value[0], str):
            kind, content = STRING, b"".join(map(_text, value))
        else:
            kind = 6 if isinstance(value[0], float) else 5
            content = np.asarray(value, SCALARS[kind]).tobytes()
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + content
    kind = 7 if isinstance(value, bool) else 6 if isinstance(value, float) else 4
    return struct.pack("<I", kind) + np.asarray(value, SCALARS[kind]).tobytes()
