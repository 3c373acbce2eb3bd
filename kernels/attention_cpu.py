"""Attention for CPUs: some rows at a time, blocks of queries with the keys up to their end, its own backward.

B batch, T position, N query heads, K key/value heads, G = N/K, H head size of queries and keys, V that of
values; Q positions in a block of queries, S those up to its end, R = G*Q rows that share a K/V head.

Forward keeps the output and each query's log-sum-exp; backward makes a block's weights again from them
(FlashAttention, Dao et al. 2022, arXiv:2205.14135, without its loop over keys). Keys behind a block's end are
never multiplied, which halves the work on long rows. The scores of some rows, [K, R, S] each, stay in the
caches.

What looks odd here is written for XLA:CPU as measured (`benchmarks/kernels.py`): it has fast kernels for
products that contract the last dim of the first factor, in bfloat16 for no other, and it folds transposes
into products unless a loop stands between them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import (
    Masks,
    Scores,
    attention_mask,
    join_length,
    largest_divisor,
    sinks_of_rows,
    split_length,
)
from kernels.einsum_cpu import materialize
from kernels.names import ATTENTION_OUTPUT

F32 = jnp.float32
UNSEEN, LOWEST = -1e30, -1e20  # a score that is not seen, and the least maximum that scores are taken to have
# What a query that sees nothing is divided by: its weights sum to 0.
TINY = 1e-30
BLOCKS = 8  # of a row at most: each is compiled by itself
LEAST = 128  # queries in a block, where a row has so many: smaller products are slower than what they save
# Bytes of one block's scores, of all rows that are worked on together: few enough for the caches, and enough
# that both threads have something to do in each of a dozen operations.
TOGETHER = 3 << 20


def fused_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
    *,
    block: int | None = None,
    dtype: Any = None,
) -> Float[Array, "B T N V"]:
    """`reference_attention` of rows with themselves, their documents in order.

    A row in which what a query sees is no stretch of keys that ends with it (permuted positions) comes back
    as nan. `block`: queries at a time, lowered to a divisor of T; by default an eighth of T, and at least
    128. `dtype`: what the factors of products are rounded to, those of gradients too; by default q's own.
    Raises ValueError where queries and keys are not of one row.
    """
    length = q.shape[1]
    if k.shape[1] != length:
        raise ValueError(
            f"training.attention=fused needs queries and keys of one row, not {length} and {k.shape[1]} "
            "positions; use training.attention=chunked"
        )
    size = largest_divisor(length, block or max(LEAST, -(-length // BLOCKS)))
    spec = BlockSpec(scores, size, jnp.dtype(dtype or q.dtype))
    # What a query sees in a row of documents in order is one stretch of keys that ends with itself, so a mask
    # [T, T] shrinks to one number a query; `exact` says where it did not.
    first, exact = first_seen(masks, scores.window, size)
    rows, keys, values = _rows(q, k.shape[2], spec), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    # An empty tuple where there are none: a static choice, which leaves nothing in the program.
    by_row = () if sinks is None else (sinks_of_rows(sinks, k.shape[2], size),)
    out = _attend(rows, keys, values, first, by_row, spec)
    # Traced code cannot raise: nan reaches the loss, and the run stops there, where a wrong number would
    # train on.
    return jnp.where(exact[:, None, None, None], _positions(out, length), jnp.nan)


def first_seen(masks: Masks, window: int | None, block: int) -> tuple[Int[Array, "B T"], Bool[Array, " B"]]:
    """The first key that each query sees (T where none), and whether rows see all from it to themselves."""
    length = masks.q_positions.shape[1]
    # In blocks of queries as well, or finding out would need the [T, T] mask that the kernel avoids.
    keys = jnp.arange(length, dtype=jnp.int32)

    def look(queries: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        index, positions, segments = queries
        mask = attention_mask(masks._replace(q_positions=positions, q_segments=segments), window)
        first = jnp.where(jnp.any(mask, axis=2), jnp.argmax(mask, axis=2).astype(jnp.int32), length)
        stretch = (keys >= first[..., None]) & (keys <= index[..., None])
        return first, jnp.all(mask == stretch, axis=2)

    index = jnp.broadcast_to(keys, masks.q_positions.shape)
    blocks = tuple(split_length(x, block) for x in (index, masks.q_positions, masks.q_segments))
    first, exact = (join_length(x) for x in jax.lax.map(look, blocks))
    return first, jnp.all(exact, axis=1)


@dataclass(frozen=True)
class BlockSpec:
    """Static options of the kernel: how scores are made, queries in a block, what factors are rounded to."""

    scores: Scores
    block: int
    dtype: Any

    def bounds(self, first: Int[Array, " T"], rows: int) -> Iterator[tuple[int, Array, np.ndarray]]:
        """Of each block: the end of its keys, the first key [R] and the last [R] that its rows may see.

        As float32 arrays made beforehand: XLA's loops over scores are vectors only where they read these.
        """
        groups = rows // self.block
        for end in range(self.block, first.shape[0] + 1, self.block):
            low = jnp.tile(first[None, end - self.block : end].astype(F32), (groups, 1))
            high = np.tile(np.arange(end - self.block, end, dtype=np.float32), groups)
            yield end, materialize(low).reshape(rows), high

    def dot(self, spec: str, a: Array, b: Array) -> Array:
        """The einsum of factors rounded to `dtype`, added up in float32."""
        return jnp.einsum(spec, a.astype(self.dtype), b.astype(self.dtype), preferred_element_type=F32)

    def scaled(self, x: Array) -> Array:
        """Queries, or keys, times the scale of scores; rounded once, as their dtype asks."""
        return (x.astype(F32) * self.scores.scale).astype(x.dtype)

    def slope(self, bounded: Array) -> Array | float:
        """The derivative of bounded scores by the scaled products that they were made of."""
        return 1.0 if self.scores.softcap is None else self.scores.slope(bounded)


def _rows(q: Array, kv_heads: int, spec: BlockSpec) -> Array:
    """[B, T, N, H] to [B, K, blocks, R, H]: the queries that are multiplied with the same keys."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length // spec.block, spec.block, kv_heads, heads // kv_heads, size)
    return q.transpose(0, 3, 1, 4, 2, 5).reshape(batch, kv_heads, length // spec.block, -1, size)


def _positions(x: Array, length: int) -> Array:
    """[B, K, blocks, R, H] to [B, T, N, H]: the inverse of `_rows`."""
    batch, kv_heads, blocks, rows, size = x.shape
    block = length // blocks
    x = x.reshape(batch, kv_heads, blocks, rows // block, block, size).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, length, -1, size)


def _some_rows(function: Callable[..., Any], q: Array, k: Array, *args: Array) -> Any:
    """`function` of each row, of so many at once that their scores fit the caches: a batch's do not."""
    batch, kv_heads, _, rows, _ = q.shape
    each = 4 * kv_heads * rows * k.shape[2]
    # Twice at least: a loop of one turn is none, and what stands before it would be folded into products that
    # XLA:CPU has no kernels for.
    together = largest_divisor(batch, min(TOGETHER // each, batch // 2))
    return jax.lax.map(
        lambda row: function(*row), (q, k, *args), batch_size=together if together > 1 else None
    )


Sinks = tuple[Array, ...]  # none, or one [K, R]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, first: Array, sinks: Sinks, spec: BlockSpec) -> Array:
    return _some_rows(partial(_forward_row, spec, sinks), q, k, v, first)[0]


def _forward(q: Array, k: Array, v: Array, first: Array, sinks: Sinks, spec: BlockSpec) -> Any:
    out, stats = _some_rows(partial(_forward_row, spec, sinks), q, k, v, first)
    # Named, so that a policy of rematerialization can keep them: the forward is then not run again.
    out, stats = (checkpoint_name(x, ATTENTION_OUTPUT) for x in (out, stats))
    return out, (q, k, v, first, out, stats, sinks)


def _backward(spec: BlockSpec, saved: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    q, k, v, first, out, stats, sinks = saved
    columns = jnp.swapaxes(
        spec.scaled(k), 2, 3
    )  # made here: inside the loop it would be folded into a product
    grads = _some_rows(partial(_backward_row, spec), q, k, columns, v, first, out, stats, cotangent)
    # Its weight times what every weight loses because they sum to one: its own value is zero.
    shared = [jnp.sum(cotangent.astype(F32) * out.astype(F32), axis=-1) for _ in sinks]
    dsinks = tuple(
        -jnp.sum(jnp.exp(sink[:, None] - stats) * delta, axis=(0, 2))
        for sink, delta in zip(sinks, shared, strict=True)
    )
    return (*grads, None, dsinks)


_attend.defvjp(_forward, _backward)


def _forward_row(
    spec: BlockSpec, sinks: Sinks, q: Array, k: Array, v: Array, first: Array
) -> tuple[Array, Array]:
    """Output [K, blocks, R, V] and log-sum-exp; q [K, blocks, R, H], k [K, T, H], v [K, T, V]."""
    outs, stats = [], []
    q = spec.scaled(q)
    for i, (end, low, high) in enumerate(spec.bounds(first, q.shape[2])):
        scores = spec.scores.bounded(spec.dot("KRH,KSH->KRS", q[:, i], k[:, :end]))
        key = jnp.arange(end, dtype=F32)
        scores = jnp.where((key >= low[:, None]) & (key <= high[:, None]), scores, UNSEEN)
        # Not as low as what is unseen, so that a query that sees nothing weighs nothing.
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), LOWEST)
        for sink in sinks:
            top = jnp.maximum(top, sink[..., None])
        weights = jnp.exp(scores - top)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), TINY)
        for sink in sinks:
            total = total + jnp.exp(sink[..., None] - top)
        outs.append((spec.dot("KRS,KSV->KRV", weights, v[:, :end]) / total).astype(v.dtype))
        stats.append((top + jnp.log(total))[..., 0])
    return jnp.stack(outs, axis=1), jnp.stack(stats, axis=1)


def _backward_row(
    spec: BlockSpec,
    q: Array,
    k: Array,
    columns: Array,
    v: Array,
    first: Array,
    out: Array,
    stats: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; columns: k scaled, [K, H, T].

    Scores are [S, R] here, so that no product contracts rows of both factors.
    """
    # sum_s weight_s * dweight_s, which the softmax's derivative takes off every dweight; by the output it
    # costs T * V products and no scores.
    delta = jnp.sum(cotangent.astype(F32) * out.astype(F32), axis=-1)
    q = spec.scaled(q)
    # Keys get gradients from every block that sees them: summed in float32, whatever factors are rounded to.
    dq, dk, dv = [], jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32)
    for i, (end, low, high) in enumerate(spec.bounds(first, q.shape[2])):
        scores = spec.scores.bounded(spec.dot("KSH,KRH->KSR", k[:, :end], q[:, i]))
        key = jnp.arange(end, dtype=F32)[:, None]
        seen = (key >= low) & (key <= high)
        weights = jnp.exp(jnp.where(seen, scores, UNSEEN) - stats[:, i, None])
        # The choice changes nothing, weights are 0 there: it keeps XLA from one slow fusion of three lines.
        dweights = jnp.where(seen, spec.dot("KSV,KRV->KSR", v[:, :end], cotangent[:, i]), 0.0)
        dscores = weights * (dweights - delta[:, i, None]) * spec.slope(scores)
        dv = dv.at[:, :end].add(spec.dot("KSR,KRV->KSV", weights, cotangent[:, i]))
        dk = dk.at[:, :end].add(spec.dot("KSR,KRH->KSH", dscores, q[:, i]))
        dq.append(spec.dot("KHS,KSR->KHR", columns[..., :end], dscores))
    by_query = jnp.swapaxes(jnp.stack(dq, axis=1), 2, 3)
    return by_query.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
