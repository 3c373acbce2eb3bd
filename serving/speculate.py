"""Guesses at what comes next, from the text itself: where it has said the same before, it may go on alike.

Prompt lookup (Saxena 2023; Leviathan et al. 2023, arXiv:2211.17192, for why nothing changes): guesses are
read with the last token, and one counts only where the token drawn before it is the same, by the key of its
own position. S slots, L places of a text, K guesses.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int


def guess(
    text: Int[Array, "S L"], length: Int[Array, " S"], most: Int[Array, " S"], count: int
) -> tuple[Int[Array, "S K"], Int[Array, " S"]]:
    """(`count` tokens, how many of them are guesses, at most `most`) behind the first `length` of each text.

    They are what follows the last place before its end where its last two tokens stand together; where that
    comes to the end, over and over.
    """
    places = jnp.arange(text.shape[1])
    last = jnp.take_along_axis(text, jnp.maximum(length[:, None] - jnp.array([2, 1]), 0), axis=1)
    # The pair begins at a place, and has a token behind it before the text ends.
    same = (text == last[:, :1]) & (jnp.roll(text, -1, axis=1) == last[:, 1:])
    same &= places < length[:, None] - 2
    begin = jnp.max(jnp.where(same, places + 2, 0), axis=1)
    at = begin[:, None] + jnp.arange(count) % jnp.maximum(length - begin, 1)[:, None]
    return jnp.take_along_axis(text, at, axis=1), jnp.where(begin > 0, jnp.minimum(most, count), 0)
