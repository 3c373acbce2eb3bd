"""Experts on different devices: tokens go to them and come back by all-to-all over the experts' mesh axis.

B rows, T position, k choices of a token, D model, E experts, F width of an expert. The computation itself is
the model's (`compute`), written for the part of batch and experts that a device holds; here it gets its part
and the way to the others, inside a `shard_map` in which every mesh axis is manual.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from parallel.axes import Layout

TOKENS = ("batch", "length", None)
ROWS = ("batch", "length")
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Exchange:
    """How a device reaches others: `experts` are the mesh axes that split these, `length` positions'."""

    experts: Axes
    length: Axes
    ways: int  # devices along `experts`

    def exchange(self, x: Array) -> Array:
        """[ways, ...]: entry w goes to device w and comes from it."""
        if self.ways == 1:
            return x
        return jax.lax.all_to_all(x, self.experts, 0, 0, tiled=True)

    def first_expert(self, here: int) -> Any:
        """The number of this device's first expert, of `here` on each."""
        return jax.lax.axis_index(self.experts) * here if self.ways > 1 else 0

    def whole_rows(self, x: Array) -> Array:
        """[B, T here, ...] to [B, T, ...]."""
        return jax.lax.all_gather(x, self.length, axis=1, tiled=True) if self.length else x

    def rows_here(self, x: Array) -> Array:
        """[B, T, ...] to [B, T here, ...]: the inverse of `whole_rows`."""
        if not self.length:
            return x
        size = x.shape[1] // jax.lax.axis_size(self.length)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.length) * size, size, axis=1)


def expert_dispatch(
    layout: Layout, compute: Callable[..., tuple[Array, Array]]
) -> Callable[..., tuple[Array, Array]]:
    """`compute` (of `kernels.grouped_experts.run_experts`'s form) on this layout; the value of `Ops.experts`.

    Rows lie as the rule for `batch` says, and are expected over the `experts` axes too; positions over those
    of `length`. Weights are [E, D, ..., F] and [E, F, D]: E stays where it is (`experts`), F as well (`mlp`;
    each device makes a part of the sum, added once tokens are home), and D, which `expert_embed` may split,
    is gathered here, so that its gradient is scattered and not summed whole. Raises ValueError where a size
    does not divide.
    """
    if layout.mesh.size == 1:
        return compute

    def dispatch(
        x: Float[Array, "B T D"],
        experts: Int[Array, "B T k"],
        gates: Float[Array, "B T k"],
        up: Float[Array, "E D *pair F"],
        down: Float[Array, "E F D"],
        *,
        real: Bool[Array, "B T"],
        order: Int[Array, "B T"] | None = None,
        spec: Any,
        up_bias: Float[Array, "E *pair F"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
        pair = (None,) * (up.ndim - 3)
        up_spec = layout.spec(("experts", "expert_embed", *pair, "mlp"), up.shape, "experts' up")
        down_spec = layout.spec(("experts", "mlp", "expert_embed"), down.shape, "experts' down")
        tokens, choices = (layout.spec(TOKENS, a.shape, "tokens of experts") for a in (x, experts))
        rows = layout.spec(ROWS, real.shape, "tokens of experts")
        # Read from the specs and not from the rules: axes of size 1 are gone, and what does not split asks
        # for no exchange.
        owners = names(up_spec[0])
        others = Exchange(owners, names(rows[1]), math.prod(layout.mesh.shape[a] for a in owners))

        biases = () if up_bias is None else (up_bias,)
        bias_axes = ("experts", *pair, "mlp")

        def local(
            x: Array,
            experts: Array,
            gates: Array,
            up: Array,
            down: Array,
            real: Array,
            order: Array,
            *biases: Array,
        ) -> tuple[Array, Array]:
            # Gathered inside, so that its transpose is a reduce-scatter: gradients arrive in the parts that
            # the optimizer holds, and are never whole on a device.
            up, down = gather(up, 1, names(up_spec[1])), gather(down, 2, names(down_spec[2]))
            more = {"up_bias": biases[0]} if biases else {}
            y, dropped = compute(
                x, experts, gates, up, down, real=real, order=order, spec=spec, others=others, **more
            )
            # Each device of tensor has made a part of every expert's sum over F. Added when tokens are home,
            # where there are as many as came, and not where capacity padded them.
            return (jax.lax.psum(y, names(down_spec[1])) if names(down_spec[1]) else y), dropped

        if order is None:  # here, where positions are still those of whole rows
            order = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        bias_specs = [layout.spec(bias_axes, bias.shape, "experts' bias") for bias in biases]
        specs = (tokens, choices, choices, up_spec, down_spec, rows, rows, *bias_specs)
        # Every axis manual: what is left to the partitioner inside (sorting, gathering) it would collect.
        run = jax.shard_map(
            local, mesh=layout.mesh, in_specs=specs, out_specs=(tokens, rows), check_vma=False
        )
        return run(x, experts, gates, up, down, real, order, *biases)

    return dispatch


def names(entry: Any) -> Axes:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def gather(x: Array, dim: int, axes: Axes) -> Array:
    """The whole of a dim; its transpose scatters the gradient's sum."""
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x
