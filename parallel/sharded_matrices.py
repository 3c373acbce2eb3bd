"""Matrices that lie in parts on many devices, worked on whole: each device gets some of a stack, for a while.

The exchange is by all-to-all along every mesh axis that splits rows or columns; along axes on which all
devices hold the same, each takes its share and the results are gathered. So nothing is held or computed
twice, but for the matrices of zeros that fill a stack up to a multiple of the devices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

Axes = tuple[str, ...]


@dataclass(frozen=True)
class ShardedMatrices:
    """The devices of a mesh, as those share work who hold parts of the same arrays.

    axes: the mesh axes along which they do; along any other they work for themselves.
    """

    mesh: Mesh
    axes: Axes

    def map(self, function: Callable[..., Any], specs: Sequence[Any]) -> Callable[..., Any]:
        """`function` of the parts that one device holds, as a function of the arrays; results lie alike.

        specs: of each argument, what splits each of its dims.
        """
        placed = [PartitionSpec(*spec) for spec in specs]
        # Unchecked: the results of a gather are the same on all, which the checker cannot see.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=tuple(placed), out_specs=placed, check_vma=False
        )

    def on_whole(
        self,
        function: Callable[[Array], Array],
        stack: Float[Array, "L m n"],
        batch: Axes,
        rows: Axes,
        columns: Axes,
    ) -> Float[Array, "L m n"]:
        """`function` on whole matrices; `stack` is a device's part, and so is the result. For inside `map`.

        batch, rows, columns: the mesh axes that split each dim. A device gets ceil(L / ways) matrices, `ways`
        being the devices that the L matrices here are spread over. A dim that several axes split through
        several dims of the leaf comes in another order than in the leaf, and goes back.
        """
        same = tuple(a for a in self.axes if a not in (*batch, *rows, *columns) and self.mesh.shape[a] > 1)
        count, ways = stack.shape[0], self._size((*rows, *columns, *same))
        # All-to-all wants equal parts. Matrices of zeros cost their share of the work and change nothing.
        x = jnp.pad(stack, ((0, -count % ways), (0, 0), (0, 0)))
        # Along these axes all devices hold the same parts: each takes a share, or all would compute
        # everything.
        if same:
            share = x.shape[0] // self._size(same)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(same) * share, share)
        for axes, dim in ((rows, 1), (columns, 2)):
            x = _exchange(x, axes, 0, dim)
        x = function(x)
        for axes, dim in ((columns, 2), (rows, 1)):
            x = _exchange(x, axes, dim, 0)
        x = jax.lax.all_gather(x, same, tiled=True) if same else x
        return x[:count]

    def _size(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[a] for a in axes)


def _exchange(x: Array, axes: Axes, split: int, join: int) -> Array:
    if not axes:
        return x
    # XLA:CPU (jaxlib 0.10) sends each part as an operand of its own. Seeing through to where the parts come
    # from, it may give them different layouts, which its own verifier refuses.
    return jax.lax.all_to_all(jax.lax.optimization_barrier(x), axes, split, join, tiled=True)
