"""From logits to the next token. Letters: B batch, V vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from common.checks import require


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: static, so that a greedy decoder compiles without a random number in it.

    temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave the distribution whole; vocab_size,
    where given, forbids the ids from there on (a padded vocabulary has rows that no token owns).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or more")
        require(self.top_k >= 0, "top_k", self.top_k, "at least 0; 0 keeps all tokens")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1; 1 keeps all tokens")


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """One token for every row, by the row's own key (not read when greedy).

    The distribution is softmax(logits / temperature), then cut to the top_k likeliest, then to the fewest
    that hold top_p of what is left (Holtzman et al. 2020). What ties with the last one kept is kept too.
    """
    logits = _allowed(logits.astype(jnp.float32), sampling.vocab_size)
    if sampling.temperature == 0:
        return first_largest(logits)
    logits = _keep_top_p(_keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    # The Gumbel trick, as `jax.random.categorical` has it, to the bit.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    return first_largest(logits + noise)


def sample_keys(seed: int, numbers: Sequence[int] | Int[np.ndarray, " B"]) -> Key[Array, " B"]:
    """A key for each text from (seed, the sample's own number): the same in any batch, beside any others."""
    root = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(root, number))(jnp.array(numbers, jnp.int32))


def keys_at(keys: Key[Array, " B"], positions: Int[Array, " B"]) -> Key[Array, " B"]:
    """The key of a token from its text's and its position there."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def first_largest(x: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The index of the largest of each row, the first of equals.

    Two plain reductions: XLA:CPU makes one loop without vectors of `argmax` and all that it reads, noise
    included, 2.2 ms of [23, 4096] instead of 0.6.
    """
    size = x.shape[-1]
    hit = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size)
    return jnp.minimum(jnp.min(hit, axis=-1), size - 1)  # of a row that holds nan: some id, none outside


def _allowed(logits: Float[Array, "B V"], vocab_size: int | None) -> Float[Array, "B V"]:
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def _keep_top_k(logits: Float[Array, "B V"], top_k: int) -> Float[Array, "B V"]:
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits

    def enough(threshold: Array) -> Array:
        return jnp.sum(logits >= threshold, axis=-1, keepdims=True) >= top_k

    return jnp.where(logits >= largest_where(enough, logits), logits, -jnp.inf)


def _keep_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    if top_p == 1:
        return logits
    shares = jax.nn.softmax(logits, axis=-1)

    def enough(threshold: Array) -> Array:
        return jnp.sum(jnp.where(logits >= threshold, shares, 0.0), axis=-1, keepdims=True) >= top_p

    # The fewest likeliest that hold top_p; where rounding leaves less than that in all, all of them.
    return jnp.where(logits >= largest_where(enough, logits), logits, -jnp.inf)


def largest_where(enough: Callable[[Array], Array], x: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    """The largest float32 of each row that is `enough`, which holds up to some threshold and not above.

    By bisection over all floats, which are integers in the same order: 32 passes over [B, V], an eighth to a
    twentieth of what XLA:CPU needs to sort it, and exact. -inf where nothing is enough.
    """
    # Every float from -inf to the largest lies between, as an int32 of the same order.
    low, high = (jnp.full((x.shape[0], 1), _as_int(jnp.float32(end))) for end in (-jnp.inf, jnp.inf))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        there = enough(_as_float(middle))
        return jnp.where(there, middle, low), jnp.where(there, high, middle)

    return _as_float(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


def _as_int(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _as_float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits), jnp.float32)
