"""Devices to a named mesh."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from common.text import counted
from parallel.axes import Layout
from parallel.config import MESH_AXES, MeshConfig, mesh_shape


def build_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> Layout:
    """The mesh over these devices (all of them by default) with the config's rules.

    Neighbours in the last axis (`tensor`) are neighbours on the network, which is where the most traffic is.
    Only the axes that `mesh.dcn` names cross from slice to slice. Raises ValueError where sizes, factors and
    rules do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    for name, axes in config.rules.items():
        if unknown := sorted(set(axes) - set(MESH_AXES)):
            legal = ", ".join(MESH_AXES)
            raise ValueError(f"mesh.rules.{name} names {unknown[0]}, no mesh axis; use one of {legal}")
    # Auto: shardings are said at parameters and at a few activations, and the partitioner finds the rest.
    mesh = Mesh(
        device_grid(sizes, config.dcn, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    return Layout(mesh, {name: tuple(axes) for name, axes in config.rules.items()})


def device_grid(sizes: Mapping[str, int], dcn: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in an array of these sizes; `dcn[axis]` of an axis's size is the number of slices it crosses.

    With mesh.dcn={data: 2} and mesh.data=8, data's coordinates 0 to 3 are on one slice, 4 to 7 on the other.
    Raises ValueError, naming how many slices there are, where the factors' product is another.
    """
    factors = {axis: dcn.get(axis, 1) for axis in sizes}
    # One slice: JAX's own placement, which folds the axes into a TPU's torus. Physical axes may be split,
    # since a mesh of seven names seldom is the torus's three.
    if math.prod(factors.values()) == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    by_process = slice_attribute(devices) == "process_index"
    _check_slices(factors, devices, slice_attribute(devices))
    return mesh_utils.create_hybrid_device_mesh(
        tuple(size // factors[axis] for axis, size in sizes.items()),
        tuple(factors.values()),
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def slice_attribute(devices: Sequence[Any]) -> str:
    """What tells slices apart: CPU devices of one machine say that they are one, however many processes."""
    # Where devices know no slices, hosts stand for them: they are what the slow network joins.
    by_process = any(d.platform == "cpu" or not hasattr(d, "slice_index") for d in devices)
    return "process_index" if by_process else "slice_index"


def _check_slices(factors: Mapping[str, int], devices: Sequence[Any], attribute: str) -> None:
    found = Counter(getattr(device, attribute) for device in devices)
    asked = " * ".join(f"mesh.dcn.{axis}={factor}" for axis, factor in factors.items() if factor > 1)
    how = "" if attribute == "slice_index" else ", counted by process"
    slices = counted(len(found), "slice") + how
    if math.prod(factors.values()) != len(found):
        remedy = f"use factors whose product is {len(found)}" if len(found) > 1 else "use mesh.dcn={}"
        raise ValueError(
            f"{asked} asks for {math.prod(factors.values())} slices, but the {len(devices)} devices are "
            f"{slices}; {remedy}"
        )
    if len(set(found.values())) > 1:
        # A mesh is a full array: slices of unequal size leave places that no device fills.
        held = ", ".join(str(count) for _, count in sorted(found.items()))
        raise ValueError(f"{asked} needs slices of one size, but they hold {held} devices; use equal slices")
