"""What one training step asks of one device, whether it was computed or read from a compiled program.

`planner.analytic` and `planner.compiled` both answer with a `StepCost`; `planner.roofline`
turns one into seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.preflight import Memory

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes; kinds as in `planner.hlo.program.KINDS`.

    bytes: in all executions of a step together, of what one member of a group holds of the whole that is
    exchanged: of an all-gather its result, of every other kind the operands.
    """

    kind: str
    axes: Axes
    times: int
    bytes: int


@dataclass(frozen=True)
class StepCost:
    """One step on one device.

    how: "compiled" or "analytic". flops: executed, what is made again included, by the precision that they
    run in. moved_bytes: read from and written to the device's memory. bubble: share of its time in which a
    stage waits; 0 where waiting stages work on nothing and flops count that.
    """

    how: str
    memory: Memory
    flops: Mapping[str, float]
    moved_bytes: float
    traffic: tuple[Traffic, ...] = ()
    bubble: float = 0.0
    kernels: Mapping[str, int] = field(
        default_factory=dict
    )  # executions by name; empty where nothing was compiled
