"""Attention to keys and values that lie in pages: a page of every row at a time, by an online softmax.

B rows, T query positions, M pages of a row, P pages in all, S places of a page, N query heads, K key/value
heads, G = N/K, R = G*T queries of one key/value head, H head size of queries and keys, V that of values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention import Masks, Scores, sinks_of_rows
from kernels.attention_cpu import LOWEST, TINY, UNSEEN
from kernels.int8_vectors import Int8Vectors

F32 = jnp.float32


def paged_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "P S K H"] | Int8Vectors,
    v: Float[Array, "P S K V"] | Int8Vectors,
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
    *,
    pages: Int[Array, "B M"],
) -> Float[Array, "B T N V"]:
    """`reference_attention` of each row to the places of its pages, which are its positions 0, 1, ...

    Of `masks` the queries' half counts. The loop goes to the last page of the longest row; to a row that ends
    before, what is behind adds exact zeros. So a row's numbers do not depend on what other rows hold, nor on
    how long they are. Pages in eight bits are made numbers one by one, as they are read.
    Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    keys = jax.tree.map(lambda x: x.transpose(0, 2, 3, 1), k)
    values = jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), v)

    def of(pool: Array | Int8Vectors, page: Array) -> Array:
        found = jax.tree.map(lambda x: x[page], pool)
        return found.floats(q.dtype) if isinstance(found, Int8Vectors) else found

    def fetch(number: Array) -> tuple[Array, Array]:
        page = jax.lax.dynamic_index_in_dim(pages, number, axis=1, keepdims=False)
        return of(keys, page), of(values, page)

    return online_attention(q, fetch, masks, scores, sinks)


def online_attention(
    q: Float[Array, "B T N H"],
    fetch: Callable[[Array], tuple[Array, Array]],
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """Attention to keys [B, K, H, S] and values [B, K, S, V] that `fetch` gives of each row, S places a time.

    As many times as the last query needs; what is behind a query adds exact zeros.
    """
    batch, length, heads, size = q.shape
    _, kv_heads, places, value_size = jax.eval_shape(fetch, jnp.int32(0))[1].shape
    groups = heads // kv_heads
    rows = q.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * length, size)
    # A query that is padding stands before all keys, and sees none.
    position = jnp.where(masks.q_segments > 0, masks.q_positions, -1)
    last = jnp.max(position)
    position = jnp.tile(position, (1, groups))[:, None, :, None]

    def turn(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        keys, values = fetch(number)
        products = jnp.einsum("BKRH,BKHS->BKRS", rows, keys, preferred_element_type=F32)
        bounded = scores.bounded(products * scores.scale)
        distance = position - (number * places + jnp.arange(places))
        seen = distance >= 0 if scores.window is None else (distance >= 0) & (distance < scores.window)
        bounded = jnp.where(seen, bounded, UNSEEN)
        higher = jnp.maximum(top, jnp.max(bounded, axis=-1, keepdims=True))
        weights, fade = jnp.exp(bounded - higher), jnp.exp(top - higher)
        mixed = jnp.einsum(
            "BKRS,BKSV->BKRV", weights.astype(values.dtype), values, preferred_element_type=F32
        )
        return higher, total * fade + jnp.sum(weights, axis=-1, keepdims=True), out * fade + mixed

    shape = (batch, kv_heads, groups * length)
    top, total = jnp.full((*shape, 1), LOWEST, F32), jnp.zeros((*shape, 1), F32)
    if sinks is not None:
        top = jnp.broadcast_to(sinks_of_rows(sinks, kv_heads, length)[None, :, :, None], top.shape)
        total = jnp.ones_like(total)
    carry = (top, total, jnp.zeros((*shape, value_size), F32))
    _, total, out = jax.lax.fori_loop(0, last // places + 1, turn, carry)
    out = out / jnp.maximum(total, TINY)
    out = out.reshape(batch, kv_heads, groups, length, value_size).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, value_size).astype(q.dtype)
