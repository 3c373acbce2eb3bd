"""Reading what a compiler made of a step: which collectives, over which mesh axes, how often, and how much.

`read_hlo(compiled.as_text(), axes)` walks the program from its entry, through loops (times their trip
counts), calls, fusions and branches. Text and not an API, because text is what all backends have in common.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}  # others end in their width
ALIASES = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant")
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """What the group of a regular expression finds in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """The JAX operation it comes from, as far as it is known."""
        return self.attribute(r'op_name="([^"]*)"') or ""


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
    flops: int = 0  # of matrix products, two a multiply-add; attention kernels are not in it
    custom_calls: Counter[str] = field(default_factory=Counter)  # executions by target
    kernels: Counter[str] = field(default_factory=Counter)  # executions of Pallas kernels on TPU by name
    buffers: list[Buffer] = field(default_factory=list)  # largest first
    uncounted_loops: list[str] = field(default_factory=list)  # trip count unknown: taken as 1

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

    def in_branches(self) -> list[Collective]:
        """Collectives that only some devices may reach: those inside conditionals."""
        return [c for c in self.collectives if c.branch is not None]

    def table(self) -> str:
        """`totals`, a line each."""
        rows = [
            f"{kind:<22}{'+'.join(axes):<28}{times:>8,} times {size / 2**20:>14,.1f} MiB"
            for (kind, axes), (times, size) in self.totals().items()
        ]
        return "\n".join(rows)


def read_hlo(text: str, axes: Mapping[str, int], *, buffers: int = 20) -> Reading:
    """Read an optimized HLO module: collectives, floating-point operations, custom calls, largest results.

    axes: mesh axes and sizes in order (`layout.mesh.shape`), by which devices are numbered. Conditionals are
    counted as if every branch ran. Raises ValueError where the text holds no entry computation.
    """
    computations, entry = parse_module(text)
    return _Reader(computations, dict(axes)).read(entry, buffers)


def parse_module(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by computation and name, and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif instruction := parse_instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; pass compiled.as_text()")
    return computations, entry


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation; None for any other."""
    start = re.match(r"\s+(?:ROOT )?%?([^\s=]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([^\s,()]+)", rest[opening:closing]))
    return Instruction(start[1], rest[:end], rest[end:opening].strip(), operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:100]}")


def shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and sizes of every array in a type, tuples flattened."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", type_text)
    return [(kind, tuple(int(n.strip("<=")) for n in sizes.split(",") if n)) for kind, sizes in found]


def type_bytes(type_text: str) -> int:
    """Bytes of all arrays in a type."""
    bits = (
        math.prod(sizes) * BITS.get(kind, int((re.findall(r"\d+", kind) or ["0"])[0]))
        for kind, sizes in shapes(type_text)
    )
    return sum(-(-n // 8) for n in bits)


class _Reader:
    """One walk over the call graph."""

    def __init__(self, computations: dict[str, dict[str, Instruction]], axes: dict[str, int]):
        self.computations, self.axes = computations, axes
        self.reading = Reading()

    def read(self, entry: str, buffers: int) -> Reading:
        self.walk(entry, 1, None, materialized=True)
        self.reading.buffers = sorted(self.reading.buffers, key=lambda b: -b.bytes)[:buffers]
        return self.reading

    def walk(self, name: str, times: int, branch: str | None, *, materialized: bool) -> None:
        """Count a computation that runs so many times. materialized: whether its results are buffers."""
        table = self.computations.get(name, {})
        for instruction in table.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                self.reading.collectives.append(self.collective(kind, instruction, table, times, branch))
            self.reading.flops += times * flops(instruction, table)
            if target := instruction.attribute(r'custom_call_target="([^"]*)"'):
                self.reading.custom_calls[target] += times
                if target == "tpu_custom_call":
                    self.reading.kernels[re.sub(r"(\.\d+)+$", "", instruction.name)] += times
            if materialized and instruction.opcode not in ALIASES:
                size = type_bytes(instruction.type)
                self.reading.buffers.append(
                    Buffer(size, instruction.type, instruction.name, instruction.source)
                )
            for callee, repeats in self.callees(instruction):
                inside = instruction.name if instruction.opcode == "conditional" else branch
                whole = materialized and instruction.opcode in ("while", "conditional", "call")
                self.walk(callee, times * repeats, inside, materialized=whole)

    def callees(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, and how often."""
        if instruction.opcode == "while":
            count = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
            if count is None:
                self.reading.uncounted_loops.append(instruction.name)
            for key, more in (("body", 0), ("condition", 1)):
                callee = instruction.attribute(rf"\b{key}=%?([^\s,]+)")
                if callee:
                    yield callee, int(count or 1) + more
        elif instruction.opcode == "conditional":
            listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
            pair = re.findall(r"(?:true|false)_computation=%?([^\s,]+)", instruction.attributes)
            for callee in re.findall(r"[^\s,%]+", listed) if listed else pair:
                yield callee, 1
        elif instruction.opcode in ("call", "call-start"):
            if callee := instruction.attribute(r"to_apply=%?([^\s,]+)"):
                yield callee, 1
        elif callee := instruction.attribute(r"\bcalls=%?([^\s,]+)"):  # fusions and asynchronous calls
            yield callee, 1

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


def flops(instruction: Instruction, table: Mapping[str, Instruction]) -> int:
    """Of a matrix product, in whatever form the backend writes it; 0 for anything else."""
    if instruction.opcode == "dot":
        dims = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        contracted = [int(n) for n in (dims or "").split(",") if n]
    elif (
        "dot_dimension_numbers" in instruction.attributes and "gemm_backend_config" in instruction.attributes
    ):
        contracted = _gemm_contracted(instruction.attributes)
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, table)
    else:
        return 0
    left = shapes(table[instruction.operands[0]].type)[0][1]
    result = shapes(instruction.type)[0][1]
    return 2 * math.prod(result) * math.prod(left[dim] for dim in contracted)


def _gemm_contracted(attributes: str) -> list[int]:
    text = attributes[attributes.index("backend_config=") + len("backend_config=") :]
    config, _ = json.JSONDecoder().raw_decode(text)
    numbers = config["gemm_backend_config"]["dot_dimension_numbers"]
    return [int(n) for n in numbers["lhs_contracting_dimensions"]]


def _convolution_flops(instruction: Instruction, table: Mapping[str, Instruction]) -> int:
    # TPUs write matrix products so: every kernel dim but the output's is contracted.
    labels = instruction.attribute(r"dim_labels=\w+_(\w+)->") or ""
    kernel = shapes(table[instruction.operands[1]].type)[0][1]
    contracted = math.prod(size for label, size in zip(labels, kernel, strict=False) if label != "o")
    return 2 * math.prod(shapes(instruction.type)[0][1]) * contracted


def parse_groups(attributes: str, devices: int) -> Int[np.ndarray, "groups size"]:
    """Devices that exchange with each other, by their place in the mesh, in every way that XLA writes them.

    `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4] {'a'}`, and pairs of source and target, which
    become groups of two. None given, or `{}`: one group of all.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return _lists(pairs[1])
    if mesh := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", attributes
    ):
        return _mesh_groups(mesh[1], mesh[2], mesh[3], devices)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _lists(listed[1])
    return np.arange(devices)[None]


def _lists(text: str) -> Int[np.ndarray, "groups size"]:
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _iota(text: str) -> Int[np.ndarray, " devices"]:
    """`[4,2]T(1,0)`: numbers counted up in that shape, transposed, read in order."""
    shape, order = re.findall(r"[\[(]([\d,]+)[\])]", text) if "T" in text else (text.strip("[]"), None)
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return (numbers.transpose(_integers(order)) if order else numbers).reshape(-1)


def _mesh_groups(
    mesh: str, device_ids: str | None, chosen: str, devices: int
) -> Int[np.ndarray, "groups size"]:
    """Groups along axes of a mesh that XLA made up; `'a':(2)4` is 4 of the axis, under 2 coarser parts."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    ids = _iota(device_ids) if device_ids and "[" in device_ids else None
    if ids is None:
        ids = np.array(_integers(device_ids)) if device_ids else np.arange(devices)
    wanted = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)
    }
    fine: list[int] = []
    inside: list[int] = []  # dims of `fine` along which members of a group lie
    for name, size in sizes.items():
        before, taken = wanted.get(name, (1, 1))
        inside += [len(fine) + 1] if name in wanted else []
        fine += [before, taken, size // (before * taken)]
    outside = [dim for dim in range(len(fine)) if dim not in inside]
    members = math.prod(fine[dim] for dim in inside)
    return ids.reshape(fine).transpose(*outside, *inside).reshape(-1, members)


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def group_axes(groups: Int[np.ndarray, "groups size"], axes: Mapping[str, int]) -> Axes:
    """The mesh axes along which members of any group differ."""
    places = np.stack(np.unravel_index(groups, tuple(axes.values())))
    differ = np.any(places != places[..., :1], axis=(1, 2))
    return tuple(name for name, does in zip(axes, differ, strict=True) if does)
