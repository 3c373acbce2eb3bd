"""Devices to a named mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from parallel.axes import Layout
from parallel.config import MESH_AXES, MeshConfig


def mesh_shape(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Sizes by axis with -1 filled in; ValueError where they do not multiply to `device_count`."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1, but only one mesh axis can take what is left; "
            f"set one of them to 1 or more"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    named = (
        " * ".join(f"mesh.{a}={n}" for a, n in sizes.items() if n not in (1, -1)) or "every mesh axis is 1"
    )
    if free and device_count % fixed == 0:
        sizes[free[0]] = device_count // fixed
    elif free or fixed != device_count:
        remedy = f"their product must {'divide' if free else 'be'} {device_count}"
        raise ValueError(
            f"{named}, but there are {device_count} devices; {remedy} (mesh.data=-1 takes the rest)"
        )
    return sizes


def build_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> Layout:
    """The mesh over these devices (all of them by default) with the config's rules.

    Neighbours in the last axis (`tensor`) are neighbours on the network, which is where the most traffic is.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    for name, axes in config.rules.items():
        if unknown := sorted(set(axes) - set(MESH_AXES)):
            legal = ", ".join(MESH_AXES)
            raise ValueError(f"mesh.rules.{name} names {unknown[0]}, no mesh axis; use one of {legal}")
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(mesh, {name: tuple(axes) for name, axes in config.rules.items()})
