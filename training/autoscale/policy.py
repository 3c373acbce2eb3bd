"""Devices in, mesh and accumulation out: how a run goes on with fewer or more devices at the same batch.

One pure function, `decide`: no device, file or clock is looked at, so a person may ask it beforehand
(`scripts/autoscale.py`). It is asked at a start only; between starts nothing moves.

What it keeps, in this order:

* the global batch, and every axis but data, replica and fsdp: what those hold is part of how the model fits;
* rows of a microbatch on a device, at most: so activations need no more memory than on all devices, and
  accumulation makes up for the devices that are missing;
* mesh.fsdp, for as long as the devices reach: below it each device holds more of parameters and moments;
* as many of the devices as divide the batch; the others stay idle, and it is said how many.

Meshes are tried in one fixed order of preference and the first legal one that the devices can hold is taken:
hence more devices never mean fewer of them used, and idle ones may be taken away without changing anything.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from common.text import counted
from parallel.config import MESH_AXES, AutoscaleConfig, divisors

ELASTIC = ("replica", "data", "fsdp")  # axes that may shrink and grow
SHOWN = 8  # numbers of devices in a message

# (sizes by axis, turns) -> why such a mesh cannot run the config, or None.
MeshRefusal = Callable[[Mapping[str, int], int], str | None]


class TooFew(Exception):
    """The devices are fewer than the policy allows: a start that has to wait for more of them."""


@dataclass(frozen=True)
class Asked:
    """What the command line says, the same at every start.

    sizes: by mesh axis, one of them may be -1; batch_axes: those that split rows; rows: of the global batch;
    turns: parts that follow each other in a step, `turns_key` being what says how many; fixed: axes of
    ELASTIC that may not move, with the reason; steps: of an axis that crosses slices, its size in one, of
    which only multiples can be had.
    """

    sizes: Mapping[str, int]
    batch_axes: tuple[str, ...]
    rows: int
    turns: int
    turns_key: str
    policy: AutoscaleConfig
    fixed: Mapping[str, str]
    steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def free(self) -> str | None:
        """The axis that takes what is left."""
        return next((axis for axis in MESH_AXES if self.sizes[axis] == -1), None)

    @cached_property
    def full(self) -> dict[str, int] | None:
        """The mesh on all devices, where it is known how many those are."""
        sizes, most = dict(self.sizes), self.policy.max_devices
        if self.free is not None:
            if most is None:
                return None
            sizes[self.free] = max(1, most // math.prod(n for n in sizes.values() if n != -1))
        return sizes

    @cached_property
    def rows_each(self) -> int:
        """Rows of one microbatch on one device, at most. ValueError where nothing says so."""
        if self.policy.rows_per_device is not None:
            return self.policy.rows_per_device
        if self.full is None:
            raise ValueError(
                f"autoscale needs to know how much one device holds, and mesh.{self.free}=-1 does not say; "
                f"give autoscale.rows_per_device (rows of a microbatch), autoscale.max_devices, or mesh."
                f"{self.free}=N as it is on all devices"
            )
        return math.ceil(self.rows / (self.ways(self.full) * self.turns))

    @property
    def most(self) -> int | None:
        """Devices beyond which the run does not grow."""
        if self.policy.max_devices is not None:
            return self.policy.max_devices
        return math.prod(self.full.values()) if self.full is not None else None

    def ways(self, sizes: Mapping[str, int]) -> int:
        """Into how many parts the rows are split."""
        return math.prod(sizes[axis] for axis in self.batch_axes)


@dataclass(frozen=True)
class MeshDecision:
    """A mesh for the devices at hand, JSON-able. `lines` explain it, the first in one sentence."""

    sizes: dict[str, int]
    turns: int
    turns_key: str
    used: int
    available: int
    rows_each: int  # rows of a microbatch on a device
    pending: int | None  # jobs that waited, where the policy asks
    lines: tuple[str, ...]


def decide(
    asked: Asked, available: int, legal: MeshRefusal, *, pending: int | None = None, last: int | None = None
) -> MeshDecision:
    """The mesh for `available` devices.

    legal: the rules that every config goes through; pending: jobs that wait (policy queue); last: devices
    that the run's last start used, None for a new run. Raises ValueError where no mesh is legal, with the
    numbers of devices that are, and TooFew where only fewer than `min_devices` can be used.
    """
    _check(asked)
    wanted, why = target(asked.policy, asked.most or available, pending=pending, last=last)
    search = _Search(asked, legal)
    limit = min(available, wanted)
    found = search.best(limit)
    # A number between legal ones is rounded up where the queue asks to shrink: never below the minimum.
    while (found is None or found[0] < asked.policy.min_devices) and limit < available:
        limit += 1
        found = search.best(limit)
    if found is None:
        raise ValueError(_nothing(asked, available, search))
    used, sizes, turns = found
    if used < asked.policy.min_devices:
        raise TooFew(
            f"autoscale.min_devices={asked.policy.min_devices}, but of {available} devices {used} can be "
            "used; start it when there are more, or lower autoscale.min_devices"
        )
    rows = asked.rows // (asked.ways(sizes) * turns)
    lines = _explain(asked, search, available, limit, used, sizes, turns, why)
    return MeshDecision(sizes, turns, asked.turns_key, used, available, rows, pending, lines)


def target(
    policy: AutoscaleConfig, most: int, *, pending: int | None, last: int | None
) -> tuple[int, str | None]:
    """Devices that the policy wants, and why; `most`: of the full size.

    Between `grow_at` and `shrink_at` a run keeps what it has: a queue that hovers there moves nothing.
    """
    if policy.policy == "nodes":
        return most, None
    assert pending is not None, "the queue policy needs to be told the queue's depth"
    if pending >= policy.shrink_at:
        return (
            policy.min_devices,
            f"{pending} waiting, {policy.shrink_at} or more: down to autoscale.min_devices",
        )
    if pending <= policy.grow_at:
        return most, f"{pending} waiting, {policy.grow_at} or fewer: up to {most} devices"
    between = f"{pending} waiting, between {policy.grow_at} and {policy.shrink_at}"
    if last is None:
        return most, f"{between}: a new run begins with {most} devices"
    return min(last, most), f"{between}: as at the last start, {last} devices"


def numbers(asked: Asked, most: int, legal: MeshRefusal) -> list[int]:
    """Every number of devices, up to `most` and the full size, of which none would stay idle."""
    search, most = _Search(asked, legal), min(most, asked.most or most)
    counts = sorted({used for _, used, _ in search.ordered(most)})
    return [count for count in counts if (found := search.best(count)) and found[0] == count]


class _Search:
    """Meshes in their order of preference; what is legal is asked once each."""

    def __init__(self, asked: Asked, legal: MeshRefusal):
        self.asked, self.legal = asked, legal
        self.turns: dict[tuple[int, ...], int | None] = {}
        self.reason: str | None = None  # why the first that was tried is none

    def best(self, limit: int) -> tuple[int, dict[str, int], int] | None:
        """(devices, sizes, turns) of the first legal mesh of at most `limit` devices."""
        for _, used, sizes in self.ordered(limit):
            if (turns := self.turns_of(sizes)) is not None:
                return used, sizes, turns
        return None

    def ordered(self, limit: int) -> list[tuple[tuple[float, ...], int, dict[str, int]]]:
        """All meshes of up to `limit` devices, best first."""
        return sorted(((self.order(s), math.prod(s.values()), s) for s in self.meshes(limit)), key=_first)

    def meshes(self, limit: int) -> Iterator[dict[str, int]]:
        """Every choice of the elastic axes' sizes that `limit` devices can hold."""
        rest = math.prod(size for axis, size in self.asked.sizes.items() if axis not in ELASTIC)
        options = [self.options(axis, limit // rest) for axis in ELASTIC]
        for chosen in itertools.product(*options):
            if rest * math.prod(chosen) <= limit:
                yield {**self.asked.sizes, **dict(zip(ELASTIC, chosen, strict=True))}

    def options(self, axis: str, limit: int) -> list[int]:
        asked = self.asked
        if axis in asked.fixed:
            return [asked.sizes[axis]]
        # Beyond the size that was asked for only what takes the rest grows; mesh.data, where all have a size.
        grows = axis == asked.free or (axis == "data" and asked.free is None)
        most = limit if grows else min(limit, asked.sizes[axis])
        sizes = divisors(asked.rows) if axis in asked.batch_axes else range(1, most + 1)
        return [size for size in sizes if size <= most and size % asked.steps.get(axis, 1) == 0]

    def order(self, sizes: Mapping[str, int]) -> tuple[float, ...]:
        """Small is good: fsdp kept, many devices, near to the full mesh; the rest makes it one order."""
        full = self.asked.full or {}
        kept = -min(sizes["fsdp"], full["fsdp"]) if full else 0
        known = full or {axis: size for axis, size in self.asked.sizes.items() if size != -1}
        away = sum(abs(math.log2(sizes[axis] / size)) for axis, size in known.items())
        return (kept, -math.prod(sizes.values()), round(away, 9), *(-sizes[axis] for axis in MESH_AXES))

    def turns_of(self, sizes: dict[str, int]) -> int | None:
        """The fewest turns whose microbatches fit; None where no number of them is legal."""
        key = tuple(sizes.values())
        if key not in self.turns:
            self.turns[key] = self._turns_of(sizes)
        return self.turns[key]

    def _turns_of(self, sizes: dict[str, int]) -> int | None:
        share, left = divmod(self.asked.rows, self.asked.ways(sizes))
        if left:
            return None
        for turns in divisors(share):
            if share // turns > self.asked.rows_each:
                continue
            reason = self.legal(sizes, turns)
            if reason is None:
                return turns
            self.reason = self.reason or reason
        return None


def _first(entry: tuple[tuple[float, ...], int, dict[str, int]]) -> tuple[float, ...]:
    return entry[0]


def _check(asked: Asked) -> None:
    free = asked.free
    if free is not None and (free not in ELASTIC or free in asked.fixed):
        reason = asked.fixed.get(free, "it decides what a device holds")
        raise ValueError(
            f"mesh.{free}=-1 under autoscale, which does not change mesh.{free}: {reason}; "
            f"give it a size, and -1 to mesh.data or mesh.fsdp"
        )
    most = asked.most
    if most is not None and most < asked.policy.min_devices:
        raise ValueError(
            f"autoscale.min_devices={asked.policy.min_devices} is more than the {most} devices of the full "
            f"size; use {most} or fewer, or raise autoscale.max_devices"
        )


def _nothing(asked: Asked, available: int, search: _Search) -> str:
    most = max(asked.most or 0, 4 * available, 64)
    counts = numbers(asked, most, search.legal)
    stay = " * ".join(
        f"mesh.{axis}={size}"
        for axis, size in asked.sizes.items()
        if size > 1 and (axis not in ELASTIC or axis in asked.fixed)
    )
    what = f"{stay} stays as it is, and no mesh with it" if stay else "no mesh"
    reason = f" ({search.reason})" if search.reason else ""
    legal = f"start on {_listed(counts)} devices" if counts else "change the batch or the mesh"
    return f"autoscale: {what} fits {counted(available, 'device')}{reason}; {legal}"


def _explain(
    asked: Asked,
    search: _Search,
    available: int,
    limit: int,
    used: int,
    sizes: Mapping[str, int],
    turns: int,
    why: str | None,
) -> tuple[str, ...]:
    full = asked.full or {axis: size for axis, size in asked.sizes.items() if size != -1}
    moved = [f"mesh.{axis} {size} to {sizes[axis]}" for axis, size in full.items() if sizes[axis] != size]
    if asked.free is not None and asked.full is None:
        moved.append(f"mesh.{asked.free} is {sizes[asked.free]}")
    if turns != asked.turns:
        moved.append(f"{asked.turns_key} {asked.turns} to {turns}")
    whole = f"{', '.join(moved)}" if moved else "mesh and accumulation as they were asked for"
    lines = [f"{used} of {available} devices: {whole}"]
    if why is not None:
        lines.append(why)
    rows = asked.rows // (asked.ways(sizes) * turns)
    lines.append(
        f"the batch stays {asked.rows} rows: {asked.ways(sizes)} ways x {turns} turns x {rows} rows "
        f"(at most {asked.rows_each} a microbatch on a device)"
    )
    if used < available:
        lines.append(_idle(asked, search, available, limit, used))
    if sizes["fsdp"] < full.get("fsdp", 0):
        more = full["fsdp"] / sizes["fsdp"]
        lines.append(
            f"mesh.fsdp {full['fsdp']} to {sizes['fsdp']}: a device holds {more:.3g} times as much of "
            "parameters, gradients and moments"
        )
    return tuple(lines)


def _idle(asked: Asked, search: _Search, available: int, limit: int, used: int) -> str:
    left = available - used
    idle = f"{counted(left, 'device')} stay{'' if left > 1 else 's'} idle"
    if limit < available and used == limit:
        return f"{idle}: {limit} is what the policy allows"
    following = (n for n in numbers(asked, max(4 * available, asked.most or 0), search.legal) if n > used)
    above = next(following, None)
    return f"{idle}: " + (f"the next number that fits is {above}" if above else "no larger number fits")


def _listed(counts: list[int]) -> str:
    shown = ", ".join(map(str, counts[:SHOWN]))
    return shown + (", ..." if len(counts) > SHOWN else "")
