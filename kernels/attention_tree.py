"""Attention of texts that share beginnings: each token lies once in a stream, wherever its text's others lie.

W rows of T tokens each, B blocks of Q queries, M times S places of a block's text, N query heads, K key/value
heads, H head size of queries and keys, V that of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.attention import Masks, Scores
from kernels.attention_paged import online_attention

AnyArray = Array | np.ndarray  # from the host, or traced
TOGETHER = 16  # blocks whose keys are in the caches at once, as far as the longest of them goes


class Paths(NamedTuple):
    """Where in its row the tokens of texts lie.

    queries: of blocks of Q successive positions, the first a multiple of Q; -1 where nothing is asked. keys:
    of the text of each block, its positions 0, 1, ... up to the block's end. own: a token's place in [B Q].
    """

    queries: Int[AnyArray, "W B Q"]
    keys: Int[AnyArray, "W B M S"]
    own: Int[AnyArray, "W T"]


def tree_attention(
    q: Float[Array, "W T N H"],
    k: Float[Array, "W T K H"],
    v: Float[Array, "W T K V"],
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
    *,
    paths: Paths,
) -> Float[Array, "W T N V"]:
    """`reference_attention` of each token to those of its own text up to itself.

    A query stands in its block where its position says, and keys come in the order of theirs: so what a token
    gets depends neither on where its text lies in the row nor on the texts beside it.
    """
    rows, blocks = paths.queries.shape[:2]
    group = min(TOGETHER, blocks)

    def attend(part: tuple[Array, Array]) -> Array:
        queries, keys = part

        def fetch(number: Array) -> tuple[Array, Array]:
            at = jax.lax.dynamic_index_in_dim(keys, number, axis=2, keepdims=False)
            own_k, own_v = _merged(_picked(k, at)), _merged(_picked(v, at))
            return own_k.transpose(0, 2, 3, 1), own_v.transpose(0, 2, 1, 3)

        at = jnp.maximum(queries, 0)
        own = masks._replace(
            q_positions=_merged(_picked(masks.q_positions, at)),
            q_segments=_merged((queries >= 0).astype(jnp.int32)),
        )
        out = online_attention(_merged(_picked(q, at)), fetch, own, scores, sinks)
        return out.reshape(rows, group, *out.shape[1:])

    groups = (x.reshape(rows, -1, group, *x.shape[2:]).swapaxes(0, 1) for x in (paths.queries, paths.keys))
    out = jax.lax.map(attend, tuple(groups)).swapaxes(0, 1)
    return _picked(out.reshape(rows, -1, *out.shape[-2:]), paths.own)


def _picked(x: Array, at: AnyArray) -> Array:
    """Of each row [W, T, ...] the elements at places [W, ...]."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, at)


def _merged(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
