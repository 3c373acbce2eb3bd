"""Guesses at what comes next, from the text itself or by the model's own layer for further tokens.

Leviathan et al. 2023 (arXiv:2211.17192), for why nothing changes: guesses are read with the last token, and
one counts only where the token drawn before it is the same, by the key of its own position. So an answer
does not depend on what was guessed; how many steps it takes does. S slots, L places of a text, K guesses,
W = K + 1 places that a step reads, V vocabulary, D model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.ops import Ops
from models.transformer import Model, Tree
from serving.drawing import draw
from serving.sampling import keys_at


def guess(
    text: Int[Array, "S L"], length: Int[Array, " S"], most: Int[Array, " S"], count: int
) -> tuple[Int[Array, "S K"], Int[Array, " S"]]:
    """(`count` tokens, how many of them are guesses, at most `most`) behind the first `length` of each text.

    Prompt lookup (Saxena 2023): where a text has said the same before, it may go on alike.
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


def draft(
    model: Model,
    weights: Tree,
    state: Tree,
    cache: Tree,
    x: Float[Array, "S W D"],
    tokens: Int[Array, "S W"],
    counts: Int[Array, " S"],
    bias: Float[Array, "S V"],
    ops: Ops,
    *,
    count: int,
) -> Tree:
    """What of the state changes as the layer for further tokens reads on, and guesses `count` tokens.

    state: behind a step, cache: before it. x: the stream at the places that the step has read; tokens: what
    was written behind each, of a row as many as `counts`. The first guess is what the layer was trained for;
    each further one is its own again, as if the one before were right (Li et al. 2024, arXiv:2401.15077).
    All are drawn by the keys of their positions: where the layer's distribution is the model's, so is the
    token, at any temperature.
    """
    keys, moved = jax.random.wrap_key_data(state["key"]), counts > 0
    stream, drafts = model.further_input(weights, x), []
    for number in range(count):
        logits, stream, cache = model.further(weights, stream, tokens, cache, ops, counts)
        logits = ops.constrain(logits, (None, None))
        position = state["lengths"] + number + 1
        new = draw(logits, state["written"], bias, state, keys_at(keys, position))
        drafts.append(new)
        # What it keeps of a guess is written over as the text goes on; behind a text's end there is no page.
        tokens, counts = new[:, None], (moved & (position < state["ends"])).astype(jnp.int32)
    return {
        "further": cache["further"],
        "drafts": jnp.where(moved[:, None], jnp.stack(drafts, axis=1), state["drafts"]),
        "drafted": jnp.where(moved, count, state["drafted"]),
    }
