"""Vectors in eight bits: int8 levels, -127 to 127, and a float32 scale of each vector or of its parts.

A scale is the largest magnitude of its part over 127, so that it hangs on that vector alone. Numbers that are
whole multiples of a power of two, the largest of them 127, come back to the bit; others with an error of at
most half a scale, and non-finite ones never as finite ones. Nothing here has a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

INT8_TOP = 127.0


@partial(jax.tree_util.register_dataclass, data_fields=("levels", "scale"), meta_fields=("sizes",))
@dataclass(frozen=True)
class Int8Vectors:
    """Levels, of which one dim is a vector's, and scales with the number of its parts in that dim's place.

    So both may be turned, repeated and indexed alike by whatever leaves that dim whole. sizes: of the parts.
    """

    levels: Int8[Array, "*shape"]
    scale: Float[Array, "*parts"]
    sizes: tuple[int, ...]

    def floats(self, dtype: Any) -> Float[Array, "*shape"]:
        """Levels times scales in float32, rounded once to `dtype`."""
        scale = self.scale
        if len(self.sizes) > 1:
            pairs = zip(self.levels.shape, scale.shape, strict=True)
            axis = next(i for i, (whole, parts) in enumerate(pairs) if whole != parts)
            scale = jnp.repeat(scale, np.array(self.sizes), axis, total_repeat_length=sum(self.sizes))
        return (self.levels.astype(jnp.float32) * scale).astype(dtype)


def to_vectors(x: Float[Array, "*shape"], axis: int, sizes: Sequence[int]) -> Int8Vectors:
    """The nearest to the vectors that lie along `axis`, in parts of these sizes."""
    parts = [to_levels(part, (axis,)) for part in jnp.split(x, np.cumsum(sizes)[:-1], axis)]
    levels, scales = (jnp.concatenate(arrays, axis) for arrays in zip(*parts, strict=True))
    return Int8Vectors(levels, scales, tuple(sizes))


def to_levels(x: Float[Array, "*shape"], axes: Sequence[int]) -> tuple[Int8[Array, "*shape"], Array]:
    """Eight bits for each of x, and float32 scales, one for all along these axes, dims kept."""
    x = x.astype(jnp.float32)
    top = largest(x, axes)
    scale = jnp.where(top == 0, 1.0, top / INT8_TOP)
    return jnp.clip(jnp.round(x / scale), -INT8_TOP, INT8_TOP).astype(jnp.int8), scale


def largest(x: Array, axes: Sequence[int] | None = None) -> Array:
    """The largest magnitude, dims kept where `axes` are given; inf where any is nan.

    XLA's maximum on a CPU may pass over a nan.
    """
    size = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return jnp.max(size, axis=axes, keepdims=axes is not None).astype(jnp.float32)
