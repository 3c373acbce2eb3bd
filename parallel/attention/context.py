"""Context parallelism: attention over a row whose positions lie on several devices.

`ulysses` trades the split of positions for a split of heads around an unmodified kernel; `allgather` brings
every key and value to every device; `ring` passes them from neighbour to neighbour and never holds more than
one block. Masks look at positions and segments only, so a row may lie in any order: in zigzag order device c
of C holds chunks c and 2C-1-c of 2C, an early and a late one, and causal work is even.

B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H query and key head
size, W value head size, C devices along mesh.context.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from parallel.attention.ring import ATTENTION_OUTPUT, AXIS, Ring
from parallel.axes import Layout
from parallel.config import CONTEXT_ATTENTION

HEADS = ("batch", "length", "act_heads", None)
TOKENS = ("batch", "length")


def context_attention(
    kind: str, layout: Layout, local: Callable[..., Array], *, zigzag: bool
) -> Callable[..., Array]:
    """Attention over global arrays [B, T, heads, size] whose T is split over mesh.context.

    The result has the signature of `local`, a kernel for one device: `(q, k, v, *, q_positions, kv_positions,
    q_segments, kv_segments, window, softcap, scale)`; `ring` computes for itself and does not call it, and
    `allgather` in zigzag order hands it keys in that order. Where mesh.context is 1, `local` itself.
    zigzag: whether T is in `zigzag_order` (never so for ulysses, whose work is even by heads).
    Ring counts on positions to grow by one from token to token within a document. Raises ValueError for an
    unknown kind and, when called, for sizes that do not divide.
    Ulysses: arXiv:2309.14509; all-gather: arXiv:2407.21783, 3.3.2; ring: arXiv:2310.01889.
    """
    size = layout.mesh.shape[AXIS]
    if kind not in CONTEXT_ATTENTION:
        raise ValueError(f"context.attention={kind} is unknown; use one of {', '.join(CONTEXT_ATTENTION)}")
    if size == 1:
        return local
    if tuple(layout.rules.get("length", ())) != (AXIS,):
        raise ValueError(
            f"mesh.context={size}, but mesh.rules.length={list(layout.rules.get('length', ()))}; "
            f"use mesh.rules.length=[{AXIS}] or mesh.context=1"
        )

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
        tensor = layout.ways("act_heads")
        zigzags = uses_zigzag(kind, zigzag)
        check_context(kind, zigzags, size, tensor=tensor, num_heads=q.shape[2], seq_len=q.shape[1])
        k, v = split_heads(k, tensor), split_heads(v, tensor)
        place = placement(layout, kind, q, k, v)
        masks = (q_positions, kv_positions, q_segments, kv_segments)
        options: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
        if kind == "ring":
            return ring_attention(Ring(size, zigzags, **options), place, (q, k, v), masks)
        inner = functools.partial(INNER[kind], functools.partial(local, **options), size)
        return differentiable(inner, place, (q, k, v), masks)

    return attention


def uses_zigzag(kind: str, zigzag: bool) -> bool:
    """Whether the batch is to be permuted: by heads (ulysses) the work is even in any order."""
    return zigzag and kind != "ulysses"


def check_context(
    kind: str, zigzag: bool, context: int, *, tensor: int, num_heads: int, seq_len: int
) -> None:
    """Raise ValueError where positions or heads cannot be split as this kind of attention needs them.

    context, tensor: the sizes of these mesh axes.
    """
    if context == 1:
        return
    chunks = 2 if uses_zigzag(kind, zigzag) else 1  # a device
    if seq_len % (chunks * context):
        asked = f"mesh.context={context}" + (" in zigzag order" if chunks == 2 else "")
        near = seq_len - seq_len % (chunks * context)
        lengths = " or ".join(str(n) for n in (near, near + chunks * context) if n)
        legal = [1, *(n for n in range(2, 2 * context) if seq_len % (chunks * n) == 0)]
        raise ValueError(
            f"data.seq_len={seq_len} does not split into {chunks * context} equal parts, as {asked} needs; "
            f"use data.seq_len={lengths}, or a mesh.context of {', '.join(map(str, legal))}"
        )
    if kind == "ulysses" and num_heads % (tensor * context):
        legal = [n for n in range(1, num_heads + 1) if num_heads % (tensor * n) == 0] or [1]
        raise ValueError(
            f"context.attention=ulysses cannot split model.num_heads={num_heads} over mesh.tensor={tensor} * "
            f"mesh.context={context}; use a mesh.context of {', '.join(map(str, legal))}, a multiple of "
            f"{tensor * context} heads, or context.attention=allgather or ring"
        )


def kv_copies(num_kv_heads: int, ways: int) -> int:
    """Copies of each K/V head that let `ways` devices take equal parts: exact, its gradient is their sum.

    Query heads divide by both numbers, so that in every part a query head still finds its own by n // G.
    """
    return math.lcm(num_kv_heads, ways) // num_kv_heads


def split_heads(x: Float[Array, "B S K W"], ways: int) -> Float[Array, "B S R W"]:
    """K/V heads, each repeated as often as a split in `ways` needs."""
    copies = kv_copies(x.shape[2], ways)
    return x if copies == 1 else jnp.repeat(x, copies, axis=2)


@dataclass(frozen=True)
class Placement:
    """Which part of every array a device holds, and how to run a function on those parts."""

    mesh: Mesh
    qkv: tuple[PartitionSpec, PartitionSpec, PartitionSpec]
    tokens: PartitionSpec  # positions and segments

    @property
    def arguments(self) -> tuple[PartitionSpec, ...]:
        """Of q, k, v, and the positions and segments of queries and keys."""
        return (*self.qkv, *(self.tokens,) * 4)

    @property
    def out(self) -> PartitionSpec:
        """As q, of which the output has every dim but the last, which is whole."""
        return self.qkv[0]

    @property
    def lse(self) -> PartitionSpec:
        """Of [B, K, G, T]."""
        batch, length, heads, _ = self.out
        return PartitionSpec(batch, heads, None, length)

    @property
    def everywhere(self) -> PartitionSpec:
        """Of a leading dim with one entry for each device that holds something of its own."""
        entries = [(entry,) if isinstance(entry, str) else entry or () for entry in self.out]
        return PartitionSpec(tuple(axis for entry in entries for axis in entry))

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` of parts as a function of whole arrays."""
        # Every axis manual: cuDNN's kernels refuse to be partitioned. Unchecked: they do not say over which
        # axes their results vary, and no gradient is taken through it (see `differentiable`).
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def placement(layout: Layout, kind: str, q: Array, k: Array, v: Array) -> Placement:
    """Where the rules put arrays of these shapes; K/V heads lie as query heads do."""
    what = f"context.attention={kind}"
    query, key, value = (layout.spec(HEADS, x.shape, what) for x in (q, k, v))
    return Placement(layout.mesh, (query, key, value), layout.spec(TOKENS, q.shape[:2], what))


def _ulysses(local: Callable[..., Array], size: int, q: Array, k: Array, v: Array, *masks: Array) -> Array:
    """[B, T/C, N, H] to [B, T, N/C, H], the kernel, and back."""
    k, v = split_heads(k, size), split_heads(v, size)
    q, k, v = (jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    out = local(q, k, v, **_named(*(_gather(m) for m in masks)))
    return jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)


def _allgather(local: Callable[..., Array], size: int, q: Array, k: Array, v: Array, *masks: Array) -> Array:
    """Queries stay; its transpose is a reduce-scatter of the gradients of keys and values."""
    q_positions, kv_positions, q_segments, kv_segments = masks
    k, v, kv_positions, kv_segments = (_gather(x) for x in (k, v, kv_positions, kv_segments))
    return local(q, k, v, **_named(q_positions, kv_positions, q_segments, kv_segments))


INNER = {"ulysses": _ulysses, "allgather": _allgather}


def _gather(x: Array) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def _named(
    q_positions: Array, kv_positions: Array, q_segments: Array, kv_segments: Array
) -> dict[str, Array]:
    return {
        "q_positions": q_positions,
        "kv_positions": kv_positions,
        "q_segments": q_segments,
        "kv_segments": kv_segments,
    }


def differentiable(
    inner: Callable[..., Array], place: Placement, qkv: tuple[Array, ...], masks: tuple[Array, ...]
) -> Array:
    """`inner`, what one device does, over global arrays, with a shard_map each for forward and backward.

    What backward needs leaves the first and enters the second untouched. Left to itself, the transpose of an
    unchecked shard_map sums q's, k's and v's gradients over every axis that their specs do not name.
    """

    @jax.custom_vjp
    def attend(*args: Array) -> Array:
        return place.map(inner, place.arguments, place.out)(*args)

    def local_forward(*args: Array) -> tuple[Array, Any]:
        out, pull = jax.vjp(lambda *qkv: inner(*qkv, *args[3:]), *args[:3])
        return out, jax.tree.map(lambda x: x[None], pull)

    def local_backward(pull: Any, cotangent: Array) -> tuple[Array, ...]:
        return jax.tree.map(lambda x: x[0], pull)(cotangent)

    def attend_forward(*args: Array) -> tuple[Array, Any]:
        return place.map(local_forward, place.arguments, (place.out, place.everywhere))(*args)

    def attend_backward(pull: Any, cotangent: Array) -> tuple[Array | None, ...]:
        grads = place.map(local_backward, (place.everywhere, place.out), place.qkv)(pull, cotangent)
        return (*grads, None, None, None, None)

    attend.defvjp(attend_forward, attend_backward)
    return attend(*qkv, *masks)


def ring_attention(
    ring: Ring, place: Placement, qkv: tuple[Array, Array, Array], masks: tuple[Array, Array, Array, Array]
) -> Float[Array, "B T N W"]:
    """Global arrays in, global array out; forward and backward are a walk around the ring each.

    The backward is written out: differentiating through the merge of blocks would need the cotangent of each
    block's log-sum-exp, which kernels drop. With the output and log-sum-exp of the whole row, a block's
    weights are exp(score - lse) and nothing of the merge is left to differentiate.
    """

    @jax.custom_vjp
    def attend(*args: Array) -> Array:
        return attend_forward(*args)[0]

    def attend_forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
        walk = place.map(ring.forward, place.arguments, (place.out, place.lse))
        out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in walk(*args))
        return out, (*args, out, lse)

    def attend_backward(saved: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
        in_specs = (*place.arguments, place.out, place.lse, place.out)
        grads = place.map(ring.backward, in_specs, place.qkv)(*saved, cotangent)
        return (*grads, None, None, None, None)

    attend.defvjp(attend_forward, attend_backward)
    return attend(*qkv, *masks)


def zigzag_order(length: int, size: int) -> np.ndarray:
    """[T] int32: the original index of each place; device c of `size` holds chunks c and 2*size-1-c.

    Raises ValueError where 2 * size does not divide `length`.
    """
    check_context("ring", True, size, tensor=1, num_heads=1, seq_len=length)
    chunks = np.arange(length, dtype=np.int32).reshape(2 * size, -1)
    return np.stack([chunks[:size], chunks[size:][::-1]], axis=1).reshape(-1)


def permute_batch(batch: dict[str, Array], size: int) -> dict[str, Array]:
    """Every array [B, T] in zigzag order for `size` devices, and `order` [B, T], the original indices.

    `size` is mesh.context; 1 changes nothing. Raises ValueError where 2 * size does not divide T.
    """
    if size == 1:
        return batch
    rows, length = batch["tokens"].shape
    order = zigzag_order(length, size)

    def permute(x: Array) -> Array:
        # Slices of whole chunks and not a gather: a compiler that knows where chunks lie moves them directly.
        chunks = x.reshape(rows, 2 * size, -1)
        return jnp.stack([chunks[:, :size], chunks[:, : size - 1 : -1]], axis=2).reshape(rows, length)

    permuted = {name: permute(x) for name, x in batch.items()}
    return {**permuted, "order": jnp.broadcast_to(jnp.asarray(order), (rows, length))}


def causal_work(length: int, size: int, *, zigzag: bool) -> np.ndarray:
    """[size] int64: (query, key) pairs under the causal mask of one document that each device's queries see.

    In text order the last device has 2 - 1/size times the mean; in zigzag order all have the same.
    """
    order = zigzag_order(length, size) if zigzag else np.arange(length)
    return (order.astype(np.int64) + 1).reshape(size, -1).sum(axis=1)


@dataclass(frozen=True)
class Zigzag:
    """A schedule (`parallel.schedules.accumulate` says what that is) over rows in zigzag order.

    Positions are exchanged once a step, as integers; past that no layer knows.
    """

    schedule: Any
    layout: Layout

    def value_and_grad(self, model: Any, params: Any, batch: dict[str, Array], key: Array, ops: Any) -> Any:
        """As the schedule's own."""
        return self.schedule.value_and_grad(model, params, self.permuted(batch), key, ops)

    def evaluate(self, model: Any, params: Any, batch: dict[str, Array], ops: Any) -> Any:
        """As the schedule's own."""
        return self.schedule.evaluate(model, params, self.permuted(batch), ops)

    def permuted(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch in zigzag order, and `order`: where in the row each position was."""
        arrays = permute_batch(batch, self.layout.mesh.shape[AXIS])
        return {name: self.layout.constrain(x, TOKENS) for name, x in arrays.items()}
