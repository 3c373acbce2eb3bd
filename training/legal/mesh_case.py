"""A config on a mesh whose sizes are known, and the words in which a rule says what else would be legal.

A remedy reads `KEY=VALUE, VALUE or KEY=VALUE`, and each of its values is legal as far as the rule that names
it can see.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from parallel.config import MESH_AXES, MeshConfig, divisors, mesh_shape
from training.config import Config

SHOWN = 8  # values of a remedy


def known_sizes(mesh: MeshConfig, device_count: int | None) -> dict[str, int] | None:
    """`mesh_shape`, or None where a size is -1 and the devices are not known yet."""
    if device_count is None:
        sizes = [getattr(mesh, axis) for axis in MESH_AXES]
        if sizes.count(-1) == 1:
            return None
        device_count = math.prod(sizes)
    return mesh_shape(mesh, device_count)


@dataclass(frozen=True)
class MeshCase:
    """A config with its mesh's sizes filled in."""

    config: Config
    sizes: dict[str, int]
    device_count: int | None

    def axes(self, name: str) -> list[str]:
        """The mesh axes that split a logical axis, those of size 1 left out."""
        return [axis for axis in self.config.mesh.rules.get(name, ()) if self.sizes[axis] > 1]

    def ways(self, name: str) -> int:
        """Into how many parts they do."""
        ways = 1
        for axis in self.config.mesh.rules.get(name, ()):
            ways *= self.sizes[axis]
        return ways

    def by(self, axes: Iterable[str]) -> str:
        """`mesh.fsdp=4 * mesh.expert=2`."""
        return " * ".join(f"mesh.{axis}={self.sizes[axis]}" for axis in axes)

    def options(self, axes: Iterable[str], fits: Callable[[int], bool]) -> list[str]:
        """Per axis the sizes whose product with the others `fits`, where there are any."""
        axes, found = list(axes), []
        product = math.prod(self.sizes[axis] for axis in axes)
        for axis in axes:
            others = product // self.sizes[axis]
            fitting = (size for size in self.candidates(axis) if fits(others * size))
            found.append(values(f"mesh.{axis}", fitting))
        return [option for option in found if option]

    def candidates(self, axis: str) -> Iterable[int]:
        """Sizes that the devices allow."""
        return (
            divisors(self.device_count) if self.device_count else range(1, 2 * max(4, self.sizes[axis]) + 1)
        )

    def sized(self, **sizes: int) -> "MeshCase":
        """The same with other sizes."""
        return replace(self, sizes=self.sizes | sizes)


def values(key: str, legal: Iterable[Any]) -> str:
    """`KEY=VALUE, VALUE`, or nothing where none is legal."""
    shown = ", ".join(str(value) for value in itertools.islice(legal, SHOWN))
    return f"{key}={shown}" if shown else ""


def remedy(*options: str) -> str:
    """`; use KEY=VALUE, VALUE or KEY=VALUE`, of those that are there."""
    there = [option for option in options if option]
    return f"; use {' or '.join(there)}" if there else ""


def around(value: int, fits: Callable[[int], bool], least: int = 1) -> list[int]:
    """The nearest number below and the nearest above that fit."""
    below = (n for n in range(value - 1, least - 1, -1) if fits(n))
    above = (n for n in range(max(value + 1, least), 8 * value + 4096) if fits(n))
    return [*itertools.islice(below, 1), *itertools.islice(above, 1)]
