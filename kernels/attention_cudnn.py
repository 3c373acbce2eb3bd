"""cuDNN's fused attention over packed documents: exact masks, no [T, T] array, on Hopper and later.

A row of several documents is handed over as what cuDNN calls ragged: every document is a sequence of its own,
with the place where it starts and its length, and is causal within itself. That is `attention_mask` without a
mask. The masks of the interface may ask for more than documents in order (rows cut up or permuted, more
documents than `max_documents`); such a row comes back as nan, never as something near.

B batch, T position, N query heads, K key/value heads, H head size, M documents a row at most, I = B * M
(M = 1: B) places in the list of documents.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import Masks, Scores, document_begins, in_order, with_backward
from kernels.backends import ELSE, Wanted, facts_of, problem


def check(wanted: Wanted) -> None:
    """Raise ValueError for what the table of backends says cuDNN cannot do."""
    if (reason := problem("cudnn", wanted)) is not None:
        raise ValueError(reason)


def check_devices(devices: Any, max_documents: int) -> None:
    """Raise ValueError where these devices have no such kernel."""
    check(Wanted(packed=max_documents > 1, **facts_of(devices[0])))


def check_documents(segments: Int[np.ndarray, "B T"], max_documents: int) -> None:
    """Raise ValueError where a row, its documents numbered from 1, holds more than the kernel can take.

    For batches on the host, before a step: on the device such a row is nan.
    """
    most = int(np.max(segments, initial=0))
    if most > max_documents:
        raise ValueError(
            f"training.attention=cudnn: a row holds {most} documents, but training.max_documents="
            f"{max_documents}; use training.max_documents={2 ** (most - 1).bit_length()}, a shorter "
            f"data.seq_len, {ELSE}"
        )


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    masks: Masks,
    scores: Scores,
    *,
    max_documents: int,
) -> Float[Array, "B T N H"]:
    """Attention for arrays that lie on one device whole, with the signature of `Ops.attention`.

    max_documents: M; a row with more is refused by nan. Memory of the backward pass grows with it: 4*B*M*N*T
    bytes. 1 means rows that are not packed. Raises ValueError for what cuDNN cannot do.
    """
    kernel = prepare(q, k, v, scores, max_documents)
    return with_backward(kernel.forward, kernel.backward, (q, k, v), masks)


def prepare(q: Array, k: Array, v: Array, scores: Scores, max_documents: int) -> "CudnnKernel":
    """The kernel for such arrays. Raises ValueError for what cuDNN cannot do."""
    check(Wanted(head_dim=q.shape[3], value_dim=v.shape[3], softcap=scores.softcap, dtype=q.dtype.name))
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"training.attention=cudnn needs queries and keys of one row, not {q.shape[1]} and {k.shape[1]} "
            "positions; use context.attention=ulysses or mesh.context=1"
        )
    return CudnnKernel(scores, max_documents)


@dataclass(frozen=True)
class DocumentRanges:
    """The documents of all rows in one list, as cuDNN takes them, unused places at its end.

    starts: index of the first token among all B*T, B*T where unused. lengths: 0 where unused. Where M is 1 a
    row is a document: lengths are of rows and starts are not used. exact: whether this says all that the
    masks of a row say. real: not padding.
    """

    starts: Int[Array, " I"]
    lengths: Int[Array, " I"]
    exact: Bool[Array, " B"]
    real: Bool[Array, "B T"]

    def lengths_and_offsets(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]
    ) -> tuple[Array, Array, Array, Array]:
        """Lengths and offsets of queries, then of keys, as the kernel takes them.

        Lengths are [B, M] (M = 1: [B]), offsets [B, M + 1] in elements: keys have a stride of their own.
        Both are lists that only look like rows.
        """
        rows = self.real.shape[0]
        # One document a row is cuDNN's ordinary padded form: without offsets it takes kernels that know no
        # ragged rows, which are the only ones before Hopper.
        if self.lengths.size == rows:
            unused = jnp.zeros(0, q.dtype)
            return self.lengths, self.lengths, unused, unused
        lengths = self.lengths.reshape(rows, -1)
        # One entry more than places in each row, as the shape [B, M + 1] demands; the kernel reads one flat
        # list, and what its last places say is the end of memory.
        starts = jnp.pad(self.starts, (0, rows), constant_values=self.real.size).reshape(rows, -1)
        # In elements: a token of keys is shorter than one of queries where K/V heads are shared.
        q_offsets, kv_offsets = (starts * (x.shape[2] * x.shape[3]) for x in (q, k))
        return lengths, lengths, q_offsets, kv_offsets


def find_documents(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"], max_documents: int
) -> DocumentRanges:
    """Documents of rows: runs of one segment, of numbers that grow, in which positions grow by one.

    Where they start to count is free: a document that was cut goes on where it stopped. Rows with more than
    `max_documents`, or in any other order, are not exact. Segment 0 is padding.
    """
    real = segments > 0
    # Beginnings and ends are found by comparing neighbours and counted by a running sum: no sort, no loop
    # over documents, and the list has a static size whatever a batch holds.
    begins, after = document_begins(segments), jnp.pad(segments, ((0, 0), (0, 1)))
    ends = real & (segments != after[:, 1:])
    counts = jnp.sum(begins, axis=1)
    # A row with more documents than its share takes places too: rows behind it are exact only where what came
    # before left them theirs.
    in_list = jnp.cumsum(counts) <= counts.size * max_documents
    exact = in_order(positions, segments) & (counts <= max_documents) & in_list
    if max_documents == 1:
        lengths = jnp.sum(real, axis=1, dtype=jnp.int32)
        return DocumentRanges(jnp.zeros_like(lengths), lengths, exact & (real[:, 0] | (counts == 0)), real)
    starts, stops = (nth_true(x.reshape(-1), counts.size * max_documents) for x in (begins, ends))
    lengths = jnp.where(starts < real.size, stops - starts + 1, 0)
    return DocumentRanges(starts, lengths, exact, real)


def nth_true(flags: Bool[Array, " L"], count: int) -> Int[Array, " count"]:
    """Indices of the first `count` that are true, L where there are fewer."""
    wanted = jnp.arange(1, count + 1, dtype=jnp.int32)
    seen = jnp.cumsum(flags, dtype=jnp.int32)
    return jnp.searchsorted(seen, wanted, method="compare_all").astype(jnp.int32)  # one fused reduction


@dataclass(frozen=True)
class CudnnKernel:
    """cuDNN's forward and backward on one device's arrays; both may be vmapped."""

    scores: Scores
    max_documents: int

    def forward(self, *args: Any) -> tuple[Array, Array]:
        """(q, k, v, masks) -> output [B, T, N, H], and statistics of the softmax [B, M, N, T]."""
        return folded(self._forward)(*args)

    def backward(self, *args: Any) -> tuple[Array, Array, Array]:
        """(q, k, v, masks, output, statistics, cotangent) -> gradients of q, k and v."""
        return folded(self._backward)(*args)

    def _forward(self, q: Array, k: Array, v: Array, masks: Masks) -> tuple[Array, Array]:
        documents = self._documents(q, masks)
        ranges = documents.lengths_and_offsets(q, k)
        out, stats = fused_forward(q, k, v, *ranges, self.scores.scale, self._window(q))
        return only_exact(out, documents), stats.reshape(q.shape[0], -1, *stats.shape[1:])

    def _backward(
        self, q: Array, k: Array, v: Array, masks: Masks, out: Array, stats: Array, cotangent: Array
    ) -> tuple[Array, ...]:
        documents = self._documents(q, masks)
        ranges = documents.lengths_and_offsets(q, k)
        stats = stats.reshape(-1, *stats.shape[2:])
        grads = fused_backward(q, k, v, *ranges, stats, out, cotangent, self.scores.scale, self._window(q))
        return tuple(only_exact(grad, documents) for grad in grads)

    def _documents(self, q: Array, masks: Masks) -> DocumentRanges:
        q_positions, kv_positions, q_segments, kv_segments = masks
        # Offsets are int32: past them they would wrap, and the kernel would read other memory without a word.
        if q.size >= 2**31:
            raise ValueError(
                f"training.attention=cudnn counts elements in 32 bits, but a device's queries are {q.shape}; "
                f"use more pipeline.microbatches or training.accumulation_steps, {ELSE}"
            )
        documents = find_documents(q_positions, q_segments, self.max_documents)
        # The kernel takes one list for both sides. A part of a row against the whole row (allgather) would be
        # masked as if it began the row.
        same = jnp.all((q_positions == kv_positions) & (q_segments == kv_segments), axis=1)
        return dataclasses.replace(documents, exact=documents.exact & same)

    def _window(self, q: Array) -> int | None:
        # A window as long as the row hides nothing: cuDNN is then asked for none.
        window = self.scores.window
        return None if window is None or window >= q.shape[1] else window


def only_exact(x: Float[Array, "B T N H"], documents: DocumentRanges) -> Float[Array, "B T N H"]:
    """Zeros at padding, where the kernel writes nothing; nan in rows whose documents it cannot be given."""
    # What the kernel leaves unwritten may be any bits, nan among them: chosen away, since nan * 0 is nan.
    x = jnp.where(documents.real[:, :, None, None], x, 0)
    return jnp.where(documents.exact[:, None, None, None], x, jnp.nan)


def folded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays [B, ...] whose vmapped form takes the new dim into B; no kernel has a dim more."""
    # A pipeline's stages and local SGD's replicas call the kernel under vmap. JAX would add a dim that the
    # kernel does not have, or loop; rows are independent, so the dim joins them.
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        def fold(x: Array, has: bool) -> Array:
            whole = x if has else jnp.broadcast_to(x, (size, *x.shape))
            return whole.reshape(-1, *x.shape[2:] if has else x.shape[1:])

        out = mapped(*jax.tree.map(fold, args, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(
            lambda _: True, out
        )

    return mapped


def fused_forward(
    q: Array,
    k: Array,
    v: Array,
    q_lengths: Array,
    kv_lengths: Array,
    q_offsets: Array,
    kv_offsets: Array,
    scale: float,
    window: int | None,
) -> tuple[Array, Array]:
    """Forward by cuDNN: output [B, T, N, H] and log-sum-exp [B*M, N, T], both undefined at padding."""
    ranges = (q_lengths, kv_lengths, q_offsets, kv_offsets)
    out, stats = _bind("fwd", (q, k, v), ranges, (), scale, window, is_training=True)
    return out, stats


def fused_backward(
    q: Array,
    k: Array,
    v: Array,
    q_lengths: Array,
    kv_lengths: Array,
    q_offsets: Array,
    kv_offsets: Array,
    stats: Array,
    out: Array,
    cotangent: Array,
    scale: float,
    window: int | None,
) -> tuple[Array, Array, Array]:
    """Gradients by cuDNN of q, k and v, undefined at padding."""
    ranges = (q_lengths, kv_lengths, q_offsets, kv_offsets)
    dq, dk, dv = _bind("bwd", (q, k, v), ranges, (stats, out, cotangent), scale, window)
    return dq, dk, dv


def _bind(
    which: str,
    qkv: tuple[Array, ...],
    ranges: tuple[Array, ...],
    saved: tuple[Array, ...],
    scale: float,
    window: int | None,
    **options: Any,
) -> list[Array]:
    # The public functions ask the first local device what it can do, which is a CPU where the target is only
    # described, and before JAX 0.12 gave keys the offsets of queries (jax#39521: silently wrong with fewer
    # K/V heads). So the primitive itself, with offsets of ours.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    # The arguments that are bound are those of JAX 0.10 to 0.12; `score_mod` came between.
    primitive = getattr(fused, f"_dot_product_attention_{which}_p")
    takes = inspect.signature(getattr(fused, f"_dot_product_attention_{which}_impl")).parameters
    if "score_mod" in takes:  # JAX 0.11 on
        options |= {"score_mod_name": None, "score_mod_jaxpr": None}
    unused = jnp.zeros(0, qkv[0].dtype)
    return primitive.bind(
        *qkv,
        unused,
        *ranges,
        unused,
        unused,
        *saved,
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        # Padding and causal: by lengths for each document of the list, and causal within it.
        mask_type=fused.MaskType.PADDING_CAUSAL,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=window,
        **options,
    )
