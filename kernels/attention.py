"""Attention as a plain masked einsum, and the same numbers with the queries processed in blocks.

B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H head size of
queries and keys, V that of values (the same but for latent attention).
Query i sees key j where both lie in the same document (equal segment, not 0), j is not later than i,
and, with a window, i is less than `window` positions behind j's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels.names import ATTENTION_OUTPUT

QUERY_BLOCK = 256


def attention_mask(
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """True where a query may see a key. Segment 0 is padding: it sees nothing and nothing sees it."""
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    mask = same & (q_segments > 0)[:, :, None] & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float,
) -> Float[Array, "B T N V"]:
    """Masked attention with the softmax in float32 and K/V heads shared by G = N/K query heads.

    `softcap` bounds the scores: cap * tanh(score / cap) (Gemma 2). A padding query gives zeros.
    Holds [B, N, T, S] scores; see `chunked_attention` for long sequences.
    """
    batch, length, heads, size = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    # Queries that share a K/V head become rows R = G*T of one matrix: two plain batched products, no repeated
    # K or V. Four dims and a single `where` keep XLA's CPU loops vectorized: three times as fast as the
    # obvious form.
    rows = q.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * length, size)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, keys, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = attention_mask(q_positions, kv_positions, q_segments, kv_segments, window)
    scores = jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(v.dtype), values)
    out = out.astype(jnp.float32) / jnp.sum(weights, axis=-1, keepdims=True)
    out = out.reshape(batch, kv_heads, groups, length, v.shape[-1]).transpose(0, 3, 1, 2, 4)
    out = out.reshape(batch, length, heads, v.shape[-1])
    # A padding query saw every key alike; it is to see none.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, 0.0).astype(q.dtype)


def chunked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float,
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
            q_block,
            k,
            v,
            q_positions=positions,
            kv_positions=kv_positions,
            q_segments=segments,
            kv_segments=kv_segments,
            window=window,
            softcap=softcap,
            scale=scale,
        )

    blocks = jax.tree.map(lambda a: split_length(a, size), (q, q_positions, q_segments))
    return join_length(jax.lax.map(attend_block, blocks))


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    window: int | None = None,
    softcap: float | None = None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention` by XLA's own operations, with the exact mask; holds [B, N, T, S] scores.

    Raises ValueError for `softcap`, which it does not know.
    """
    if softcap is not None:
        raise ValueError(
            f"training.attention=xla cannot bound scores (model.attention_softcap={softcap}); "
            "use model.attention_softcap=null, or use training.attention=chunked"
        )
    mask = attention_mask(q_positions, kv_positions, q_segments, kv_segments, window)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="xla")
    # A padding query saw every key alike; it is to see none.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, 0)


# -- for kernels with a backward of their own --------------------------------------------------------------


def with_backward(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    qkv: tuple[Array, ...],
    masks: tuple[Array, ...],
) -> Array:
    """Attention by `forward(*qkv, *masks) -> (output, statistics)`, whose gradient is `backward`'s.

    backward: `(*qkv, *masks, output, statistics, cotangent) -> gradients of q, k and v`.
    """

    @jax.custom_vjp
    def attend(*args: Array) -> Array:
        return forward(*args)[0]

    def attend_forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
        # Named, so that a policy can keep them: the kernel is then not run again in the backward pass.
        out, stats = (checkpoint_name(x, ATTENTION_OUTPUT) for x in forward(*args))
        return out, (*args, out, stats)

    def attend_backward(saved: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
        return (*backward(*saved, cotangent), None, None, None, None)

    attend.defvjp(attend_forward, attend_backward)
    return attend(*qkv, *masks)


def document_begins(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a token that is not padding has another segment before it, or none."""
    return (segments > 0) & (segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1])


def in_order(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """Whether documents are runs of one segment, of numbers that grow, in which positions grow by one."""
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
    """The inverse of `split_length`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
