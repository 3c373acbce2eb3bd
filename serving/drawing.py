"""From logits to the next token where every row has settings of its own. B rows, V vocabulary.

`serving.sampling` is the same for rows that share them: a program without what nobody asked for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from serving.sampling import first_largest, largest_where

# What a row has: a number each, arrays [B].
REALS = ("temperature", "top_p", "min_p", "presence", "frequency")


def draw(
    logits: Float[Array, "B V"],
    written: Int[Array, "B V"],
    bias: Float[Array, "B V"],
    settings: dict[str, Array],
    keys: Array,
) -> Int[Array, " B"]:
    """One token for every row, as `serving.request.Draw` describes it; `written`: how often each was.

    What no row asks for is not computed, and what is computed for others leaves a row as it is.
    """
    times = written.astype(jnp.float32)
    logits = logits - settings["frequency"][:, None] * times - settings["presence"][:, None] * (times > 0)
    logits = logits + bias
    temperature = settings["temperature"][:, None]

    def noisy(x: Array) -> Array:
        x = x / jnp.where(temperature > 0, temperature, 1.0)
        x = jax.lax.cond(jnp.any(settings["top_k"] > 0), _keep_top_k, _as_it_is, x, settings["top_k"])
        x = jax.lax.cond(jnp.any(settings["top_p"] < 1), _keep_top_p, _as_it_is, x, settings["top_p"])
        # At least such a share of the likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082).
        least = jnp.max(x, axis=-1, keepdims=True) + jnp.log(settings["min_p"][:, None])
        x = jnp.where(x >= least, x, -jnp.inf)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, x.shape[-1:], x.dtype))(keys)
        return jnp.where(temperature > 0, x + noise, logits)

    return first_largest(jax.lax.cond(jnp.any(temperature > 0), noisy, lambda x: x, logits))


def _as_it_is(x: Array, setting: Array) -> Array:
    return x


def _keep_top_k(x: Float[Array, "B V"], top_k: Int[Array, " B"]) -> Float[Array, "B V"]:
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, x.shape[-1]), x.shape[-1])[:, None]

    def enough(threshold: Array) -> Array:
        return jnp.sum(x >= threshold, axis=-1, keepdims=True) >= wanted

    return jnp.where(x >= largest_where(enough, x), x, -jnp.inf)


def _keep_top_p(x: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    shares = jax.nn.softmax(x, axis=-1)

    def enough(threshold: Array) -> Array:
        return jnp.sum(jnp.where(x >= threshold, shares, 0.0), axis=-1, keepdims=True) >= top_p[:, None]

    kept = jnp.where(x >= largest_where(enough, x), x, -jnp.inf)
    # A row that keeps all keeps all: what rounding leaves of 1 decides nothing there.
    return jnp.where(top_p[:, None] < 1, kept, x)
