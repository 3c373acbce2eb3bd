"""Reading what a compiler made of a step: which collectives, over which mesh axes, how often, and how much.

`read_hlo(compiled.as_text(), axes)` walks the program from its entry, through loops (times their trip
counts), calls, fusions and branches. Text and not an API, because text is what all backends have in common.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from common.text import MIB
from planner.hlo.kernel_names import PALLAS, attention_flops, factor_type, product_flops
from planner.hlo.loops import Scope, trip_count
from planner.hlo.text import Instruction, parse_groups, parse_module, type_bytes
from planner.hlo.traffic import moved_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
ALIASES = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant")
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Collective:
    """One collective of the program text.

    axes: mesh axes along which members of a group differ. size: members of a group. bytes: what one group
    member holds of the whole that is exchanged, once (all-gather: the result; others: the operands).
    times: executions a step. branch: the conditional that it stands in.
    """

    kind: str
    axes: Axes
    size: int
    bytes: int
    times: int
    branch: str | None
    name: str
    source: str


@dataclass(frozen=True)
class Buffer:
    """One instruction's result on one device."""

    bytes: int
    type: str
    name: str
    source: str


@dataclass
class Reading:
    """What a compiled program does in one execution on one device; see `read_hlo`."""

    collectives: list[Collective] = field(default_factory=list)
    products: Counter[str] = field(default_factory=Counter)  # FLOPs of products, by type of the first factor
    attention: int = 0  # FLOPs of attention kernels, which `products` has not
    moved_bytes: int = 0  # read from and written to memory: `planner.hlo.traffic`
    custom_calls: Counter[str] = field(default_factory=Counter)  # executions by target
    kernels: Counter[str] = field(default_factory=Counter)  # executions of Pallas kernels on TPU by name
    buffers: list[Buffer] = field(default_factory=list)  # largest first
    uncounted_loops: list[str] = field(default_factory=list)  # the text tells no trip count
    in_uncounted: list[str] = field(default_factory=list)  # JAX operations of these, in the same order

    @property
    def flops(self) -> int:
        """Of matrix products, two a multiply-add; attention kernels are not in it."""
        return sum(self.products.values())

    def totals(self) -> dict[tuple[str, Axes], tuple[int, int]]:
        """(kind, axes) to executions and bytes in all, sorted; groups of one are left out."""
        times: Counter[tuple[str, Axes]] = Counter()
        sizes: Counter[tuple[str, Axes]] = Counter()
        for collective in self.collectives:
            if collective.size > 1:
                key = (collective.kind, collective.axes)
                times[key] += collective.times
                sizes[key] += collective.times * collective.bytes
        return {key: (times[key], sizes[key]) for key in sorted(times)}

    def table(self) -> str:
        """`totals`, a line each."""
        rows = [
            f"{kind:<22}{'+'.join(axes):<28}{times:>8,} times {size / MIB:>14,.1f} MiB"
            for (kind, axes), (times, size) in self.totals().items()
        ]
        return "\n".join(rows)


def read_hlo(
    text: str,
    axes: Mapping[str, int],
    *,
    buffers: int = 20,
    trips: Callable[[Instruction], int | None] = lambda loop: None,
) -> Reading:
    """Read an optimized HLO module: collectives, floating-point operations, custom calls, largest results.

    axes: mesh axes and sizes in order (`layout.mesh.shape`), by which devices are numbered: a program's own
    numbers are places in its mesh, whatever ids the devices there have. trips: of a loop whose own text does
    not tell how often it runs, since that is in the data (blocks of experts); None counts it once.
    Conditionals are counted as if every branch ran. Raises ValueError where the text holds no entry.
    """
    computations, entry = parse_module(text)
    return _Reader(computations, dict(axes), trips).read(entry, buffers)


class _Reader:
    """One walk over the call graph."""

    def __init__(
        self,
        computations: dict[str, dict[str, Instruction]],
        axes: dict[str, int],
        trips: Callable[[Instruction], int | None],
    ):
        self.computations, self.axes, self.trips = computations, axes, trips
        self.reading = Reading()

    def read(self, entry: str, buffers: int) -> Reading:
        self.walk(Scope(entry), 1, None, materialized=True)
        self.reading.buffers = sorted(self.reading.buffers, key=lambda b: -b.bytes)[:buffers]
        return self.reading

    def walk(self, scope: Scope, times: int, branch: str | None, *, materialized: bool) -> None:
        """Count a computation that runs so many times. materialized: whether its results are buffers."""
        table = self.computations.get(scope.name, {})
        for instruction in table.values():
            self.count(instruction, table, times, branch)
            if materialized:
                self.reading.moved_bytes += times * moved_bytes(instruction, table, self.computations)
            if materialized and instruction.opcode not in ALIASES:
                size = type_bytes(instruction.type)
                self.reading.buffers.append(
                    Buffer(size, instruction.type, instruction.name, instruction.source)
                )
            if _scatters(instruction):
                continue
            for callee, repeats in self.callees(instruction, scope):
                inside = instruction.name if instruction.opcode == "conditional" else branch
                whole = materialized and instruction.opcode in ("while", "conditional", "call", "call-start")
                self.walk(callee, times * repeats, inside, materialized=whole)

    def count(
        self, instruction: Instruction, table: Mapping[str, Instruction], times: int, branch: str | None
    ) -> None:
        """Everything but bytes of memory."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            self.reading.collectives.append(self.collective(kind, instruction, table, times, branch))
        elif _scatters(instruction):
            self.scatter(instruction, times, branch)
        if count := product_flops(instruction, table):
            self.reading.products[factor_type(instruction, table)] += times * count
        self.reading.attention += times * attention_flops(instruction, table)
        if target := instruction.attribute(r'custom_call_target="([^"]*)"'):
            self.reading.custom_calls[target] += times
            if target == PALLAS:
                self.reading.kernels[re.sub(r"(\.\d+)+$", "", instruction.name)] += times

    def scatter(self, fusion: Instruction, times: int, branch: str | None) -> None:
        """TPUs' reduce-scatter: an all-reduce and the slice that a device keeps, fused."""
        callee = fusion.attribute(r"\bcalls=%?([^\s,]+)") or ""
        table = self.computations.get(callee, {})
        for inner in table.values():
            if inner.opcode in ("all-reduce", "reduce-scatter"):
                found = self.collective("reduce-scatter", inner, table, times, branch)
                self.reading.collectives.append(found)

    def callees(self, instruction: Instruction, scope: Scope) -> Iterator[tuple[Scope, int]]:
        """Computations that an instruction runs, and how often."""
        arguments = instruction.operands
        if instruction.opcode == "while":
            count = trip_count(instruction, scope, self.computations)
            if count is None:
                self.reading.uncounted_loops.append(instruction.name)
                self.reading.in_uncounted.append(instruction.source)
                count = self.trips(instruction)
            for key, more in (("body", 0), ("condition", 1)):
                callee = instruction.attribute(rf"\b{key}=%?([^\s,]+)")
                if callee:
                    yield Scope(callee, arguments, scope, loop=True), (1 if count is None else count) + more
        elif instruction.opcode == "conditional":
            listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
            pair = re.findall(r"(?:true|false)_computation=%?([^\s,]+)", instruction.attributes)
            branches = re.findall(r"[^\s,%]+", listed) if listed else pair
            for place, callee in enumerate(branches):
                yield Scope(callee, arguments[place + 1 : place + 2], scope), 1
        elif instruction.opcode in ("call", "call-start"):
            if callee := instruction.attribute(r"to_apply=%?([^\s,]+)"):
                yield Scope(callee, arguments, scope), 1
        elif callee := instruction.attribute(r"\bcalls=%?([^\s,]+)"):  # fusions and asynchronous calls
            yield Scope(callee, arguments, scope), 1

    def collective(
        self,
        kind: str,
        instruction: Instruction,
        table: Mapping[str, Instruction],
        times: int,
        branch: str | None,
    ) -> Collective:
        groups = parse_groups(instruction.attributes, math.prod(self.axes.values()))
        size = groups.shape[1]
        operands = sum(type_bytes(table[name].type) for name in instruction.operands if name in table)
        whole = operands * size if kind == "all-gather" else operands
        axes = group_axes(groups, self.axes)
        return Collective(kind, axes, size, whole, times, branch, instruction.name, instruction.source)


def _scatters(instruction: Instruction) -> bool:
    return instruction.opcode == "fusion" and bool(
        re.search(r"\bcalls=%?all-reduce-scatter", instruction.attributes)
    )


def group_axes(groups: Int[np.ndarray, "groups size"], axes: Mapping[str, int]) -> Axes:
    """The mesh axes along which members of any group differ."""
    places = np.stack(np.unravel_index(groups, tuple(axes.values())))
    differ = np.any(places != places[..., :1], axis=(1, 2))
    return tuple(name for name, does in zip(axes, differ, strict=True) if does)
