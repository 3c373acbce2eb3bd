"""Attention as a plain masked einsum, and the same numbers with the queries processed in blocks.

B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H head size of
queries and keys, V that of values (the same but for latent attention).
Query i sees key j where both lie in the same document (equal segment, not 0), j is not later than i,
and, with a window, i is less than `window` positions behind j's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels.names import ATTENTION_OUTPUT

# Queries whose scores exist at once in `chunked_attention`: [B, N, 256, S], by which the planner counts too.
QUERY_BLOCK = 256


class Masks(NamedTuple):
    """Where queries and keys lie: in which place of their document, and in which document of their row.

    Positions count tokens from any start; a segment is a document's number in its row, 0 for padding. A tuple
    and no dataclass, so that it is a tree of arrays (or of shapes, or of shardings) without more words.
    """

    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]

    @classmethod
    def of_rows(cls, positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> "Masks":
        """The masks of rows that attend to themselves."""
        return cls(positions, positions, segments, segments)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How scores are made of products, and which count: static, one value for each kind of layer.

    A score is cap(scale * q·k), where cap(s) = softcap * tanh(s / softcap) bounds it (Gemma 2). window:
    positions that a query sees, itself included; None: all before it.
    """

    window: int | None = None
    softcap: float | None = None
    scale: float

    def bounded(self, scores: Array) -> Array:
        """Scores as the softmax takes them: scaled products, capped where there is a soft cap."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def slope(self, bounded: Array) -> Array:
        """The derivative of `bounded` by what it was made of, from its value; for a soft cap alone."""
        assert self.softcap is not None
        return 1.0 - jnp.square(bounded / self.softcap)


def attention_mask(masks: Masks, window: int | None) -> Bool[Array, "B T S"]:
    """True where a query may see a key. Segment 0 is padding: it sees nothing and nothing sees it."""
    distance = masks.q_positions[:, :, None] - masks.kv_positions[:, None, :]
    same = masks.q_segments[:, :, None] == masks.kv_segments[:, None, :]
    mask = same & (masks.q_segments > 0)[:, :, None] & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """Masked attention with the softmax in float32 and K/V heads shared by G = N/K query heads.

    sinks: a score a head of a key that every query sees, whose value is zero (GPT-OSS). A padding query gives
    zeros. Holds [B, N, T, S] scores; see `chunked_attention` for long sequences.
    """
    batch, length, heads, size = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    # Queries that share a K/V head become rows R = G*T of one matrix: two plain batched products, no repeated
    # K or V. Four dims and a single `where` keep XLA's CPU loops vectorized: three times as fast as the
    # obvious form.
    rows = q.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * length, size)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    products = jnp.einsum("BKRH,BKSH->BKRS", rows, keys, preferred_element_type=jnp.float32)
    bounded = scores.bounded(products * scores.scale)
    mask = attention_mask(masks, scores.window)
    seen = jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], bounded, -1e30)
    top = jnp.max(seen, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks_of_rows(sinks, kv_heads, length)[:, :, None]
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(seen - top)
    out = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(v.dtype), values)
    # Divided after the product: a quotient for each element of the output and not for each weight.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    out = out.astype(jnp.float32) / total
    out = out.reshape(batch, kv_heads, groups, length, v.shape[-1]).transpose(0, 3, 1, 2, 4)
    out = out.reshape(batch, length, heads, v.shape[-1])
    # A padding query saw every key alike; it is to see none.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, 0.0).astype(q.dtype)


def sinks_of_rows(sinks: Float[Array, " N"], kv_heads: int, length: int) -> Float[Array, "K R"]:
    """Each head's sink for its `length` queries, as rows R = G*T that share a K/V head; float32."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, -1), length, axis=1)


def chunked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
    *,
    block: int = QUERY_BLOCK,
) -> Float[Array, "B T N V"]:
    """`reference_attention` for one block of queries at a time, scores recomputed in the backward pass.

    Nothing larger than [B, N, block, S] lives, so memory grows with T and not with T².
    `block` is lowered to a divisor of T.
    """
    size = largest_divisor(q.shape[1], block)

    @jax.checkpoint
    def attend_block(queries: tuple[Array, Array, Array]) -> Array:
        # A mask that hangs on positions alone is the same for every layer: left to itself, JAX would make the
        # masks of all blocks before the loop over layers, and keep them: T² again.
        q_block, positions, segments = jax.lax.optimization_barrier(queries)
        return reference_attention(
            q_block, k, v, masks._replace(q_positions=positions, q_segments=segments), scores, sinks
        )

    blocks = jax.tree.map(lambda a: split_length(a, size), (q, masks.q_positions, masks.q_segments))
    return join_length(jax.lax.map(attend_block, blocks))


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    masks: Masks,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention` by XLA's own operations, with the exact mask; holds [B, N, T, S] scores.

    Raises ValueError for a soft cap and for sinks, which it does not know.
    """
    if sinks is not None:
        raise ValueError(
            "training.attention=xla has no attention sinks (model.attention_sinks=true); "
            "use model.attention_sinks=false, or use training.attention=chunked"
        )
    if scores.softcap is not None:
        raise ValueError(
            f"training.attention=xla cannot bound scores (model.attention_softcap={scores.softcap}); "
            "use model.attention_softcap=null, or use training.attention=chunked"
        )
    mask = attention_mask(masks, scores.window)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scores.scale, implementation="xla")
    # A padding query saw every key alike; it is to see none.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, 0)


# -- for kernels with a backward of their own --------------------------------------------------------------


def with_backward(
    forward: Callable[..., Any], backward: Callable[..., Any], qkv: tuple[Array, ...], masks: Masks
) -> Array:
    """Attention by `forward(q, k, v, masks) -> (output, statistics)`, whose gradient is `backward`'s.

    backward: `(q, k, v, masks, output, statistics, cotangent) -> gradients of q, k and v`.
    """

    @jax.custom_vjp
    def attend(*args: Any) -> Array:
        return forward(*args)[0]

    def attend_forward(*args: Any) -> tuple[Array, tuple[Any, ...]]:
        # Named, so that a policy can keep them: the kernel is then not run again in the backward pass.
        out, stats = (checkpoint_name(x, ATTENTION_OUTPUT) for x in forward(*args))
        return out, (*args, out, stats)

    def attend_backward(saved: tuple[Any, ...], cotangent: Array) -> tuple[Array | None, ...]:
        return (*backward(*saved, cotangent), None)  # nothing by the masks, which are integers

    attend.defvjp(attend_forward, attend_backward)
    return attend(*qkv, masks)


def document_begins(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a token that is not padding has another segment before it, or none."""
    return (segments > 0) & (segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1])


def in_order(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """Whether documents are runs of one segment, of numbers that grow, in which positions grow by one."""
    # Segments that grow, not merely change: a document that comes back later in its row would be one segment
    # in two places, which no kernel here can be told of.
    goes_on = positions[:, 1:] == positions[:, :-1] + 1
    grows = segments[:, 1:] > jax.lax.cummax(segments, axis=1)[:, :-1]
    ordered = jnp.where(document_begins(segments)[:, 1:], grows, goes_on)
    return jnp.all(ordered | (segments[:, 1:] == 0), axis=1)


# -- blocks of positions -----------------------------------------------------------------------------------


def largest_divisor(length: int, limit: int) -> int:
    """The largest divisor of `length` that is at most `limit`, and at least 1."""
    return next(size for size in range(max(1, min(limit, length)), 0, -1) if length % size == 0)


def split_length(x: Array, size: int) -> Array:
    """[B, T, ...] as [T/size, B, size, ...]: what a scan over blocks of positions takes."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def join_length(x: Array) -> Array:
    """Put blocks of positions together again: the inverse of `split_length`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
