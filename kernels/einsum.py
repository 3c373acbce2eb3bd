"""A projection as an einsum with a name: which product computes it, and what the letters of its spec say.

A spec is `"BTD,DNH->BTNH"`: the activation's dims, the weight's, the result's.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from common.checks import choice
from kernels.names import PROJECTIONS, product_name

Einsum = Callable[[str, Array, Array], Array]


@runtime_checkable
class CompoundWeight(Protocol):
    """A weight that is more than an array and knows its product (`models.weights`)."""

    def multiply(self, product: Einsum, plain: Einsum, spec: str, x: Array) -> Array:
        """The product with an activation; by its master through `product`, by what learns through `plain`."""

    def astype(self, dtype: Any) -> Array:
        """The array that it stands for."""


def multiply(w: Array | CompoundWeight, product: Einsum, plain: Einsum, spec: str, x: Array) -> Array:
    """`product(spec, x, w)`, which a weight that is more than an array composes itself."""
    if isinstance(w, CompoundWeight):
        return w.multiply(product, plain, spec, x)
    return product(spec, x, w)


def plain_einsum(spec: str, x: Array, w: Array) -> Array:
    """`jnp.einsum` in the activation's dtype: a float32 master weight is cast where it is used."""
    # Cast here and not once a step: no rounded copy of all weights lives through it.
    return jnp.einsum(spec, x, w.astype(x.dtype))


@dataclass(frozen=True)
class Projector:
    """The value of `Ops.project`: a named product of an activation and a weight.

    plain: what computes it, `(spec, x, w) -> y`. quantized: what does instead, but for the projections that
    `keep` names; None: nothing does. rounded: `(spec, w) -> w`, what becomes of a weight that is an array
    before, but for those; None: nothing.
    """

    plain: Einsum = plain_einsum
    quantized: Einsum | None = None
    keep: Collection[str] = ()
    rounded: Callable[[str, Array], Array] | None = None

    def __call__(self, name: str, spec: str, x: Array, w: Array | CompoundWeight) -> Array:
        """The product in x's dtype; w is the float32 master. ValueError for a name that is not known."""
        choice("projection", name, PROJECTIONS)
        einsum = self.plain if self.quantized is None or name in self.keep else self.quantized
        if self.rounded is not None and name not in self.keep and not isinstance(w, CompoundWeight):
            w = self.rounded(spec, w)
        # Named outside of whatever computes it: a policy that keeps a projection keeps one array, rounded
        # and scaled, and does not ask which kernel made it.
        return checkpoint_name(multiply(w, einsum, self.plain, spec, x), product_name(name))


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
