"""How the devices are laid out, and which logical axis of a tensor goes to which mesh axis."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from common.checks import choice, require, within

MESH_AXES = ("replica", "pipeline", "data", "fsdp", "expert", "context", "tensor")  # slowest link first
PIPELINE_SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")
XLA_PROFILES = ("default", "none", "cpu", "gpu", "gpu_cluster", "gpu_tensor", "tpu")
CONTEXT_ATTENTION = ("ulysses", "allgather", "ring")
AUTOSCALE_POLICIES = ("nodes", "queue")


@dataclass
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left.

    `rules` maps a logical axis (of a parameter or an activation) to the mesh axes that split it; one that is
    not named is not split.
    """

    replica: int = 1  # synchronous data parallel across slices or sites
    pipeline: int = 1  # stages of layers
    data: int = -1  # rows of the batch; parameters whole
    fsdp: int = 1  # rows of the batch; parameters, gradients and moments in parts
    expert: int = 1  # experts of a mixture
    context: int = 1  # positions of a row
    tensor: int = 1  # heads, feed-forward width and vocabulary
    rules: dict[str, list[str]] = field(default_factory=dict)
    dcn: dict[str, int] = field(default_factory=dict)  # of an axis: how many slices (or hosts) it crosses

    def __post_init__(self) -> None:
        """Sizes and factors by themselves; `mesh_shape` multiplies them out."""
        for axis in MESH_AXES:
            size = getattr(self, axis)
            require(size >= 1 or size == -1, f"mesh.{axis}", size, "1 or more, or -1 for what is left")
        for axis, factor in self.dcn.items():
            choice("an axis of mesh.dcn", axis, MESH_AXES)
            limit = f"1 or more: slices that mesh.{axis} crosses"
            require(factor >= 1, f"mesh.dcn.{axis}", factor, limit)


def mesh_shape(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Devices along each mesh axis, slowest link first, -1 filled in.

    Raises ValueError where the sizes do not multiply to `device_count`, or a DCN factor does not divide one.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        axes = " and ".join(f"mesh.{axis}=-1" for axis in free)
        raise ValueError(f"{axes}: only one axis can take what is left; set one of them to 1 or more")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " * ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
    if free and device_count % fixed:
        raise ValueError(
            f"{asked} (beside mesh.{free[0]}=-1) does not divide {device_count} devices; the sizes must "
            f"multiply to one of {_listed(divisors(device_count))}, which must divide {device_count}"
        )
    if not free and fixed != device_count:
        verb = "is" if device_count == 1 else "are"
        what = f"{asked} is {fixed} devices" if asked else "every mesh axis is 1, one device,"
        raise ValueError(
            f"{what} but {device_count} {verb} here; the product must be {device_count} devices "
            "(mesh.data=-1 takes what is left)"
        )
    if free:
        sizes[free[0]] = device_count // fixed
    if reason := dcn_problem(config.dcn, sizes):
        raise ValueError(reason)
    return sizes


def dcn_problem(dcn: Mapping[str, int], sizes: Mapping[str, int]) -> str | None:
    """Why an axis of this size cannot cross that many slices, with legal numbers; None where all can."""
    for axis, factor in dcn.items():
        if sizes[axis] % factor:
            return (
                f"mesh.dcn.{axis}={factor} does not divide mesh.{axis}={sizes[axis]}; "
                f"use mesh.dcn.{axis}={_listed(divisors(sizes[axis]))}"
            )
    return None


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of `n`, in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass
class PipelineConfig:
    """In what order stages work on microbatches; only read where mesh.pipeline is above 1."""

    schedule: str = "1f1b"  # gpipe | 1f1b | interleaved_1f1b | zero_bubble
    microbatches: int = 8  # parts of the batch that follow each other through the stages
    virtual_stages: int = 1  # chunks of layers a device holds (interleaved_1f1b: 2 or more)

    def __post_init__(self) -> None:
        """Each value by itself; whether they make a schedule depends on mesh.pipeline:
        `training.legal.nearest`.
        """
        choice("pipeline.schedule", self.schedule, PIPELINE_SCHEDULES)
        for key in ("microbatches", "virtual_stages"):
            within(f"pipeline.{key}", getattr(self, key), 1)


@dataclass
class ContextConfig:
    """How attention crosses positions that lie on other devices; only read where mesh.context is above 1."""

    attention: str = "ulysses"  # ulysses | allgather | ring
    zigzag: bool = True  # allgather and ring: early and late positions paired, so that causal work is even

    def __post_init__(self) -> None:
        """A kind that there is."""
        choice("context.attention", self.attention, CONTEXT_ATTENTION)

    @property
    def zigzags(self) -> bool:
        """Whether rows are in zigzag order: ulysses splits heads, so its work is even in any order."""
        return self.zigzag and self.attention != "ulysses"


@dataclass
class AutoscaleConfig:
    """How a run finds its mesh again when it starts on other devices, the global batch staying as it is."""

    policy: str = "nodes"  # nodes: all devices that there are | queue: few of them while other jobs wait
    rows_per_device: int | None = None  # of a microbatch, at most; null: as on the full mesh
    min_devices: int = 1  # with fewer the run does not start, and under queue it shrinks to these
    max_devices: int | None = None  # of the full mesh; null: the product of mesh.*, all where one is -1
    queue: str = "env"  # where the depth is read: env (CAMBRIAN_QUEUE_DEPTH) | squeue | the path of a file
    shrink_at: int = 4  # jobs waiting, or more: down to min_devices
    grow_at: int = 0  # jobs waiting, or fewer: up to max_devices; in between as at the last start

    def __post_init__(self) -> None:
        """Each value by itself, and thresholds that leave room between them."""
        choice("autoscale.policy", self.policy, AUTOSCALE_POLICIES)
        for key in ("rows_per_device", "min_devices", "max_devices"):
            within(f"autoscale.{key}", getattr(self, key), 1)
        if self.max_devices is not None and self.max_devices < self.min_devices:
            raise ValueError(
                f"autoscale.max_devices={self.max_devices} is below autoscale.min_devices="
                f"{self.min_devices}; raise the one or lower the other"
            )
        if not 0 <= self.grow_at < self.shrink_at:
            raise ValueError(
                f"autoscale.grow_at={self.grow_at} must be 0 or more and below autoscale.shrink_at="
                f"{self.shrink_at}: at one depth a run cannot both grow and shrink"
            )
        if not self.queue:
            raise ValueError("autoscale.queue is empty; use env, squeue or the path of a file")


def main_segment(segments: Sequence[Any]) -> int:
    """The segment that a pipeline splits into stages: the one with the most layers.

    segments: with the `count` of repetitions and the `period` of layers of each.
    """
    # The most layers, not the most parameters: ticks take as long as layers do. The first of equals, as `max`
    # has it, so that checkpoints and rules agree on which.
    return max(range(len(segments)), key=lambda i: segments[i].count * len(segments[i].period))
