"""Legal or not: one answer for a config on so many devices, and the meshes nearest to one that is not.

The rules are `training.legal.rules`; here is the question, and the search among meshes.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from common.text import counted
from parallel.config import MESH_AXES, MeshConfig, divisors
from training.config import Config
from training.legal.mesh_case import MeshCase, known_sizes
from training.legal.rules import broken_rule


def legal(config: Config, device_count: int | None) -> str | None:
    """None, or one sentence that says why this config cannot run on so many devices, with legal values.

    device_count: None before the devices are known; then a mesh that takes what is left (-1) passes.
    """
    try:
        sizes = known_sizes(config.mesh, device_count)
    except ValueError as error:
        return str(error)
    return None if sizes is None else broken_rule(MeshCase(config, sizes, device_count))


def refusal(config: Config, device_count: int | None) -> str | None:
    """`legal`, with the nearest legal meshes as overrides of this config's."""
    reason = legal(config, device_count)
    if reason is None:
        return None
    if device_count is None:
        sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
        device_count = None if -1 in sizes else math.prod(sizes)
    meshes = nearest_meshes(config, device_count, limit=3) if device_count else []
    if device_count is None or not meshes:
        return reason
    near = ", or ".join(overrides(config.mesh, mesh) for mesh in meshes)
    return f"{reason}; nearest legal meshes of {counted(device_count, 'device')}: {near}"


def nearest_meshes(config: Config, device_count: int, limit: int = 5) -> list[MeshConfig]:
    """Legal meshes for these devices, all else as it is, nearest first: few axes changed, and by little."""
    free = _free(config.mesh)
    asked = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    asked |= {axis: 1 for axis, size in asked.items() if size == -1 and axis != free}
    found: list[MeshConfig] = []
    for changes in range(len(MESH_AXES) + 1):
        if len(found) >= limit or (found and changes > 3):
            break
        for sizes in sorted(_meshes(asked, free, changes, device_count), key=lambda s: _distance(asked, s)):
            if broken_rule(MeshCase(config, sizes, device_count)) is None:
                found.append(replace(config.mesh, **sizes))  # type: ignore[arg-type]
    return found[:limit]


def overrides(asked: MeshConfig, mesh: MeshConfig) -> str:
    """What to type to have `mesh` in place of `asked`, whose first -1 takes what is left."""
    axes = [axis for axis in MESH_AXES if axis != _free(asked)]
    changed = [axis for axis in axes if getattr(asked, axis) != getattr(mesh, axis)]
    return " ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in changed)


def _free(mesh: MeshConfig) -> str | None:
    """The first axis that takes what is left: more than one cannot."""
    return next((axis for axis in MESH_AXES if getattr(mesh, axis) == -1), None)


def _meshes(
    asked: dict[str, int], free: str | None, changes: int, device_count: int
) -> Iterator[dict[str, int]]:
    """All meshes of so many devices with `changes` sizes other than asked; that of -1 is not counted."""
    fixed = [axis for axis in MESH_AXES if axis != free]
    for chosen in itertools.combinations(fixed, changes):
        kept = math.prod(asked[axis] for axis in fixed if axis not in chosen)
        if device_count % kept:
            continue
        axes = (*chosen, free) if free else chosen
        for factors in _factors(device_count // kept, len(axes)):
            changed = dict(zip(axes, factors, strict=True))
            if all(changed[axis] != asked[axis] for axis in chosen):
                yield asked | changed


@lru_cache(maxsize=4096)
def _factors(number: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write `number` as an ordered product of so many."""
    if parts == 0:
        return ((),) if number == 1 else ()
    if parts == 1:
        return ((number,),)
    return tuple((d, *rest) for d in divisors(number) for rest in _factors(number // d, parts - 1))


def _distance(asked: dict[str, int], sizes: dict[str, int]) -> tuple[float, int, tuple[int, ...]]:
    """How far from what was asked: doublings, then axes but the plain two; the rest fixes the order."""
    doublings = sum(abs(math.log2(sizes[a] / asked[a])) for a in MESH_AXES if asked[a] != -1)
    special = sum(size > 1 for axis, size in sizes.items() if axis not in ("data", "fsdp"))
    return round(doublings, 6), special, tuple(sizes.values())
