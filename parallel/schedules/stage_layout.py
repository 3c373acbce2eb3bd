"""How a stack of layers lies in memory for a pipeline, and how it becomes what a checkpoint holds, and back.

P stages, v chunks of layers a stage, n layers (or periods of layers) in the stack.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

AXIS = "pipeline"


@dataclass(frozen=True)
class Arrangement:
    """How a stack of layers [n, ...] lies in memory for a schedule, [v, P, n/(vP), ...], and back.

    Chunk c of stage s holds the layers that come (c * P + s)-th, so both are the same numbers in the same
    order; only what a device holds differs. Works on any tree whose paths run through the parameters':
    moments and averages too.
    """

    stages: int
    chunks: int
    main: str  # number of the segment that is split

    def in_memory(self, info: Any, is_info: Callable[[Any], bool]) -> Any:
        """Birth certificates as their parameters lie in memory."""
        return self._map(self._split_info, info, is_info)

    def on_disk(self, info: Any, is_info: Callable[[Any], bool]) -> Any:
        """Birth certificates of the canonical stacks, whose layers are spread over stages all the same."""

        def place(leaf: Any) -> Any:
            # Spread over stages in a checkpoint as well: each writes and reads a part, and none keeps the
            # whole stack.
            return dataclasses.replace(leaf, axes=("stages", *leaf.axes[1:]))

        return self._map(place, info, is_info)

    def layers(self, segment: int, numbers: Array) -> Array:
        """A segment's layer numbers [n] in the shape in which it is stacked."""
        return self._split(numbers) if str(segment) == self.main else numbers

    def join(self, tree: Any) -> Any:
        """The tree with canonical stacks [n, ...] where it lies in stages in memory."""
        return self._map(self._join, tree)

    def relocate(self, tree: Any, shardings: Any, *, join: bool) -> Any:
        """A placed tree with canonical stacks (`join`), or the inverse, leaf by leaf.

        So no more than one leaf is whole on every stage, which several chunks a stage ask for.
        """
        reshape = self._join if join else self._split

        def move(leaf: Array, sharding: NamedSharding) -> Array:
            assert isinstance(leaf.sharding, NamedSharding)
            # With one chunk a stage the two forms are split alike, and nothing moves.
            whole = without_axis(leaf.sharding, AXIS) if self.chunks > 1 else None
            return _mover(reshape, whole, sharding)(leaf)

        return self._map(move, tree, None, shardings)

    def _split(self, x: Array) -> Array:
        # Chunk-major, since consecutive layers go from stage to stage before they come back to the first: the
        # reshape moves no element, so checkpoints need no index.
        return x.reshape(self.chunks, self.stages, -1, *x.shape[1:])

    def _join(self, x: Array) -> Array:
        return x.reshape(-1, *x.shape[3:])

    def _map(
        self,
        function: Callable[..., Any],
        tree: Any,
        is_leaf: Callable[[Any], bool] | None = None,
        *others: Any,
    ) -> Any:
        def apply(path: Any, leaf: Any, *more: Any) -> Any:
            names = [jax.tree_util.keystr((key,), simple=True) for key in path]
            # By path, so that optimizer states and averages, which hold the parameters' tree somewhere
            # inside, are found as well.
            inside = ("segments", self.main) in zip(names, names[1:], strict=False)
            return function(leaf, *more) if inside else leaf

        return jax.tree_util.tree_map_with_path(apply, tree, *others, is_leaf=is_leaf)

    def _split_info(self, leaf: Any) -> Any:
        ways, layers = self.chunks * self.stages, leaf.shape[0]
        assert layers % ways == 0, (layers, ways)
        return dataclasses.replace(
            leaf,
            shape=(self.chunks, self.stages, layers // ways, *leaf.shape[1:]),
            axes=(None, "stages", *leaf.axes),
            reduction=tuple(dim + 2 for dim in leaf.reduction),
            output=tuple(dim + 2 for dim in leaf.output),
        )


def without_axis(sharding: NamedSharding, axis: str) -> NamedSharding:
    """The placement of an array that is whole along a mesh axis, and as before along all others."""

    def drop(entry: Any) -> Any:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in names if name != axis) or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(drop, sharding.spec)))


@cache
def _mover(
    reshape: Callable[[Array], Array], whole: NamedSharding | None, target: NamedSharding
) -> Callable[[Array], Array]:
    def move(x: Array) -> Array:
        if whole is not None:  # said outright, or the partitioner finds it out and warns
            x = jax.lax.with_sharding_constraint(x, whole)
        return reshape(x)

    return jax.jit(move, out_shardings=target)
