"""Where a pipeline's arrays lie, and how they get from stage to stage.

B rows of a microbatch, T position, D model, P stages, v chunks of layers a stage, n layers, R places.
An array with a leading dim P has entry s on stage s. What moves or is indexed by stage is a `shard_map` with
every mesh axis manual, so exactly the collective that is written here is in the program, and no other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from parallel.axes import Layout
from parallel.partition import apart
from parallel.schedules.accumulate import Batch, Params
from parallel.schedules.stage_layout import AXIS
from parallel.schedules.tables import Schedule

RESIDUAL = ("stages", "batch", "act_length", "act_embed")
ONE = PartitionSpec(AXIS)
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class StagePlan:
    """Where stages lie, in what order they work, and what they keep.

    specs: PartitionSpecs of the parameters as they lie in memory, the main segment's of [v, P, n/(vP), ...].
    """

    layout: Layout
    schedule: Schedule
    specs: Any
    remat: str = "none"
    scan_layers: bool = True


@dataclass(frozen=True)
class Stages:
    """The stages of a mesh, and what moves between them.

    specs: PartitionSpecs of the parameters in stages, each [v, P, n/(vP), ...].
    """

    layout: Layout
    count: int
    chunks: int
    specs: Any

    def constrain(self, x: Float[Array, "P B T D"]) -> Float[Array, "P B T D"]:
        """Every stage's residual stream, pinned to where the rules put it."""
        return self.layout.constrain(x, RESIDUAL)

    def spec(self, x: Array, axes: Axes = RESIDUAL) -> PartitionSpec:
        """Where such a stream lies, or another array with these logical axes."""
        # Fewer K/V heads than devices are whole on each until they are repeated.
        many = [
            name == "act_kv_heads" and size % self.layout.ways(name)
            for name, size in zip(axes, x.shape, strict=True)
        ]
        names = [None if whole else name for name, whole in zip(axes, many, strict=True)]
        return self.layout.spec(names, x.shape, "activation")

    def pin(self, x: Array, axes: Axes) -> Array:
        """Any array with these logical axes, pinned to where the rules put it."""
        placed = NamedSharding(self.layout.mesh, self.spec(x, axes))
        return jax.lax.with_sharding_constraint(x, placed)

    def local(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` of the parts that a device has, as a function of whole arrays."""
        return jax.shard_map(
            function, mesh=self.layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def shift(self, x: Float[Array, "P B T D"], by: int) -> Float[Array, "P B T D"]:
        """Stage s gets what stage s - by had, around the ring."""
        # A ring, although nothing of use goes from the last to the first stage but with several chunks: then
        # it is the way to the next chunk.
        ring = [(s, (s + by) % self.count) for s in range(self.count)]
        spec = self.spec(x)
        return self.local(lambda x: jax.lax.ppermute(x, AXIS, ring), spec, spec)(x)

    def of_stage(self, x: Float[Array, "P B T D"], stage: int) -> Float[Array, "B T D"]:
        """The entry of one stage, given to all stages."""
        spec, number = self.spec(x), stage % self.count

        def pick(x: Array) -> Array:
            mine = jax.lax.axis_index(AXIS) == number
            # A sum in which all but one add zeros: a broadcast that every backend has, and whose transpose is
            # one too.
            return jax.lax.psum(jnp.where(mine, x[0], 0), AXIS)

        return self.local(pick, spec, PartitionSpec(*spec[1:]))(x)

    def keep(
        self,
        places: Float[Array, "R P ..."],
        x: Float[Array, "P ..."],
        place: Int[Array, " P"],
        busy: Bool[Array, " P"],
        axes: Axes = RESIDUAL,
    ) -> Float[Array, "R P ..."]:
        """Put what each stage has in its place, unless the stage is idle."""
        spec = self.spec(x, axes)
        many = PartitionSpec(None, *spec)

        def put(places: Array, x: Array, place: Array, busy: Array) -> Array:
            # Read, choose, write in place: a where over all places would copy every kept input in every tick.
            old = jax.lax.dynamic_index_in_dim(places, place[0], 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(places, jnp.where(busy[0], x, old), place[0], 0)

        return self.local(put, (many, spec, ONE, ONE), many)(places, x, place, busy)

    def take(
        self, places: Float[Array, "R P ..."], place: Int[Array, " P"], axes: Axes = RESIDUAL
    ) -> Float[Array, "P ..."]:
        """The entries that stages kept, each from a place of its own."""
        spec = self.spec(places[0], axes)

        def get(places: Array, place: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(places, place[0], 0, keepdims=False)

        return self.local(get, (PartitionSpec(None, *spec), ONE), spec)(places, place)

    def chunk(self, params: Any, chunk: Int[Array, " P"]) -> Any:
        """Each stage's parameters of a chunk, [v, P, n/(vP), ...] to [P, n/(vP), ...]."""
        # Nothing to choose: no copy of the parameters by a traced index.
        if self.chunks == 1:
            return jax.tree.map(lambda p: p[0], params)

        def pick(params: Any, chunk: Array) -> Any:
            return jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, chunk[0], 0, keepdims=False), params
            )

        # Per device: each stage is at another chunk, and a gather over the stage's dim would be partitioned
        # as traffic between stages.
        return self.local(pick, (self.specs, ONE), self._chunk_specs())(params, chunk)

    def add_chunk(self, grads: Any, more: Any, chunk: Int[Array, " P"], trains: Any = None) -> Any:
        """Gradients [v, P, n/(vP), ...] with each stage's part of a chunk added.

        trains: the parameters that they are of, where these are not all.
        """

        def add(grads: Any, more: Any, chunk: Array) -> Any:
            def put(g: Array, m: Array) -> Array:
                # Added into the one chunk: the others' gradients are not touched.
                old = jax.lax.dynamic_index_in_dim(g, chunk[0], 0, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(g, old + m, chunk[0], 0)

            return jax.tree.map(put, grads, more)

        (specs, _), (parts, _) = apart(trains, self.specs), apart(trains, self._chunk_specs())
        return self.local(add, (specs, parts, ONE), specs)(grads, more, chunk)

    def _chunk_specs(self) -> Any:
        return jax.tree.map(
            lambda spec: PartitionSpec(*spec[1:]), self.specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
        )


def split_rows(batch: Batch, count: int) -> Batch:
    """[B, ...] as [B/count, count, ...]: microbatch m is every count-th row, spread over all devices."""
    return {name: x.reshape(x.shape[0] // count, count, *x.shape[1:]) for name, x in batch.items()}


def join_rows(x: Array) -> Array:
    """[B/count, count, ...] as [B, ...]: the inverse of `split_rows`."""
    return x.reshape(-1, *x.shape[2:])


def without(params: Params, segment: str) -> Params:
    """All parameters but those of one segment."""
    others = {name: tree for name, tree in params["segments"].items() if name != segment}
    return {**params, "segments": others}


def widen(mask: Array, x: Array) -> Array:
    """A mask of the first dims of x with as many dims as x, so that it broadcasts."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
