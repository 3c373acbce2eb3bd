"""Before the first step: whether the step that was compiled fits the devices that it is to run on.

The compiler's own account, against what the device says it can give. Without this look a run would die in the
allocator, on a cluster after its time in the queue.
"""

from typing import Any

from parallel.hardware import GIB, HardwareConfig
from planner.compiled import memory_of
from planner.screen import refusal
from training.program import Program

OVERRIDE = "hardware.device.preflight=false starts all the same"


def refuse_what_cannot_fit(hardware: HardwareConfig, program: Program, step: Any) -> None:
    """Raise ValueError, in the planner's words, where the compiled step needs more than a device has.

    step: anything with XLA's `memory_analysis()`. Says nothing on a CPU, whose memory is everybody's.
    """
    device = program.layout.mesh.local_devices[0]
    limit = capacity(hardware, device)
    if limit is None:
        return
    memory = memory_of(program, step.memory_analysis().temp_size_in_bytes)
    if memory.total > limit:
        stages = program.layout.mesh.shape["pipeline"]
        parts = "pipeline.microbatches" if stages > 1 else "training.accumulation_steps"
        raise ValueError(
            f"{refusal(memory, limit, device.device_kind)}; training.remat=full, more {parts} or mesh.fsdp "
            "need less, and python scripts/plan.py with the same words and hardware=NAME finds what fits; "
            f"{OVERRIDE}"
        )


def capacity(hardware: HardwareConfig, device: Any) -> int | None:
    """Bytes that a program may have on this device; None where nobody looks.

    The device's own word counts, which knows what share the allocator took; the datasheet where it says none.
    """
    datasheet = hardware.device
    if device.platform == "cpu" or (datasheet is not None and not datasheet.preflight):
        return None
    said = (device.memory_stats() or {}).get("bytes_limit")
    if said:
        return int(said)
    if datasheet is None or datasheet.memory_gib is None:
        return None
    return round(datasheet.memory_gib * GIB)
