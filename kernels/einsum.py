"""A projection as an einsum: the plain product, and what the letters of its spec say.

A spec is `"BTD,DNH->BTNH"`: the activation's dims, the weight's, the result's.
"""

from functools import cache

import jax.numpy as jnp
from jaxtyping import Array


def plain_einsum(spec: str, x: Array, w: Array) -> Array:
    """`jnp.einsum` in the activation's dtype: a float32 master weight is cast where it is used."""
    # Cast here and not once a step: no rounded copy of all weights lives through it.
    return jnp.einsum(spec, x, w.astype(x.dtype))


def letters_of(spec: str) -> tuple[str, str, str]:
    """The letters of the activation, of the weight and of the result."""
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    return left, right, out


@cache
def count_contracted(spec: str) -> int:
    """How many dims a projection contracts: the last of its activation, the first of its weight.

    Raises ValueError where the spec is no such product.
    """
    # Rows, then contracted dims; contracted dims, then outputs: so the three arrays are matrices as they lie
    # in memory, and a projection is one product without a transpose.
    x, w, y = letters_of(spec)
    contracted = sum(letter in w for letter in x)
    if not contracted or x[-contracted:] != w[:contracted] or y != x[:-contracted] + w[contracted:]:
        raise ValueError(
            f"einsum {spec} is no projection; write rows and contracted by contracted and outputs"
        )
    return contracted
