"""The text of a compiled program, taken apart: computations, instructions, types, groups of devices.

`planner.hlo.program` reads what the program does; here stands only how XLA writes it down.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}  # others end in their width
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`.

    literal: what stands between the parentheses where that names no instruction: a constant's value, a
    parameter's number. root: whether it is its computation's result.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""
    root: bool = False

    def attribute(self, pattern: str) -> str | None:
        """What the group of a regular expression finds in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """The JAX operation it comes from, as far as it is known."""
        return self.attribute(r'op_name="([^"]*)"') or ""


def parse_module(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by computation and name, and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry, last = None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$", line):
            current, last = {}, None
            computations[header[2]] = current
            entry = header[2] if header[1] else entry
        elif instruction := parse_instruction(line):
            current[instruction.name] = last = instruction
        elif last is not None and line.strip() not in ("", "}"):  # attributes may hold line breaks
            last = replace(last, attributes=f"{last.attributes}\n{line}")
            current[last.name] = last
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
    return Instruction(
        name=start[1],
        type=rest[:end],
        opcode=rest[end:opening].strip(),
        operands=operands,
        attributes=rest[closing + 1 :],
        literal="" if operands else rest[opening + 1 : closing],
        root=line.lstrip().startswith("ROOT "),
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:100]}")


def root_of(computation: Mapping[str, Instruction]) -> Instruction | None:
    """Its result; the last instruction where none is marked."""
    marked = [instruction for instruction in computation.values() if instruction.root]
    return marked[0] if marked else next(reversed(list(computation.values())), None)


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
