"""Splash attention over packed documents on TPUs: JAX's own Pallas kernels, exact masks, no [T, T] array.

The kernels compute the mask from the places of queries and keys in the row, and from segments. In rows of
documents in order that is `attention_mask`. Blocks of keys that no query of a block can see are never loaded.
A row in any other order comes back as nan, never as something near.

B batch, T query position, S key position, N query heads, K key/value heads, H query and key head size, W
value head size. Inside, heads come first: [B, N, T, H].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.attention import Masks, Scores, in_order
from kernels.backends import LANES, Wanted, problem
from kernels.names import ATTENTION_OUTPUT

BLOCK = 512  # positions of a tile; lowered to a divisor of the row
INTERPRET = False  # tests run the kernels on CPU


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    masks: Masks,
    scores: Scores,
    *,
    places: Int[Array, " T"] | None = None,
    stretch: int | None = None,
) -> Float[Array, "B T N W"]:
    """Attention for arrays that lie on one device whole, with the signature of `Ops.attention`.

    places: index of each query in its row, ascending, where only a part of the row's queries is here;
    `stretch` of them lie together. None: queries and keys are of one whole row. Keys lie in the order of the
    text. Raises ValueError for what the kernel cannot do.
    """
    check_shapes(q, k, v, stretch)
    q_positions, positions, q_segments, segments = masks
    if places is not None:
        positions, segments = positions[:, places], segments[:, places]
    alike = (positions == q_positions) & (segments == q_segments)
    exact = in_order(masks.kv_positions, masks.kv_segments) & jnp.all(alike, axis=1)
    # Of whole rows in numpy, so that which blocks meet is a constant of the program.
    rows = np.arange(q.shape[1], dtype=np.int32) if places is None else places
    run = kernel(rows, k.shape[1], stretch or q.shape[1], scores)
    # The kernel multiplies by no scale of its own.
    # Scaled in float32 and rounded once, or a scale that is no power of two would cost bfloat16 a bit twice.
    q_scaled = (q.astype(jnp.float32) * scores.scale).astype(q.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (q_scaled, k, v))
    out = jax.vmap(run)(*heads_first, _segment_ids(masks)).swapaxes(1, 2)
    # A padding query saw the padding before it; it is to see nothing.
    seen = jnp.where(q_segments > 0, 1.0, 0.0) * jnp.where(exact, 1.0, jnp.nan)[:, None]
    return out * seen[:, :, None, None].astype(out.dtype)


def check_device(device: Any) -> None:
    """Raise ValueError where this device is no TPU."""
    check(Wanted(platform="tpu" if INTERPRET else device.platform))


def check(wanted: Wanted) -> None:
    """Raise ValueError for what the table says splash cannot do."""
    if (reason := problem("splash", wanted)) is not None:
        raise ValueError(reason)


def check_shapes(q: Array, k: Array, v: Array, stretch: int | None) -> None:
    """Raise ValueError for arrays that splash cannot take; `stretch` as in `splash_attention`."""
    sizes: dict[str, Any] = {"head_dim": q.shape[3], "value_dim": v.shape[3], "dtype": q.dtype.name}
    if stretch is not None:
        return check(Wanted(part=stretch, order="text", context="allgather", **sizes))
    check(Wanted(part=q.shape[1], **sizes))
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"training.attention=splash needs queries and keys of one row, not {q.shape[1]} and {k.shape[1]} "
            "positions; use context.attention=ulysses or mesh.context=1"
        )


def block_size(length: int) -> int:
    """The largest tile that divides so many positions and fills the lanes."""
    # A tile has to divide the positions and to consist of whole vector registers; below that, fewer and
    # larger ones are fewer steps of the grid.
    return next(n for n in range(min(BLOCK, length), 0, -LANES) if length % n == 0)


def kernel(
    places: Int[Array, " T"] | Int[np.ndarray, " T"],
    keys: int,
    part: int,
    scores: Scores,
) -> Callable[..., Any]:
    """JAX's kernel for one row: (q [N, T, H], k [K, S, H], v [K, S, W], segments) -> [N, T, W].

    places: index of each query in a row of `keys` positions; `part` of them lie together.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    rows, columns = block_size(part), block_size(keys)
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    by_queries, by_keys = blocks_that_meet(places, keys, rows, columns, scores.window)
    return splash.SplashAttentionKernel(
        by_queries,
        by_queries,
        by_keys,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=scores.softcap,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        mask_function=seen_by(scores.window),
        interpret=INTERPRET,
    )


@functools.cache
def seen_by(window: int | None) -> Callable[[Any, Any], Any]:
    """The mask of places in a row; cached, so that a layer's kernel is traced once."""

    def seen(query: Any, key: Any) -> Any:
        behind = query - key
        return behind >= 0 if window is None else (behind >= 0) & (behind < window)

    return seen


def blocks_that_meet(
    places: Int[Array, " T"] | Int[np.ndarray, " T"],
    keys: int,
    rows: int,
    columns: int,
    window: int | None,
) -> tuple[Any, Any]:
    """Which blocks of keys each block of queries visits, and the reverse, as the kernels take them.

    The places of a block are consecutive and blocks ascend, so that what a block meets is a range: the n-th
    visit is to the n-th block of it, and visits past its end do nothing. The library's own builder evaluates
    every [rows, columns] of the mask on the host, which is as slow as T² and cannot know places that depend
    on the device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    xp: Any = np if isinstance(places, np.ndarray) else jnp
    blocks, count = places.shape[0] // rows, keys // columns
    first, last = places[::rows], places[rows - 1 :: rows]  # of each block of queries
    starts = np.arange(0, keys, columns, dtype=np.int32)
    ends, reach = starts + columns - 1, keys if window is None else window - 1
    # Ranges, both ends in it; -1 for its last block where a block of keys is met by no query.
    low = xp.maximum(first - reach, 0) // columns
    high = last // columns
    low_q = xp.sum(last[None, :] < starts[:, None], axis=1)
    high_q = xp.sum(first[None, :] <= ends[:, None] + reach, axis=1) - 1
    # Static bounds of how many blocks one may meet: with a window few, so that the grid of the kernel is as
    # long as the work and not as the row.
    width = min(count, -(-(reach + rows - 1) // columns) + 1)
    height = min(blocks, -(-(reach + columns - 1) // rows) + 1)

    def visits(low: Any, high: Any, number: int, limit: int, axis: int) -> tuple[Any, Any]:
        step = np.arange(number, dtype=np.int32)
        met = xp.expand_dims(low, 1 - axis) + xp.expand_dims(step, axis)
        within = met <= xp.expand_dims(high, 1 - axis)
        met = xp.clip(xp.minimum(met, xp.expand_dims(high, 1 - axis)), 0, limit - 1)
        small = np.int8 if limit <= 128 else np.int16  # scalar memory is scarce
        return met[None].astype(small), within[None].astype(np.int8)

    def info(next_block: Any, within: Any) -> Any:
        arrays: Any = (jnp.asarray(next_block), None, jnp.asarray(within), None, jnp.asarray(places))
        return MaskInfo(*arrays)

    by_queries = visits(low, high, width, count, axis=0)  # [1, blocks, width]
    by_keys = visits(low_q, high_q, height, blocks, axis=1)  # [1, height, count]
    return info(*by_queries), info(*by_keys)


def _segment_ids(masks: Masks) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    return SegmentIds(masks.q_segments, masks.kv_segments)
