"""Logical axes to mesh axes: the one table that turns a parameter's birth certificate into a sharding.

A tensor dim is named (`embed`, `heads`, `batch`); the rules of `configs/mesh/*.yaml` say which mesh axes
split that name. A size that does not divide, or a mesh axis used twice in one tensor, is refused here and
nowhere later.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from common.checks import choice
from common.host import one_order
from kernels.names import LOGICAL_AXES

# Grouped-query attention may have fewer K/V heads than tensor devices; then every device keeps all of them
# and the activations are repeated (`kv_repeats`), which is exact.
REPEATABLE = ("kv_heads",)


@dataclass(frozen=True)
class Layout:
    """A mesh, and the rules that say which of its axes split which logical axis of a tensor."""

    mesh: Mesh
    rules: Mapping[str, Sequence[str]]

    @property
    def compiler_options(self) -> dict[str, str]:
        """What a program over the whole mesh is compiled with, at least (`common.host.one_order`)."""
        return one_order(self.mesh.devices.flat[0].platform, self.mesh.size)

    def ways(self, name: str | None) -> int:
        """Into how many parts the rules split a logical axis."""
        size = 1
        for axis in self.rules.get(name or "", ()):
            size *= self.mesh.shape[axis]
        return size

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], what: str = "tensor") -> PartitionSpec:
        """PartitionSpec of a tensor with these logical axes, one a dim.

        `what` names the tensor in errors. Raises ValueError where a dim does not divide, two dims claim one
        mesh axis, or a name is no logical axis.
        """
        assert len(axes) == len(shape), (what, axes, shape)
        # JAX refuses an axis that stands twice in one spec, in words that name neither tensor nor rule.
        used: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for name, size in zip(axes, shape, strict=True):
            if name is not None:  # one that no rule can have would silently never be split
                choice("logical axis", name, LOGICAL_AXES)
            mesh_axes = self._split(name, size, what)
            for axis in mesh_axes:
                if axis in used:
                    raise ValueError(
                        f"{what}: logical axes {used[axis]!r} and {name!r} both map to mesh.{axis}; "
                        f"give one of them another mesh axis in mesh.rules"
                    )
                used[axis] = str(name)
            entries.append(mesh_axes or None)
        return PartitionSpec(*entries)

    def _split(self, name: str | None, size: int, what: str) -> tuple[str, ...]:
        # Axes of size 1 are left out, so that a spec reads the same on one device and prints what really
        # splits.
        mesh_axes = tuple(a for a in self.rules.get(name or "", ()) if self.mesh.shape[a] > 1)
        ways = self.ways(name)
        if size % ways == 0:
            return mesh_axes
        # Left whole: what is computed from them is repeated until it divides.
        if name in REPEATABLE and ways % size == 0:
            return ()
        asked = " * ".join(f"mesh.{a}={self.mesh.shape[a]}" for a in mesh_axes)
        legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(f"{what}: {asked} cannot split {name}={size}; use one of {legal}")

    def sharding(
        self, axes: Sequence[str | None], shape: Sequence[int], what: str = "tensor"
    ) -> NamedSharding:
        """NamedSharding of a tensor with these logical axes: `spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, what))

    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: Array, axes: Sequence[str | None]) -> Array:
        """Pin an activation inside a jitted function to the layout of its logical axes."""
        # On one device there is nothing to choose, and the program stays readable.
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, "activation"))

    def tree(self, info: Any, is_leaf: Callable[[Any], bool]) -> Any:
        """Shardings of a tree of things with `.axes` and `.shape`; errors name the parameter by its path."""

        def place(path: Any, leaf: Any) -> NamedSharding:
            return self.sharding(
                leaf.axes,
                leaf.shape,
                jax.tree_util.keystr(path, simple=True, separator="/"),
            )

        return jax.tree_util.tree_map_with_path(place, info, is_leaf=is_leaf)


def kv_repeats(num_kv_heads: int, layout: Layout) -> int:
    """Times each K/V head is repeated so that the `act_kv_heads` rule can split them; 1 where it can."""
    ways = layout.ways("act_kv_heads")
    return ways // num_kv_heads if ways > num_kv_heads and ways % num_kv_heads == 0 else 1
