"""Before the first step: whether the step that was compiled fits the devices that it is to run on.

The compiler's own account, against what the device says it can give. Without this look a run would die in the
allocator, on a cluster after its time in the queue, and on a laptop by the kernel, without a word.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.text import GIB
from parallel.hardware import HardwareConfig

OVERRIDE = "hardware.device.preflight=false starts all the same"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the step's peak, by what they hold.

    optimizer: moments, average and counters. batch: of one step, on the device. gradients: float32, placed
    like their parameters. temporaries: all else, activations above all.
    """

    parameters: int
    optimizer: int
    gradients: int
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        """Of all classes."""
        return self.parameters + self.optimizer + self.gradients + self.batch + self.temporaries


def refuse_what_cannot_fit(hardware: HardwareConfig, mesh: Mesh, state: Any, batch: Any, step: Any) -> None:
    """Raise ValueError, in the planner's words, where the compiled step needs more than a device has.

    state, batch: what the step takes, abstract arrays with shardings; step: anything with XLA's
    `memory_analysis()`.
    """
    device = mesh.local_devices[0]
    limit = capacity(hardware, device)
    if limit is None:
        return
    memory = memory_of(state, batch, step.memory_analysis().temp_size_in_bytes)
    if memory.total > limit:
        stages = mesh.shape["pipeline"]
        parts = "pipeline.microbatches" if stages > 1 else "training.accumulation_steps"
        raise ValueError(
            f"{refusal(memory, limit, device.device_kind)}; training.remat=full, more {parts} or mesh.fsdp "
            "need less, and python scripts/plan.py with the same words and hardware=NAME finds what fits; "
            f"{OVERRIDE}"
        )


def capacity(hardware: HardwareConfig, device: Any) -> int | None:
    """Bytes that a program may have on this device; None where nobody looks.

    The device's own word counts, which knows what share the allocator took; the datasheet where it says none.
    CPU devices share the machine's memory, with everybody: what is more than all of it fits under no luck.
    """
    datasheet = hardware.device
    if datasheet is not None and not datasheet.preflight:
        return None
    if device.platform == "cpu":
        return machine_memory() // jax.local_device_count()
    said = (device.memory_stats() or {}).get("bytes_limit")
    if said:
        return int(said)
    if datasheet is None or datasheet.memory_gib is None:
        return None
    return round(datasheet.memory_gib * GIB)


def machine_memory() -> int:
    """Bytes of main memory, free or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_of(state: Any, batch: Any, temporaries: int) -> Memory:
    """Classes of bytes on one device: what the step is given, and the compiler's temporaries.

    state, batch: abstract arrays with shardings. Gradients are a part of the temporaries: float32, placed
    like the parameters.
    """
    parameters = bytes_on_device((state.params, state.frozen))
    gradients = sum(4 * math.prod(shard_shape(leaf)) for leaf in jax.tree.leaves(state.params))
    return Memory(
        parameters=parameters,
        optimizer=bytes_on_device(state) - parameters,
        gradients=min(gradients, temporaries),
        batch=bytes_on_device(batch),
        temporaries=max(0, temporaries - gradients),
    )


def bytes_on_device(tree: Any) -> int:
    """Of an abstract tree with shardings, on any one device: all are alike."""
    return sum(np.dtype(x.dtype).itemsize * math.prod(shard_shape(x)) for x in jax.tree.leaves(tree))


def shard_shape(leaf: Any) -> Sequence[int]:
    """Of one device's part."""
    return leaf.sharding.shard_shape(leaf.shape)


def classes(memory: Memory) -> list[tuple[str, int]]:
    """Name and bytes of each class, in order."""
    names = ("parameters", "optimizer", "gradients", "batch", "temporaries")
    return [(name, getattr(memory, name)) for name in names]


def refusal(memory: Memory, capacity: int, device: str) -> str:
    """The words for a step that a device cannot hold: the planner's and those before a run's first step."""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in classes(memory) if size >= GIB / 20)
    return (
        f"the step needs {memory.total / GIB:.1f} GiB on each device ({parts}), but {device} can hold "
        f"{capacity / GIB:.1f}"
    )
