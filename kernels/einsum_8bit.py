"""Projections in eight bits, forward and backward, as values of `Projector.quantized`.

Master weights stay float32 and are rounded straight from there; what comes out has the activation's dtype.
What is no projection (embeddings, norms, attention, router and experts, the head and its loss) never passes
through here.

fp8 (Micikevicius et al. 2022, arXiv:2209.05433): e4m3 forward, e5m2 for gradients by outputs, so that
    y = q4(x) q4(w),   dx = q5(dy) q4(w),   dw = q4(x) q5(dy),
each q with one scale for a tensor, of what is in it now. Scales are powers of two: multiplying by one rounds
nothing, and since fp8 is a floating-point format, neither does the choice between two of them, but at the
very bottom of its range. So it hardly matters over how many devices or microbatches a tensor is cut.
int8: symmetric, a scale for each token and for each output of a weight, forward only; gradients are products
in the compute dtype, because eight bits on one scale lose what is small in them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.einsum import Einsum, letters_of
from kernels.int8_vectors import largest, to_levels

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


def dot(spec: str, x: Array, w: Array, dtype: Any) -> Array:
    """An einsum of two operands that may be of different types, summed in and rounded once to `dtype`.

    `jnp.einsum` would first look for a type that holds both, and XLA finds its eight-bit kernels only where
    operands are multiplied as they are.
    """
    left, right, out = letters_of(spec)
    shared = [c for c in left if c in right]
    contract = [left.index(c) for c in shared], [right.index(c) for c in shared]
    y = jax.lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=dtype)
    letters = [c for c in left + right if c not in shared]
    return jnp.transpose(y, [letters.index(c) for c in out])


# -- fp8 ------------------------------------------------------------------------------------------------


def fp8_scale(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, ""]:
    """The largest power of two that keeps all of x within the type's range; 1 for zeros, nan for inf and nan.

    Over all devices: the maximum of a tensor that is split is the maximum over its parts.
    """
    top = largest(x)
    # frexp gives mantissa and exponent, so the power is found without a logarithm, whose rounding could miss
    # the next power of two and overflow.
    most, limit = math.frexp(float(jnp.finfo(dtype).max))
    mantissa, exponent = jnp.frexp(top)
    power = jnp.clip(limit - exponent - (mantissa > most), -126, 126)
    # The float32 whose exponent is `power`, made from its bits: exact on every device, which exp2 need not
    # be.
    scale = jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
    scale = jnp.where(top > 0, jnp.where(top < jnp.inf, scale, jnp.nan), 1.0)
    return jax.lax.stop_gradient(scale)


def to_fp8(x: Float[Array, "*shape"], dtype: Any) -> tuple[Array, Float[Array, ""]]:
    """Eight bits for each of x, and what to multiply it by to have x again."""
    scale, top = fp8_scale(x, dtype), float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -top, top).astype(dtype), 1.0 / scale


def fp8_dot(spec: str, x: tuple[Array, Array], w: tuple[Array, Array], dtype: Any) -> Array:
    """The product of two scaled tensors. The scale comes last and is exact: rounding stays within the dot."""
    return dot(spec, x[0], w[0], dtype) * (x[1] * w[1]).astype(dtype)


def _fp8(spec: str, x: Array, w: Array) -> Array:
    return fp8_dot(spec, to_fp8(x, FORWARD), to_fp8(w, FORWARD), x.dtype)


def _fp8_forward(spec: str, x: Array, w: Array) -> Any:
    return _fp8(spec, x, w), (x, w)


def _fp8_backward(spec: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, w), (left, right, out) = saved, letters_of(spec)
    grad = to_fp8(dy, GRADIENT)
    # Operands are rounded again and not saved from the forward pass: eight bits of each would have to be kept
    # beside what a policy keeps, and rounding is cheap beside the product.
    dx = fp8_dot(f"{out},{right}->{left}", grad, to_fp8(w, FORWARD), x.dtype)
    dw = fp8_dot(f"{left},{out}->{right}", to_fp8(x, FORWARD), grad, jnp.float32)
    return dx, dw.astype(w.dtype)


# -- int8 -----------------------------------------------------------------------------------------------


def to_int8(x: Float[Array, "*shape"], letters: str, contracted: str) -> tuple[Array, Array]:
    """Eight bits for each of x, and scales: one for each slice along the dims that are contracted."""
    axes = [letters.index(c) for c in contracted]
    levels, scale = to_levels(x, axes)
    return levels, jnp.squeeze(scale, axes)


def _int8(spec: str, x: Array, w: Array) -> Array:
    left, right, out = letters_of(spec)
    shared = "".join(c for c in left if c in right)
    (x8, rows), (w8, columns) = to_int8(x, left, shared), to_int8(w, right, shared)
    free = [[c for c in letters if c not in shared] for letters in (left, right)]
    assert [*free[0], *free[1]] == list(out), spec
    # Scales are of rows and of outputs, never of what is contracted, so both come out of the sum.
    rows = rows.reshape(*rows.shape, *[1] * columns.ndim)
    y = dot(spec, x8, w8, jnp.int32).astype(jnp.float32) * rows * columns
    return y.astype(x.dtype)


def _int8_forward(spec: str, x: Array, w: Array) -> Any:
    return _int8(spec, x, w), (x, w)


def _int8_backward(spec: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, w), (left, right, out) = saved, letters_of(spec)
    dx = jnp.einsum(f"{out},{right}->{left}", dy, w.astype(x.dtype))
    dw = jnp.einsum(f"{left},{out}->{right}", x, dy, preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


def differentiable(product: Einsum, forward: Any, backward: Any) -> Einsum:
    """`product(spec, x, w)` with a gradient of its own; `spec` is static."""
    made = jax.custom_vjp(product, nondiff_argnums=(0,))
    made.defvjp(forward, backward)
    return made


PRODUCTS: dict[str, Einsum] = {
    "fp8": differentiable(_fp8, _fp8_forward, _fp8_backward),
    "int8": differentiable(_int8, _int8_forward, _int8_backward),
}
