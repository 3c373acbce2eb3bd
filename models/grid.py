"""The few levels that a weight may have: numbers in blocks, each with a scale and perhaps a zero."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

BITS = (8, 6, 5, 4, 3, 2)  # of a grid; it is stored in eight, or from four down in four
FLOAT8 = jnp.dtype("float8_e4m3fn")  # the one grid of eight bits whose levels are not evenly spaced
HALF = 11  # significant bits of float16


def in_blocks(x: Array, blocks: Sequence[int]) -> Array:
    """Every dim as (number of blocks, their size): [n, ...] as [n / b, b, ...]."""
    pairs = zip(x.shape, blocks, strict=True)
    return x.reshape([part for size, block in pairs for part in (size // block, block)])


def blocks_along(shape: Sequence[int], dims: Sequence[int], group: int | None) -> tuple[int, ...]:
    """How many numbers along each dim of a shape share a scale: `group` in a row along `dims`, None: all.

    Raises ValueError where the group is no whole part of them.
    """
    blocks = [1] * len(shape)
    sizes = [shape[dim] for dim in dims]
    left = math.prod(sizes) if group is None else group if group > 1 else 0
    for dim, size in zip(reversed(dims), reversed(sizes), strict=True):
        # From the last dim outwards, so that a block is a run of neighbours: part of a row, or whole rows.
        blocks[dim] = math.gcd(left, size)
        if blocks[dim] < min(left, size):
            left = 0
            break
        left //= blocks[dim]
    if left != 1:
        last = sizes[-1]
        legal = ", ".join(str(n) for n in range(2, last + 1) if last % n == 0)
        raise ValueError(
            f"group={group} does not divide the reduced dims {sizes} of a weight; use one of {legal}"
        )
    return tuple(blocks)


def grid_of(
    blocks: Array, within: tuple[int, ...], bits: int | None, *, symmetric: bool = True, half: bool = False
) -> tuple[Array, Array | None]:
    """Scale and zero (None: level 0), of length 1 along the dims `within` a block. bits: None for float8.

    half: scales are numbers of float16, of `half_digits`.
    """

    def scale_of(size: Array) -> Array:
        scale = in_half(size, half_digits(bits, symmetric)) if half else size
        return jnp.where(scale == 0, 1.0, scale)  # a block of zeros, or of what float16 takes for them

    largest = jnp.max(jnp.abs(blocks), axis=within, keepdims=True)
    if bits is None:
        return scale_of(largest / jnp.finfo(FLOAT8).max.astype(jnp.float32)), None
    top = 2 ** (bits - 1) - 1
    if symmetric:
        return scale_of(largest / top), None
    low = jnp.minimum(jnp.min(blocks, axis=within, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(blocks, axis=within, keepdims=True), 0.0)
    scale = scale_of((high - low) / (2 * top + 1))
    return scale, jnp.clip(-top - 1 - jnp.round(low / scale), -top - 1, top)


def half_digits(bits: int | None, symmetric: bool) -> int:
    """Significant bits of a float16 scale: all, but with zeros so few that its multiples are float16 as well.

    Blocks that have a least value in place of a zero (llama.cpp's of four and five bits) hold it in float16.
    """
    return HALF if symmetric or bits is None or bits > 5 else HALF - bits


def in_half(x: Float[Array, "..."], digits: int = HALF) -> Float[Array, "..."]:
    """The nearest numbers of float16 with so many significant bits, in float32; x is positive, or 0."""
    # By no casts there and back, which a compiler may take for nothing.
    least = 2.0**-24
    x = jnp.where(x < 2.0**-14, jnp.round(x / least) * least, x)
    return jax.lax.reduce_precision(x, 8, digits - 1)


def levels_of(x: Array, scale: Array, zero: Array | None, bits: int) -> Array:
    """The nearest levels of that grid, whole numbers in float32."""
    top = 2 ** (bits - 1) - 1
    if zero is None:
        return jnp.clip(jnp.round(x / scale), -top, top)
    return jnp.clip(jnp.round(x / scale) + zero, -top - 1, top)


def pack(levels: Int8[Array, "..."], dim: int) -> UInt8[Array, "..."]:
    """Levels from -8 to 7, two of `dim` (from the end) in a byte: what `QTensor.levels` unpacks."""
    place = levels.ndim + dim
    shape = (*levels.shape[:place], levels.shape[place] // 2, 2, *levels.shape[place + 1 :])
    low, high = jnp.moveaxis((levels + 8).astype(jnp.uint8).reshape(shape), place + 1, 0)
    return low | (high << 4)
