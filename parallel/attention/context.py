"""Context parallelism: attention over a row whose positions lie on several devices.

`ulysses` trades the split of positions for a split of heads around an unmodified kernel; `allgather` brings
every key and value to every device; `ring` passes them from neighbour to neighbour and never holds more than
one block. Masks look at positions and segments only, so a row may lie in any order: in zigzag order device c
of C holds chunks c and 2C-1-c of 2C, an early and a late one, and causal work is even.

B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H query and key head
size, W value head size, C devices along mesh.context.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.attention import Masks, Scores, with_backward
from kernels.attention_splash import splash_attention
from parallel.attention.ring import AXIS, Ring
from parallel.attention.sharded import differentiable, placement, split_heads
from parallel.axes import Layout
from parallel.config import CONTEXT_ATTENTION
from parallel.schedules.accumulate import batch_axes


def context_attention(
    kind: str, layout: Layout, local: Callable[..., Array], *, zigzag: bool
) -> Callable[..., Array]:
    """Attention over global arrays [B, T, heads, size] whose T is split over mesh.context.

    The result has the signature of `local`, a kernel for one device: `(q, k, v, masks, scores)`; `ring`
    computes for itself and does not call it, and `allgather` in zigzag order hands it keys in that order.
    Where mesh.context is 1, `local` itself. zigzag: whether T is in `zigzag_order` (never so for ulysses,
    whose work is even by heads). Ring counts on positions to grow by one from token to token within a
    document. What can be had is for `training.legal` to say.
    Ulysses: arXiv:2309.14509; all-gather: arXiv:2407.21783, 3.3.2; ring: arXiv:2310.01889.
    """
    size = layout.mesh.shape[AXIS]
    assert kind in CONTEXT_ATTENTION, kind
    if size == 1:
        return local
    assert tuple(layout.rules.get("length", ())) == (AXIS,), layout.rules

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K W"],
        masks: Masks,
        scores: Scores,
    ) -> Float[Array, "B T N W"]:
        tensor = layout.ways("act_heads")
        zigzags = uses_zigzag(kind, zigzag)
        # What `training.legal` has made sure of.
        assert q.shape[1] % (size * (2 if zigzags else 1)) == 0, (q.shape, size)
        assert kind != "ulysses" or q.shape[2] % (tensor * size) == 0, (q.shape, tensor, size)
        # Before the shard_map, which needs heads that divide.
        k, v = split_heads(k, tensor), split_heads(v, tensor)
        place = placement(layout, f"context.attention={kind}", q, k, v)
        if kind == "ring":
            ring = Ring(size, zigzags, scores)
            # Forward and backward are a walk around the ring each. Backward is written out: differentiating
            # through the merge of blocks would need the cotangent of each block's log-sum-exp, which kernels
            # drop. With the output and log-sum-exp of the whole row, a block's weights are exp(score - lse),
            # and nothing of the merge is left to differentiate.
            forward = place.map(ring.forward, place.arguments, (place.out, place.lse))
            backward = place.map(
                ring.backward, (*place.arguments, place.out, place.lse, place.out), place.qkv
            )
            return with_backward(forward, backward, (q, k, v), masks)
        inner = functools.partial(INNER[kind], functools.partial(local, scores=scores), size)
        return differentiable(inner, place, (q, k, v), masks)

    return attention


def uses_zigzag(kind: str, zigzag: bool) -> bool:
    """Whether the batch is to be permuted: by heads (ulysses) the work is even in any order."""
    return zigzag and kind != "ulysses"


def _ulysses(local: Callable[..., Array], size: int, q: Array, k: Array, v: Array, masks: Masks) -> Array:
    """[B, T/C, N, H] to [B, T, N/C, H], the kernel, and back."""
    # In here heads are already split over tensor; what is left of them is split once more, over context.
    k, v = split_heads(k, size), split_heads(v, size)
    q, k, v = (jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    # Positions and segments are integers a token: gathering them is little beside the exchange of heads.
    out = local(q, k, v, Masks(*map(_gather, masks)))
    return jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)


def _allgather(local: Callable[..., Array], size: int, q: Array, k: Array, v: Array, masks: Masks) -> Array:
    """Queries stay; its transpose is a reduce-scatter of the gradients of keys and values."""
    # Gathered in the order in which devices lie, so zigzag rows come in zigzag order: kernels that go by
    # positions do not care, splash puts them back (`splash_of_parts`).
    k, v, positions, segments = (_gather(x) for x in (k, v, masks.kv_positions, masks.kv_segments))
    return local(q, k, v, masks._replace(kv_positions=positions, kv_segments=segments))


INNER = {"ulysses": _ulysses, "allgather": _allgather}


def _gather(x: Array) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def zigzag_order(length: int, size: int) -> np.ndarray:
    """[T] int32: the original index of each place; device c of `size` holds chunks c and 2*size-1-c."""
    assert length % (2 * size) == 0, (length, size)
    chunks = np.arange(length, dtype=np.int32).reshape(2 * size, -1)
    return np.stack([chunks[:size], chunks[size:][::-1]], axis=1).reshape(-1)


def permute_batch(batch: dict[str, Array], size: int) -> dict[str, Array]:
    """Every array [B, T, ...] in zigzag order for `size` devices, and `order` [B, T], the original indices.

    What a row has once, [B], stays. `size` is mesh.context; 1 changes nothing.
    """
    if size == 1:
        return batch
    rows, length = batch["tokens"].shape
    order = zigzag_order(length, size)

    def permute(x: Array) -> Array:
        # Slices of whole chunks and not a gather: a compiler that knows where chunks lie moves them directly.
        if x.ndim == 1:
            return x
        chunks = x.reshape(rows, 2 * size, -1, *x.shape[2:])
        return jnp.stack([chunks[:, :size], chunks[:, : size - 1 : -1]], axis=2).reshape(x.shape)

    permuted = {name: permute(x) for name, x in batch.items()}
    return {**permuted, "order": jnp.broadcast_to(jnp.asarray(order), (rows, length))}


def splash_of_parts(parts: int, *, zigzag: bool) -> Callable[..., Array]:
    """Splash attention where a device has one of `parts` of a row's queries and all its keys (allgather).

    For use inside the `shard_map` of `context_attention`. zigzag: whether rows are in `zigzag_order`.
    """

    def attention(q: Array, k: Array, v: Array, masks: Masks, scores: Scores) -> Array:
        if zigzag:
            k, v, positions, segments = (
                text_order(x, parts) for x in (k, v, masks.kv_positions, masks.kv_segments)
            )
            masks = masks._replace(kv_positions=positions, kv_segments=segments)
        length = q.shape[1]
        places, stretch = query_places(length, parts, zigzag), length // 2 if zigzag else length
        return splash_attention(q, k, v, masks, scores, places=places, stretch=stretch)

    return attention


def query_places(length: int, parts: int, zigzag: bool) -> Int[Array, " T"]:
    """The index in its row's text of each query on this device, ascending."""
    mine, places = jax.lax.axis_index(AXIS), jnp.arange(length, dtype=jnp.int32)
    if not zigzag:
        return mine * length + places
    # Device c has chunks c and 2P-1-c: its first half of queries is early in the text, its second late. Both
    # ascend, which the kernel's ranges of blocks count on.
    late = (2 * parts - 1 - mine) * (length // 2) + places - length // 2
    return jnp.where(places < length // 2, mine * (length // 2) + places, late)


def text_order(x: Array, parts: int) -> Array:
    """[B, S, ...] from zigzag order, device after device, to the order of the text."""
    # Early chunks lie in order, late ones in reverse.
    chunks = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


@dataclass(frozen=True)
class Zigzag:
    """A schedule (`parallel.schedules.accumulate` says what that is) over rows in zigzag order.

    Positions are exchanged once a step, as integers; past that no layer knows.
    """

    schedule: Any
    layout: Layout

    def value_and_grad(
        self,
        loss: Any,
        model: Any,
        params: Any,
        batch: dict[str, Array],
        key: Array,
        ops: Any,
        frozen: Any = None,
    ) -> Any:
        """Means and gradients as the schedule's own, of the batch in zigzag order."""
        return self.schedule.value_and_grad(loss, model, params, self.permuted(batch), key, ops, frozen)

    def evaluate(self, model: Any, params: Any, batch: dict[str, Array], ops: Any) -> Any:
        """Sums as the schedule's own, of the batch in zigzag order."""
        return self.schedule.evaluate(model, params, self.permuted(batch), ops)

    def score(self, model: Any, params: Any, batch: dict[str, Array], ops: Any) -> dict[str, Array]:
        """Figures of each token as the schedule's own, in the order of the text."""
        scored = self.schedule.score(model, params, self.permuted(batch), ops)
        size = self.layout.mesh.shape[AXIS]
        return {
            name: self.layout.constrain(text_order(x, size), batch_axes(x.ndim)) for name, x in scored.items()
        }

    def permuted(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch in zigzag order, and `order`: where in the row each position was."""
        # Once a step and not once a layer; `order` goes with the batch, for what must know the text's order
        # (experts' capacity, further tokens).
        arrays = permute_batch(batch, self.layout.mesh.shape[AXIS])
        return {name: self.layout.constrain(x, batch_axes(x.ndim)) for name, x in arrays.items()}
