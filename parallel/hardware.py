"""What accelerators can do: datasheets as config, and a cluster of them as numbers to plan with.

Every figure of `configs/hardware/*.yaml` is one device's, as JAX counts devices (half a chip on TPU7x), one
way, and from the source that its file names. No device is touched here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.checks import choice, require, within
from common.text import GIB
from parallel.config import XLA_PROFILES

KINDS = ("gpu", "tpu", "cpu")


@dataclass
class LinkConfig:
    """One level of the network: NVLink or InfiniBand, ICI or the data centre's network."""

    name: str = "network"
    devices: int | None = None  # that it joins at most; null: any number
    gigabytes_per_second: float = 1.0  # a device sends so much while all send; along one dim of a torus
    latency_us: float = 1.0  # of one hop

    def __post_init__(self) -> None:
        ok = self.devices is None or self.devices >= 1
        require(ok, "hardware.device.links.devices", self.devices, "1 or more, or null for any number")
        for key in ("gigabytes_per_second", "latency_us"):
            require(getattr(self, key) > 0, f"hardware.device.links.{key}", getattr(self, key), "above 0")


@dataclass
class DeviceConfig:
    """One accelerator's datasheet, for the planner and for the look at memory before the first step."""

    kind: str = "gpu"  # gpu | tpu | cpu
    memory_gib: float | None = None  # that a program may fill; null: what the device says
    bandwidth: float = 1000.0  # of that memory, GB/s
    fp8_tflops: float | None = None  # dense; null: no such units
    int8_tflops: float | None = None
    reached: float = 0.75  # share of the peak that large matrix products reach
    per_node: int = 8  # devices of one host
    torus_dims: int = 0  # of a TPU's network; 0: switched
    links: list[LinkConfig] = field(default_factory=list)  # nearest first
    preflight: bool = True  # refuse before the first step what cannot fit

    def __post_init__(self) -> None:
        choice("hardware.device.kind", self.kind, KINDS)
        within("hardware.device.per_node", self.per_node, 1)
        require(0 < self.reached <= 1, "hardware.device.reached", self.reached, "above 0 and at most 1")
        for key in ("memory_gib", "bandwidth", "fp8_tflops", "int8_tflops"):
            value = getattr(self, key)
            require(value is None or value > 0, f"hardware.device.{key}", value, "above 0")


@dataclass
class HardwareConfig:
    """The accelerator: what MFU is a share of, what XLA is asked for, and how many of them a plan is for.

    `peak_tflops=null` measures at start (CPU). `xla` names a set of compiler options (`training.xla`);
    `default` is the one for the devices at hand. `nodes` or `topology` say how many a plan is for.
    """

    name: str = "auto"  # for tables; chosen with hardware=NAME
    peak_tflops: float | None = None  # dense bf16 (accelerators), or f32 (CPU), per device
    xla: str = "default"  # default | none | cpu | gpu | gpu_cluster | gpu_tensor | tpu
    nodes: int | None = None  # hosts of the cluster; null: as many as topology or the mesh need
    topology: str | None = (
        None  # TPUs: the torus (4x4x4), or slices and torus (2*4x4x4); GPUs: hosts x GPUs (8x8)
    )
    device: DeviceConfig | None = None  # its datasheet; null: unknown

    def __post_init__(self) -> None:
        """A profile that there is; whether it is for the devices at hand shows when they are known."""
        choice("hardware.xla", self.xla, XLA_PROFILES)
        require(self.nodes is None or self.nodes >= 1, "hardware.nodes", self.nodes, "1 or more, or null")


@dataclass(frozen=True)
class Link:
    """`LinkConfig` in bytes and seconds; devices: 0 for any number."""

    name: str
    devices: int
    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """A cluster to plan for. Rates are one device's a second; flops: by precision, dense, of the datasheet.

    torus: sizes of an ICI slice, empty where the network is switched. slices: of it, joined by the last link.
    """

    name: str
    kind: str
    devices: int
    per_node: int
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float]
    reached: float
    links: tuple[Link, ...]
    torus: tuple[int, ...] = ()
    slices: int = 1

    @property
    def topology(self) -> str:
        """The topology in the words that `planner.described_devices` takes: `8x8`, or `2*4x4x4`."""
        if self.kind != "tpu":
            return f"{-(-self.devices // self.per_node)}x{min(self.devices, self.per_node)}"
        torus = "x".join(map(str, self.torus))
        return torus if self.slices == 1 else f"{self.slices}*{torus}"


def machine_of(hardware: HardwareConfig, mesh_devices: int | None = None) -> Machine:
    """The cluster that a config describes; mesh_devices: the product of the mesh, where no axis is -1.

    Raises ValueError, in one line with the remedy, where its datasheet is unknown or sizes disagree.
    """
    device = hardware.device
    if device is None or hardware.peak_tflops is None or device.memory_gib is None:
        raise ValueError(
            f"hardware={hardware.name} has no datasheet to plan with; choose one with hardware=h200 (or "
            "another of configs/hardware), or give hardware.peak_tflops and hardware.device.memory_gib"
        )
    slices, torus, devices = _sizes(hardware, device, mesh_devices)
    peak = hardware.peak_tflops
    flops = {"bfloat16": peak, "float32": peak if device.kind == "cpu" else peak / 2}
    for name, value in (("fp8", device.fp8_tflops), ("int8", device.int8_tflops)):
        if value is not None:
            flops[name] = value
    return Machine(
        name=hardware.name,
        kind=device.kind,
        devices=devices,
        per_node=device.per_node,
        memory_bytes=round(device.memory_gib * GIB),
        bandwidth=device.bandwidth * 1e9,
        flops={name: value * 1e12 for name, value in flops.items()},
        reached=device.reached,
        links=tuple(
            Link(x.name, x.devices or 0, x.gigabytes_per_second * 1e9, x.latency_us * 1e-6)
            for x in device.links
        ),
        torus=torus,
        slices=slices,
    )


def _sizes(
    hardware: HardwareConfig, device: DeviceConfig, mesh_devices: int | None
) -> tuple[int, tuple[int, ...], int]:
    """The number of slices, one slice's torus, and devices in all."""
    slices, torus, total = 1, tuple[int, ...](), None
    if hardware.topology is not None:
        slices, torus = _parse_topology(hardware.topology, device)
        total = slices * math.prod(torus)
    count = hardware.nodes * device.per_node if hardware.nodes is not None else None
    if total is not None and count is not None and total != count:
        raise ValueError(
            f"hardware.topology={hardware.topology} is {total} devices, but hardware.nodes={hardware.nodes} "
            f"of {device.per_node} are {count}; give only one of them"
        )
    devices = total or count or mesh_devices or device.per_node
    if device.torus_dims == 0:
        return 1, (), devices
    if total is None:
        torus = default_torus(devices, device.torus_dims)
    return slices, torus, devices


def _parse_topology(topology: str, device: DeviceConfig) -> tuple[int, tuple[int, ...]]:
    text = str(topology).lower()
    slices, _, torus = text.rpartition("*") if device.torus_dims else ("", "", text)
    parts = torus.split("x")
    good = all(part.isdigit() and int(part) > 0 for part in (*parts, *([slices] if slices else [])))
    dims = (device.torus_dims,) if device.torus_dims else (1, 2, 3)
    if not good or len(parts) not in dims:
        such = {0: "64 or 8x8", 2: "4x4 or 16x16", 3: "4x4x4 or 2*4x4x4"}[device.torus_dims]
        raise ValueError(f"hardware.topology={topology} is none of these devices; such are {such}")
    return int(slices or 1), tuple(map(int, parts))


def default_torus(devices: int, dims: int) -> tuple[int, ...]:
    """The most even torus of so many devices, smallest side first: 64 in three dims are 4x4x4."""
    if dims == 1:
        return (devices,)
    sides = [d for d in range(1, round(devices ** (1 / dims)) + 1) if devices % d == 0]
    side = max(sides)
    return (side, *default_torus(devices // side, dims - 1))


def strides(sizes: Sequence[int]) -> list[int]:
    """How far apart neighbours along each mesh axis are, devices counted in the mesh's order."""
    return [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
