"""Every way to run a config on so many devices that leaves its numbers as they are.

Meshes, pipeline schedules and microbatches, accumulation and rematerialization change where and when sums are
made, not what is learnt; batch, length, model, optimizer and precision are the experiment and stay. What is
left out before anything is computed: `replica`, `tensor` beyond the nearest link or the heads, `context` that
leaves fewer than LONG positions, `expert` that does not divide the experts, and stages that do not divide the
layers or are more than MOST_STAGES.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.config import MESH_AXES, divisors
from parallel.hardware import Machine
from planner.roofline import reach
from training.config import Config
from training.legal.nearest import legal

POLICIES = ("none", "dots", "attention", "full")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
LONG = 8192  # positions on a device, above which a row may be worth splitting
MOST_STAGES = 16


@dataclass(frozen=True)
class Candidate:
    """A config and the words that make it from the one that was asked for."""

    config: Config
    words: tuple[str, ...]


def candidates(config: Config, machine: Machine) -> Iterator[Candidate]:
    """All that `training.legal` allows, in a fixed order."""
    for sizes in meshes(config, machine):
        for changes in inside(config, sizes):
            candidate = changed(config, {f"mesh.{axis}": size for axis, size in sizes.items()} | changes)
            if legal(candidate.config, machine.devices) is None:
                yield candidate


def meshes(config: Config, machine: Machine) -> Iterator[dict[str, int]]:
    """Sizes of all axes, whose product is the number of devices and whose rows divide the batch."""
    model = config.model
    near = min(reach(machine), model.num_heads)
    tensors = [n for n in divisors(machine.devices) if n <= near]
    contexts = [n for n in divisors(machine.devices) if n == 1 or config.data.seq_len // n >= LONG]
    experts = [
        n for n in divisors(machine.devices) if n == 1 or (model.moe and model.moe.num_experts % n == 0)
    ]
    stages = [n for n in divisors(machine.devices) if model.num_layers % n == 0 and n <= MOST_STAGES]
    for tensor, context, expert, pipeline in itertools.product(tensors, contexts, experts, stages):
        rest, left = divmod(machine.devices, tensor * context * expert * pipeline)
        if left or config.training.global_batch_size % (rest * expert):
            continue
        for data in divisors(rest):
            sizes = dict.fromkeys(MESH_AXES, 1)
            yield sizes | {
                "pipeline": pipeline,
                "data": data,
                "fsdp": rest // data,
                "expert": expert,
                "context": context,
                "tensor": tensor,
            }


def inside(config: Config, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What may change within a mesh: microbatches and their schedule, and what layers keep."""
    rows = config.training.global_batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    counts = [n for n in MICROBATCHES if rows % n == 0]
    for remat in POLICIES:
        same = {"training.remat": remat}
        if sizes["pipeline"] == 1:
            yield from ({**same, "training.accumulation_steps": n} for n in counts)
            continue
        whole = {**same, "training.accumulation_steps": 1}
        for count in counts:
            if count < sizes["pipeline"]:
                continue
            yield {**whole, **schedule("1f1b", count, 1)}
            layers = config.model.num_layers // sizes["pipeline"]
            for chunks in (2, 4):
                if layers % chunks == 0 and count % sizes["pipeline"] == 0:
                    yield {**whole, **schedule("interleaved_1f1b", count, chunks)}


def schedule(name: str, microbatches: int, chunks: int) -> dict[str, Any]:
    """Of a pipeline."""
    return {
        "pipeline.schedule": name,
        "pipeline.microbatches": microbatches,
        "pipeline.virtual_stages": chunks,
    }


def changed(config: Config, values: dict[str, Any]) -> Candidate:
    """The config with other values, by dotted key, and the words for those that differ.

    A mesh axis of -1 stays so: it takes what the others leave.
    """
    words: list[str] = []
    rooms: dict[str, Any] = {}
    for key, value in values.items():
        room, name = key.split(".")
        now = rooms.get(room, getattr(config, room))
        before = getattr(getattr(config, room), name)
        if room == "mesh" and before == -1:
            continue
        if before != value:
            words.append(f"{key}={value}")
        rooms[room] = replace(now, **{name: value})
    return Candidate(replace(config, **rooms), tuple(words))
