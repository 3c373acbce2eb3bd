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

from kernels.backends import LANES, Wanted, problem
from parallel.attention.context import HEADS, TOKENS, Placement, differentiable, split_heads
from parallel.attention.cudnn import in_order
from parallel.attention.ring import ATTENTION_OUTPUT, AXIS
from parallel.axes import Layout

BLOCK = 512  # positions of a tile; lowered to a divisor of the row
INTERPRET = False  # tests run the kernels on CPU


def splash_attention(layout: Layout) -> Callable[..., Array]:
    """Attention over global arrays, rows and heads split as the layout's rules say, rows whole.

    Pallas kernels cannot be partitioned, so they stand in a `shard_map` with every mesh axis manual. Raises
    ValueError where the devices are no TPUs or rows are split over mesh.context, and, when called, for what
    the kernel cannot do.
    """
    device = layout.mesh.devices.flat[0]
    check(Wanted(platform="tpu" if INTERPRET else device.platform))
    if layout.ways("length") > 1:
        raise ValueError(
            "training.attention=splash needs whole rows here, but mesh.rules.length splits them over "
            f"{layout.ways('length')} devices; use context.attention=ulysses or mesh.context=1"
        )
    local = splash_kernel()

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K W"],
        *,
        q_positions: Int[Array, "B T"],
        kv_positions: Int[Array, "B T"],
        q_segments: Int[Array, "B T"],
        kv_segments: Int[Array, "B T"],
        **options: Any,
    ) -> Float[Array, "B T N W"]:
        k, v = (split_heads(x, layout.ways("act_heads")) for x in (k, v))
        what = "training.attention=splash"
        query, key, value = (layout.spec(HEADS, x.shape, what) for x in (q, k, v))
        place = Placement(layout.mesh, (query, key, value), layout.spec(TOKENS, q.shape[:2], what))

        def inner(q: Array, k: Array, v: Array, *masks: Array) -> Array:
            names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
            return local(q, k, v, **dict(zip(names, masks, strict=True)), **options)

        masks = (q_positions, kv_positions, q_segments, kv_segments)
        return differentiable(inner, place, (q, k, v), masks)

    return attention


def splash_kernel(parts: int = 1, *, zigzag: bool = False) -> Callable[..., Array]:
    """Attention for arrays that lie on one device, with the signature of `Ops.attention`.

    For use inside a `shard_map` in which every mesh axis is manual (`context_attention`'s `local`).
    parts: devices along mesh.context that hold the queries of a row while each has all its keys (allgather);
    1: rows are whole. zigzag: whether rows are in `zigzag_order` then. Raises ValueError, when called, for
    what the kernel cannot do.
    """

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K W"],
        *,
        q_positions: Int[Array, "B T"],
        kv_positions: Int[Array, "B S"],
        q_segments: Int[Array, "B T"],
        kv_segments: Int[Array, "B S"],
        window: int | None = None,
        softcap: float | None = None,
        scale: float,
    ) -> Float[Array, "B T N W"]:
        check_shapes(q, k, v, parts, zigzag)
        if parts > 1 and zigzag:
            k, v, kv_positions, kv_segments = (
                text_order(x, parts) for x in (k, v, kv_positions, kv_segments)
            )
        places = query_places(q.shape[1], parts, zigzag)
        positions, segments = (x if parts == 1 else x[:, places] for x in (kv_positions, kv_segments))
        alike = (positions == q_positions) & (segments == q_segments)
        exact = in_order(kv_positions, kv_segments) & jnp.all(alike, axis=1)
        run = kernel(places, k.shape[1], chunk(q.shape[1], zigzag and parts > 1), window, softcap)
        # The kernel multiplies by no scale of its own.
        q_scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
        heads_first = (x.swapaxes(1, 2) for x in (q_scaled, k, v))
        out = jax.vmap(run)(*heads_first, _segment_ids(q_segments, kv_segments)).swapaxes(1, 2)
        # A padding query saw the padding before it; it is to see nothing.
        seen = jnp.where(q_segments > 0, 1.0, 0.0) * jnp.where(exact, 1.0, jnp.nan)[:, None]
        return out * seen[:, :, None, None].astype(out.dtype)

    return attention


def check(wanted: Wanted) -> None:
    """Raise ValueError for what the table says splash cannot do."""
    if (reason := problem("splash", wanted)) is not None:
        raise ValueError(reason)


def check_shapes(q: Array, k: Array, v: Array, parts: int, zigzag: bool) -> None:
    """The same of arrays; and queries must be so large a part of the row as said."""
    part = chunk(q.shape[1], zigzag and parts > 1)
    order = "text" if parts > 1 else "whole"
    kind = "allgather" if parts > 1 else None
    head, value, dtype = q.shape[3], v.shape[3], q.dtype.name
    check(Wanted(head_dim=head, value_dim=value, dtype=dtype, part=part, order=order, context=kind))
    if q.shape[1] * parts != k.shape[1]:
        raise ValueError(
            f"training.attention=splash needs queries and keys of one row, not {q.shape[1]} * {parts} and "
            f"{k.shape[1]} positions; use context.attention=ulysses or mesh.context=1"
        )


def chunk(length: int, zigzag: bool) -> int:
    """Positions of a device's queries that lie together in the text."""
    return length // 2 if zigzag else length


def query_places(length: int, parts: int, zigzag: bool) -> Int[Array, " T"] | Int[np.ndarray, " T"]:
    """The index in its row's text of each query on this device, ascending."""
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    mine, places = jax.lax.axis_index(AXIS), jnp.arange(length, dtype=jnp.int32)
    if not zigzag:
        return mine * length + places
    late = (2 * parts - 1 - mine) * (length // 2) + places - length // 2
    return jnp.where(places < length // 2, mine * (length // 2) + places, late)


def text_order(x: Array, parts: int) -> Array:
    """[B, S, ...] from zigzag order, device after device, to the order of the text."""
    chunks = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def block_size(length: int) -> int:
    """The largest tile that divides so many positions and fills the lanes."""
    return next(n for n in range(min(BLOCK, length), 0, -LANES) if length % n == 0)


def kernel(
    places: Int[Array, " T"] | Int[np.ndarray, " T"],
    keys: int,
    part: int,
    window: int | None,
    softcap: float | None,
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
    by_queries, by_keys = blocks_that_meet(places, keys, rows, columns, window)
    return splash.SplashAttentionKernel(
        by_queries,
        by_queries,
        by_keys,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        mask_function=seen_by(window),
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


def _segment_ids(q_segments: Array, kv_segments: Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    return SegmentIds(q_segments, kv_segments)
