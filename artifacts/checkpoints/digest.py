"""A digest per leaf that is the same on every mesh, taken where the data lies.

Checkpoint files can rot in silence: one flipped bit restores as another number. A digest taken on the devices
at save and again after restore covers the whole way between.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from common.files import text_digest
from common.host import one_order

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def leaf_digest(x: Array) -> UInt32[Array, ""]:
    """Sum over elements of a mix of bits and row-major position, modulo 2^32: order-free, so sharding-free.

    Every step of the mix is a bijection of the element's bits, so a change of one element always changes the
    sum. The position comes from one iota a dim, because a reshape to one dim would gather a sharded array.
    """
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    mixed = (bits ^ (position * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _digests(leaves: dict[str, Array]) -> dict[str, Array]:
    return {name: leaf_digest(leaf) for name, leaf in leaves.items()}


@functools.cache
def _jitted(platform: str, devices: int) -> Any:
    # One sum a leaf over all devices: as independent as collectives come.
    return jax.jit(_digests, compiler_options=one_order(platform, devices))


def digests(leaves: Mapping[str, Array]) -> dict[str, int]:
    """Digest of every named array; blocks until they are computed. All processes get the same."""
    return numbers(begun(leaves))


def begun(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """The same, under way on the devices."""
    if not leaves:
        return {}
    devices: set[Any] = next(iter(leaves.values())).sharding.device_set
    return _jitted(next(iter(devices)).platform, len(devices))(dict(leaves))


def numbers(values: Mapping[str, Array]) -> dict[str, int]:
    """What was begun, once it is there."""
    return {name: int(value) for name, value in jax.device_get(dict(values)).items()}


def combined(values: Mapping[str, int]) -> str:
    """One sha256 over all leaf digests: the name by which a run refers to its parent checkpoint."""
    text = "\n".join(f"{name} {value:08x}" for name, value in sorted(values.items()))
    return text_digest(text)


def differing(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names whose values disagree or that only one side has."""
    return sorted(n for n in {*saved, *found} if saved.get(n) != found.get(n))
