"""Projections as plain products of two matrices, forward and backward: what XLA's CPU library is fastest at.

Left to differentiate `jnp.einsum`, XLA transposes a whole activation for the gradient by the weights of some
projections, and pads what was cut out of a fused pair. Here every product is [M, K] by [K, N] in the layout
that lies in memory: rows M of the activation, contracted K, outputs N.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.attention import largest_divisor
from kernels.einsum import count_contracted
from kernels.names import MATERIALIZED

F32 = jnp.float32
ROWS = 1024  # contracted at a time in bfloat16
FEW = (
    8  # rows of a product in bfloat16 at least: for fewer XLA:CPU has no kernel, and takes ten times as long
)


def fast_einsum(spec: str, x: Array, w: Array, *, dtype: Any = F32) -> Array:
    """`plain_einsum` with products of matrices in both directions; for arrays whole on a device.

    x: the activation, rows first and contracted dims last; w: contracted dims first, as every projection here
    is laid out. Factors are rounded to `dtype`, also those of the gradients, and products added in float32;
    the result is in the activation's dtype. Raises ValueError where the spec is no projection.
    """
    contracted = count_contracted(spec)
    rows, outputs = x.shape[: x.ndim - contracted], w.shape[contracted:]
    width = math.prod(w.shape[:contracted])
    y = _product(x.reshape(-1, width), w.reshape(width, -1), jnp.dtype(dtype))
    return y.reshape(*rows, *outputs)


def contract_last(
    x: Float[Array, "*rows K"], table: Float[Array, "N K"], *, dtype: Any = F32
) -> Float[Array, "*rows N"]:
    """The product of rows with each row of a table, in float32, of factors rounded to `dtype`."""
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    return _dot_few(rows, table.astype(dtype), 1).reshape(*x.shape[:-1], table.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, dtype: Any) -> Array:
    return _dot_few(x.astype(dtype), w.astype(dtype), 0).astype(x.dtype)


def _forward(x: Array, w: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    # Rounded once: both products of the backward pass read these, and what they were made of can go.
    rounded = x.astype(dtype)
    return _dot(rounded, w.astype(dtype), 1, 0).astype(x.dtype), (rounded, w)


def _backward(dtype: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rounded = dy.astype(dtype)
    dx = _dot(rounded, w.astype(dtype), 1, 1).astype(dy.dtype)
    return dx, contract_rows(x, rounded, dtype=dtype).astype(w.dtype)


_product.defvjp(_forward, _backward)


def contract_rows(x: Float[Array, "M K"], y: Float[Array, "M N"], *, dtype: Any = F32) -> Float[Array, "K N"]:
    """The product x^T y in float32, of factors rounded to `dtype`: a gradient by weights."""
    x, y = x.astype(dtype), y.astype(dtype)
    if dtype == F32:
        return _dot(x, y, 0, 0)
    if x.shape[1] > y.shape[1]:  # the narrower one is transposed
        return contract_rows(y, x, dtype=dtype).T
    # XLA has no bfloat16 kernel that contracts rows: it would compute in float32. A transpose beside the
    # product is folded into it again, but not into a loop. Contracting 1,024 rows at a time suits its caches.
    # Moved as integers: XLA:CPU would transpose and cut bfloat16 as float32, there and back.
    rows, columns, words = x.shape[0], _bits(x).T, _bits(y)
    size = largest_divisor(rows, min(ROWS, rows // 2))

    def add(i: Array, total: Array) -> Array:
        left = jax.lax.dynamic_slice_in_dim(columns, i * size, size, 1)
        right = jax.lax.dynamic_slice_in_dim(words, i * size, size)
        return total + _dot(_floats(left, dtype), _floats(right, dtype), 1, 0)

    return jax.lax.fori_loop(0, rows // size, add, jnp.zeros((x.shape[1], y.shape[1]), F32))


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _floats(bits: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=F32)


def _dot_few(a: Array, b: Array, j: int) -> Array:
    """`_dot` of a's last dim, by rows of zeros below where a has too few."""
    more = 0 if a.dtype == F32 else max(0, FEW - a.shape[0])
    return _dot(jnp.pad(a, ((0, more), (0, 0))), b, 1, j)[: a.shape[0]] if more else _dot(a, b, 1, j)


def materialize(x: Array) -> Array:
    """`x` as an array of its own: XLA:CPU fuses sines into every loop that reads them, but no product.

    x: float32, at least one dim. A product with the identity is exact.
    """
    size = x.shape[-1]
    # Named, since a policy that makes it anew in the backward pass would undo what it is for.
    y = _dot(x.reshape(-1, size), jnp.eye(size, dtype=x.dtype), 1, 0).reshape(x.shape)
    return checkpoint_name(y, MATERIALIZED)
