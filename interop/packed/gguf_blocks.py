"""Quantized weights as a GGUF's blocks of 32, level by level: nothing is rounded again."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from common.checks import require
from interop.gguf import OnGrid
from interop.packed.write_packed import info_at
from interop.rules import Slot, Stacked, arrays, letters
from models.grid import FLOAT8, HALF, half_digits, in_half
from models.param import ParamInfo
from models.weights import QTensor, reduced

BLOCK = 32
LARGEST = 2**11  # scale, 31 times which is a number of float16
Packed = Mapping[tuple[str, ...], QTensor]  # parameters by path


def block_kind(bits: int, *, symmetric: bool, floating: bool = False, group: int | None = None) -> str:
    """The smallest blocks that hold every level of such a grid; group: inputs that share a scale, None: all.

    A block of Q4_0, Q5_0 and Q8_0 has signed steps of its scale, one of Q4_1 and Q5_1 steps from its least
    value. Raises ValueError where there are none.
    """
    if floating or (bits == 8 and not symmetric):
        what = "floating=true" if floating else "bits=8 symmetric=false"
        raise ValueError(f"{what}: GGUF has no such blocks; use symmetric bits=8, or format=hf")
    require(group is None or group % BLOCK == 0, "group", group, f"a multiple of GGUF's {BLOCK}, or null")
    if bits in (4, 5) and not symmetric:
        return f"Q{bits}_1"
    furthest = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1  # level from its zero
    return "Q4_0" if furthest < 8 else "Q5_0" if furthest < 16 else "Q8_0"


def kinds_of(model: Stacked, places: Sequence[Slot], packed: Packed) -> dict[str, str]:
    """How the arrays of theirs are stored that quantized parameters become.

    Raises ValueError for a grid that no blocks hold, inputs that are no blocks, and an array of two grids.
    """
    found: dict[str, str] = {}
    own: dict[tuple[str, ...], str] = {}
    for slot in places:
        weight, info = packed[slot.path], info_at(model, slot.path)
        if slot.path not in own:
            own[slot.path] = _kind_of("/".join(slot.path), weight, info)
        inner = [dim - (slot.row is not None) for dim in reduced(info)]
        size = math.prod(slot.shape[dim] for dim in inner)
        for source in slot.sources:
            groups, right = letters(source.rule)
            if groups[-1] != tuple(right[dim] for dim in inner) or size % BLOCK:
                raise ValueError(
                    f"{source.name} has rows of {size} inputs, which are no blocks of {BLOCK}; "
                    "keep its projection as it is, or use format=hf"
                )
            if found.setdefault(source.name, own[slot.path]) != own[slot.path]:
                both = f"{found[source.name]} and {own[slot.path]}"
                raise ValueError(f"{source.name} would be of {both}; quantize its parts alike")
    return found


def _kind_of(name: str, weight: QTensor, info: ParamInfo) -> str:
    bits, symmetric = weight.grid or weight.bits, weight.zero is None
    dims = reduced(info)
    count = math.prod(weight.scale.shape[dim] for dim in dims)
    group = None if count == 1 else math.prod(weight.shape[dim] for dim in dims) // count
    floating = weight.q.dtype == FLOAT8
    kind = block_kind(bits, symmetric=symmetric, floating=floating, group=group)
    # Where there is a least value, it is a multiple of the scale, and float16 as well.
    digits = half_digits(bits, symmetric) if kind.endswith("_1") else HALF
    scale = weight.scale
    if not np.array_equal(in_half(scale, digits), scale) or scale.max() > LARGEST:
        raise ValueError(f"{name} has scales that GGUF's float16 cannot hold; quantize with scales: float16")
    return kind


def grids(
    places: list[Slot], packed: Packed, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, OnGrid]]:
    """The arrays of theirs that quantized parameters become, layer by layer: steps and scales by one rule."""

    def parts(make: Callable[[QTensor], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        def read(path: tuple[str, ...], row: int | None) -> np.ndarray:
            return make(packed[path] if row is None else packed[path][row])

        return arrays(places, read, shapes)

    for (name, steps), (_, scale) in zip(parts(_steps), parts(_scales), strict=True):
        yield name, OnGrid(steps, scale)


def _steps(weight: QTensor) -> np.ndarray:
    """Levels from their zeros, int8 of the weight's shape."""
    return np.asarray(replace(weight, scale=jnp.ones_like(weight.scale)).astype(jnp.int8))


def _scales(weight: QTensor) -> np.ndarray:
    """Of every number its scale."""
    scale = np.asarray(weight.scale)
    for dim, size in enumerate(weight.shape):
        scale = np.repeat(scale, size // scale.shape[dim], axis=dim)
    return scale
