"""A kernel for one device over a mesh: rows and heads split as the layout's rules say, rows whole.

XLA cannot partition a kernel that it did not make, so such a call stands in a `shard_map` with every mesh
axis manual. Which part of an array a device holds is a `Placement`.

B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H query and key head
size, W value head size, M documents a row at most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from kernels import attention_cudnn, attention_splash
from kernels.attention import Masks, Scores, with_backward
from parallel.axes import Layout

HEADS = ("batch", "length", "act_heads", None)
TOKENS = ("batch", "length")


def sharded_cudnn(layout: Layout, max_documents: int) -> Callable[..., Array]:
    """CuDNN's attention over global arrays, with the signature of `Ops.attention`.

    Raises ValueError where the devices have no such kernel or rows are split over mesh.context, and, when
    called, for what the kernel cannot do.
    """
    attention_cudnn.check_devices(layout.mesh.devices.flat, max_documents)
    check_whole_rows(layout, "cudnn")

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K W"],
        masks: Masks,
        scores: Scores,
    ) -> Float[Array, "B T N H"]:
        kernel = attention_cudnn.prepare(q, k, v, scores, max_documents)
        k, v = (split_heads(x, layout.ways("act_heads")) for x in (k, v))
        place = placement(layout, "training.attention=cudnn", q, k, v)
        stats = PartitionSpec(place.out[0], None, place.out[2], None)  # [B, M, N, T]
        # Two shard_maps and not one that is differentiated: what backward needs is then named outside, where
        # policies of rematerialization see it.
        forward = place.map(kernel.forward, place.arguments, (place.out, stats))
        backward = place.map(kernel.backward, (*place.arguments, place.out, stats, place.out), place.qkv)
        return with_backward(forward, backward, (q, k, v), masks)

    return attention


def sharded_splash(layout: Layout) -> Callable[..., Array]:
    """Splash attention over global arrays, with the signature of `Ops.attention`.

    Raises ValueError where the devices are no TPUs or rows are split over mesh.context, and, when called, for
    what the kernel cannot do.
    """
    attention_splash.check_device(layout.mesh.devices.flat[0])
    check_whole_rows(layout, "splash")

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K W"],
        masks: Masks,
        scores: Scores,
    ) -> Float[Array, "B T N W"]:
        k, v = (split_heads(x, layout.ways("act_heads")) for x in (k, v))

        inner = partial(attention_splash.splash_attention, scores=scores)
        place = placement(layout, "training.attention=splash", q, k, v)
        return differentiable(inner, place, (q, k, v), masks)

    return attention


def check_whole_rows(layout: Layout, name: str) -> None:
    """Raise ValueError where the positions of a row lie on several devices."""
    # A part of a row would be masked as if it were the whole: wrong numbers, and no error from any kernel.
    if layout.ways("length") > 1:
        raise ValueError(
            f"training.attention={name} needs whole rows, but mesh.rules.length splits them over "
            f"{layout.ways('length')} devices; use context.attention=ulysses or mesh.context=1"
        )


def kv_copies(num_kv_heads: int, ways: int) -> int:
    """Copies of each K/V head that let `ways` devices take equal parts: exact, its gradient is their sum.

    Query heads divide by both numbers, so that in every part a query head still finds its own by n // G.
    """
    return math.lcm(num_kv_heads, ways) // num_kv_heads


def split_heads(x: Float[Array, "B S K W"], ways: int) -> Float[Array, "B S R W"]:
    """K/V heads, each repeated as often as a split in `ways` needs."""
    copies = kv_copies(x.shape[2], ways)
    # In place, head by head: query head n still finds its own at n // G, now with a smaller G.
    return x if copies == 1 else jnp.repeat(x, copies, axis=2)


@dataclass(frozen=True)
class Placement:
    """Which part of every array a device holds, and how to run a function on those parts."""

    mesh: Mesh
    qkv: tuple[PartitionSpec, PartitionSpec, PartitionSpec]
    tokens: PartitionSpec  # of positions and segments

    @property
    def arguments(self) -> tuple[PartitionSpec, ...]:
        """The specs of q, k, v and, one for all four, the arrays of `Masks`."""
        return (*self.qkv, self.tokens)

    @property
    def out(self) -> PartitionSpec:
        """The spec of the output: q's, since they share every dim but the last, which is whole."""
        return self.qkv[0]

    @property
    def lse(self) -> PartitionSpec:
        """The spec of the log-sum-exp [B, K, G, T]."""
        batch, length, heads, _ = self.out
        return PartitionSpec(batch, heads, None, length)

    @property
    def everywhere(self) -> PartitionSpec:
        """The spec of a leading dim with one entry for each device that holds something of its own."""
        entries = [(entry,) if isinstance(entry, str) else entry or () for entry in self.out]
        return PartitionSpec(tuple(axis for entry in entries for axis in entry))

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` of parts as a function of whole arrays."""
        # Every axis manual: cuDNN's kernels refuse to be partitioned. Unchecked: they do not say over which
        # axes their results vary, and no gradient is taken through it (see `differentiable`).
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def placement(layout: Layout, what: str, q: Array, k: Array, v: Array) -> Placement:
    """Where the rules put arrays of these shapes; K/V heads lie as query heads do. `what` is for errors."""
    query, key, value = (layout.spec(HEADS, x.shape, what) for x in (q, k, v))
    return Placement(layout.mesh, (query, key, value), layout.spec(TOKENS, q.shape[:2], what))


def differentiable(
    inner: Callable[..., Array], place: Placement, qkv: tuple[Array, ...], masks: Masks
) -> Array:
    """`inner`, what one device does, over global arrays, with a shard_map each for forward and backward.

    What backward needs leaves the first and enters the second untouched. Left to itself, the transpose of an
    unchecked shard_map sums q's, k's and v's gradients over every axis that their specs do not name.
    """

    @jax.custom_vjp
    def attend(*args: Any) -> Array:
        return place.map(inner, place.arguments, place.out)(*args)

    def local_forward(*args: Any) -> tuple[Array, Any]:
        # The pull-back is a tree of a device's own residuals. A leading dim of one entry a device lets it
        # leave the shard_map and come back untouched, whatever it holds.
        out, pull = jax.vjp(lambda *qkv: inner(*qkv, args[3]), *args[:3])
        return out, jax.tree.map(lambda x: x[None], pull)

    def local_backward(pull: Any, cotangent: Array) -> tuple[Array, ...]:
        return jax.tree.map(lambda x: x[0], pull)(cotangent)

    def attend_forward(*args: Any) -> tuple[Array, Any]:
        return place.map(local_forward, place.arguments, (place.out, place.everywhere))(*args)

    def attend_backward(pull: Any, cotangent: Array) -> tuple[Array | None, ...]:
        grads = place.map(local_backward, (place.everywhere, place.out), place.qkv)(pull, cotangent)
        return (*grads, None)

    attend.defvjp(attend_forward, attend_backward)
    return attend(*qkv, masks)
