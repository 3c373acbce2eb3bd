"""From logits to the next token. Letters: B batch, V vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
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
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _keep_top_p(_keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sample_keys(
    seed: Int[Array, ""] | int, samples: Int[Array, " B"], position: Int[Array, ""] | int
) -> Key[Array, " B"]:
    """A key for each row from (seed, the sample's own number, position in its text).

    Neither the row's place in a batch nor its neighbours enter, so a text comes out the same in any batch.
    """
    root = jax.random.key(seed)
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(root, s), position))(samples)


def _allowed(logits: Float[Array, "B V"], vocab_size: int | None) -> Float[Array, "B V"]:
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def _keep_top_k(logits: Float[Array, "B V"], top_k: int) -> Float[Array, "B V"]:
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _keep_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    if top_p == 1:
        return logits
    falling = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(falling, axis=-1)
    # A token stays while the likelier ones hold less than top_p, so the likeliest always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
