"""Moments kept in bfloat16, half the memory, by stochastic rounding.

Rounding to the nearest loses what is below half a unit in the last place, 0.2 % to 0.4 % of a number: a
mean of squares with b2 = 0.999 falls by at most 0.1 % a step, so it never would. Up or down at random with
the right mean (Gupta et al. 2015, arXiv:1502.02551), nothing is lost on average.

The random bits are a hash of (seed, step, leaf, element): the same on any mesh, and nothing to be kept.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, UInt32

GOLDEN = 0x9E3779B9  # odd, so that multiplying by it loses no bit of 32
LOW = 0xFFFF  # the bits of a float32 that a bfloat16 lacks


def keep_in_bfloat16(
    chain: optax.GradientTransformation, *, seed: int, counter: str
) -> optax.GradientTransformation:
    """The chain (`optax.named_chain`) with every array of its state in bfloat16; it computes in float32.

    counter: name of the link whose `count` is the number of steps made. Scalars stay as they are.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, chain.init(params))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step = state[counter].count
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim else x, state)
        updates, new = chain.update(gradients, wide, params)

        def narrow(path: Any, x: Array) -> Array:
            if not x.ndim:
                return x
            return stochastic_bfloat16(x, random_bits(x.shape, seed, step, jax.tree_util.keystr(path)))

        return updates, jax.tree_util.tree_map_with_path(narrow, new)

    return optax.GradientTransformation(init, update)


def stochastic_bfloat16(x: Float[Array, "..."], bits: UInt32[Array, "..."]) -> BFloat16[Array, "..."]:
    """A bfloat16 next to x (float32), the upper with the probability that makes x the mean.

    bits: uniform, of which the low 16 are used. A bfloat16 is the upper half of a float32, and the next one
    away from zero is one more: adding a random lower half carries as often as it should.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & jnp.uint32(LOW))
    cut = jax.lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


def random_bits(shape: tuple[int, ...], seed: int, step: Any, leaf: str) -> UInt32[Array, "..."]:
    """32 bits for each element, from its place in row-major order: a few integer operations, no state.

    The place comes from one iota a dim, which any sharding splits; it is the same for a stack of layers
    [n, ...] and for the stages [v, P, n / (v P), ...] that it lies in for a pipeline.
    """
    key = mix(mix(jnp.uint32(seed & 0xFFFFFFFF) + jnp.uint32(zlib.crc32(leaf.encode()))) + jnp.uint32(step))
    place = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return mix(place * jnp.uint32(GOLDEN) + key)


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit of the input turns half of those of the output.

    The finalizer of MurmurHash3 (Appleby 2011).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
