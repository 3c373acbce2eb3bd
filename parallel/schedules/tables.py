"""Pipeline schedules as tables: which stage works on which microbatch in which tick. Plain numpy, no devices.

P stages (devices along mesh.pipeline), M microbatches, v chunks of layers a stage holds (virtual stages).
A unit of work is one microbatch passing one chunk; unit `m * v + c` is microbatch m in chunk c, and chunk c
of stage s holds the layers that come (c * P + s)-th. All stages go through the ticks together, so a tick
costs what the program does in it, whether a stage has something to do or not: idle slots are the bubble.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Int

from parallel.config import PIPELINE_SCHEDULES

IDLE = -1
Grid = Int[np.ndarray, "ticks P"]


@dataclass(frozen=True)
class TickWork:
    """What the program does in a tick on every stage; `head` is the end of the model, on the last stage's."""

    forward: bool = False
    backward: bool = False
    head: bool = False
    weight: bool = False

    def cost(self, split: bool) -> int:
        """In forward passes of a chunk: forward 1, recompute 1, gradient by input 1, by weights 1."""
        # A chunk's input is all that was kept, so backward begins with a forward pass again.
        return self.forward + (2 if split else 3) * self.backward + self.weight


@dataclass(frozen=True)
class TickRun:
    """`count` ticks from `start` on that all do the same work."""

    work: TickWork
    start: int
    count: int


@dataclass(frozen=True)
class Schedule:
    """A table per kind of work, [ticks, P] of units or IDLE, and what follows from them."""

    name: str
    stages: int
    microbatches: int
    chunks: int
    forward: Grid = field(repr=False)
    backward: Grid = field(repr=False)
    weight: Grid = field(repr=False)  # all IDLE where backward makes the weights' gradients too

    @property
    def split(self) -> bool:
        """Whether gradients by weights have ticks of their own."""
        return bool((self.weight != IDLE).any())

    @cached_property
    def slots(self) -> tuple[Grid, Grid, int]:
        """Where each stage keeps a unit's input from its forward to its backward tick, and how many it needs.

        The first free place is taken, so the number is the peak of live units over stages.
        """
        return allocate(self.forward, self.backward)

    @cached_property
    def weight_slots(self) -> tuple[Grid, Grid, int]:
        """As `slots`, for what waits from a unit's backward tick to its weight tick."""
        return allocate(self.backward, self.weight)

    @cached_property
    def work(self) -> tuple[TickWork, ...]:
        """What is done in each tick, in order."""
        last = self.backward[:, -1]
        ends = (last != IDLE) & (last % self.chunks == self.chunks - 1)
        # One busy stage makes the tick cost: the others compute beside it, on something or on nothing.
        busy = [(grid != IDLE).any(axis=1) for grid in (self.forward, self.backward, self.weight)]
        return tuple(
            TickWork(bool(f), bool(b), bool(head), bool(w)) for f, b, w, head in zip(*busy, ends, strict=True)
        )

    @cached_property
    def runs(self) -> tuple[TickRun, ...]:
        """Consecutive ticks of the same work: one compiled loop each."""
        return group_ticks(self.work)

    @cached_property
    def forward_runs(self) -> tuple[TickRun, ...]:
        """The forward-only twin, for evaluation: the same units until the last has left the last stage."""
        # Without backward ticks in between, the forward units of all schedules follow each other alike.
        last = self.forward[: self.microbatches * self.chunks + self.stages - 1, -1]
        ends = (last != IDLE) & (last % self.chunks == self.chunks - 1)
        return group_ticks([TickWork(forward=True, head=bool(end)) for end in ends])

    @property
    def cost(self) -> int:
        """Of the whole, in forward passes of a chunk: what the costliest stage of each tick takes."""
        return sum(work.cost(self.split) for work in self.work)

    @property
    def bubble(self) -> float:
        """Share of the time in which a stage waits for others."""
        # Of one stage: forward, recompute and two gradients for each of its units.
        useful = 4 * self.microbatches * self.chunks
        return 1.0 - useful / self.cost

    @property
    def peak_inputs(self) -> int:
        """Chunk inputs that the fullest stage keeps at once; each is [B/M, T, D]."""
        return self.slots[2]


def make_schedule(name: str, *, stages: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """The table of a schedule by its name.

    gpipe: all forward passes, then all backward (Huang et al. 2019); keeps M inputs.
    1f1b: backward follows as soon as it can; keeps at most 2P - 1 (Narayanan et al. 2019, in lockstep).
    interleaved_1f1b: v chunks a stage make the bubble v times smaller (Narayanan et al. 2021).
    zero_bubble: 1f1b whose gradients by weights wait for the tick in which all stages have some (the split of
    Qi et al. 2023); that part has no bubble, the rest keeps its own, since all stages tick together.
    Raises ValueError where the numbers make no such table.
    """
    check_schedule(name, stages, microbatches, virtual_stages)
    # The letters of the table above: the formulas below are unreadable in words.
    P, M, v = stages, microbatches, virtual_stages
    begin = M * v + P - 1 if name == "gpipe" else v * P - 1  # of backward: when the last stage has its first
    # Every unit enters one tick after the one before it, and the last needs P - 1 more to come through.
    ticks = begin + M * v + P - 1
    forward = np.full((ticks, P), IDLE)
    backward, weight = forward.copy(), forward.copy()
    for unit in range(M * v):
        m, c = divmod(unit, v)
        # Microbatches go in groups of P: while the first of a group passes the other stages, the rest keep
        # the first stage busy; then the group comes back for its next chunk.
        group, j = divmod(m, P)
        base = group * v * P + j
        for s in range(P):
            # One stage a tick, and P ticks until the same stage's next chunk.
            forward[base + c * P + s, s] = unit
            # The mirror image: chunks and stages in reverse, `begin` ticks later.
            backward[begin + base + (v - 1 - c) * P + P - 1 - s, s] = unit
            if name == "zero_bubble":
                # In the tick in which the first stage, the last to be reached, has its backward: then all
                # have it, and the weights' work fills a tick on every stage.
                weight[begin + base + P - 1, s] = unit
    return Schedule(name, P, M, v, forward, backward, weight)


def check_schedule(name: str, stages: int, microbatches: int, virtual_stages: int) -> None:
    """Raise ValueError, with the legal values, for numbers that make no schedule."""
    if name not in PIPELINE_SCHEDULES:
        raise ValueError(f"pipeline.schedule={name} is not one of {', '.join(PIPELINE_SCHEDULES)}")
    for key, value in {"microbatches": microbatches, "virtual_stages": virtual_stages}.items():
        if value < 1:
            raise ValueError(f"pipeline.{key}={value} must be 1 or more")
    if name != "interleaved_1f1b":
        if virtual_stages != 1:
            raise ValueError(
                f"pipeline.virtual_stages={virtual_stages} needs pipeline.schedule=interleaved_1f1b; "
                f"with {name} use pipeline.virtual_stages=1"
            )
    elif virtual_stages == 1:
        raise ValueError(
            "pipeline.virtual_stages=1 with pipeline.schedule=interleaved_1f1b is 1f1b; "
            "use pipeline.virtual_stages=2 or more, or pipeline.schedule=1f1b"
        )
    elif microbatches % stages:
        above = -(-microbatches // stages) * stages
        raise ValueError(
            f"pipeline.microbatches={microbatches} must be a multiple of mesh.pipeline={stages} for "
            f"pipeline.schedule=interleaved_1f1b; use {above}"
        )


def group_ticks(work: Sequence[TickWork]) -> tuple[TickRun, ...]:
    """Consecutive ticks of equal work as one run each."""
    starts = [t for t, w in enumerate(work) if t == 0 or w != work[t - 1]]
    return tuple(TickRun(work[a], a, b - a) for a, b in zip(starts, [*starts[1:], len(work)], strict=True))


def allocate(begin: Grid, end: Grid) -> tuple[Grid, Grid, int]:
    """Places for units alive from their tick in `begin` to that in `end`, both included, stage by stage.

    Returns the place that each unit takes in `begin`, the place it leaves in `end`, and the number of places.
    """
    taken, left = np.zeros_like(begin), np.zeros_like(end)
    count = 0
    for s in range(begin.shape[1]):
        # Stage by stage, then the largest number for all: arrays have one shape on every device.
        free: list[int] = []
        held: dict[int, int] = {}
        size = 0
        for t in range(begin.shape[0]):
            if (unit := int(begin[t, s])) != IDLE:
                if not free:
                    free.append(size)
                    size += 1
                held[unit] = taken[t, s] = min(free)
                free.remove(held[unit])
            if (unit := int(end[t, s])) != IDLE:
                left[t, s] = held.pop(unit)
                # Free from the next tick on: in this one it is still read.
                free.append(int(left[t, s]))
        count = max(count, size)
    return taken, left, count


def fold_runs(runs: Sequence[TickRun]) -> list[tuple[tuple[TickRun, ...], int]]:
    """Runs as (pattern, repeats): a pattern that repeats itself is compiled once, whatever M is."""
    folded: list[tuple[tuple[TickRun, ...], int]] = []
    at = 0
    while at < len(runs):
        repeats = 1
        pattern = tuple(runs[at : at + 2])
        # Patterns of two: one forward, one backward is what 1F1B repeats M times over.
        while len(pattern) == 2 and _alike(pattern, runs[at + 2 * repeats : at + 2 * repeats + 2]):
            repeats += 1
        if repeats == 1:
            pattern = pattern[:1]
        folded.append((pattern, repeats))
        at += len(pattern) * repeats
    return folded


def _alike(pattern: Sequence[TickRun], other: Sequence[TickRun]) -> bool:
    return [(r.work, r.count) for r in pattern] == [(r.work, r.count) for r in other]


def timeline(schedule: Schedule, columns: int | None = None) -> str:
    """The table as text: a row a stage, a column a tick; F, B or W, the microbatch, the chunk as a letter.

    columns: width at which it is broken into blocks; None: never.
    """
    ticks = len(schedule.work)
    cells = [[_cell(schedule, t, s) for t in range(ticks)] for s in range(schedule.stages)]
    width = max(len(cell) for row in cells for cell in row)
    heads = [f"stage {s}:".ljust(len(f"stage {schedule.stages - 1}:")) for s in range(schedule.stages)]
    block = ticks if columns is None else max(1, (columns - len(heads[0])) // (width + 1))
    return "\n\n".join(
        "\n".join(
            " ".join([head, *(cell.ljust(width) for cell in row[start : start + block])]).rstrip()
            for head, row in zip(heads, cells, strict=True)
        )
        for start in range(0, ticks, block)
    )


def _cell(schedule: Schedule, tick: int, stage: int) -> str:
    parts = []
    for kind, grid in (("F", schedule.forward), ("B", schedule.backward), ("W", schedule.weight)):
        if (unit := int(grid[tick, stage])) != IDLE:
            m, c = divmod(unit, schedule.chunks)
            parts.append(f"{kind}{m}" + (chr(ord("a") + c) if schedule.chunks > 1 else ""))
    return "".join(parts) or "."
