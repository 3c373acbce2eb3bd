"""Bytes that a compiled program reads from and writes to the device's memory: an approximation.

Counted is what every launched instruction reads and writes: its operands and its results, once each, times
its executions. What is fused moves nothing of its own. Where only a part of an array is touched, only the
part counts: the slice of a `dynamic-slice`, the update of a `dynamic-update-slice`, which happens in place,
the rows of a gather or scatter, inside fusions too. Tuples, bitcasts and loops themselves move nothing.

Caches make it less than this (an operand may still be in L2), kernels that read an operand several times
make it more (attention, products larger than the cache). On TPUs an array that lies in VMEM, a memory space
of its own in the text, moves nothing.
"""

import re
from collections.abc import Mapping

from planner.hlo.text import Instruction, root_of, type_bytes

Table = Mapping[str, Instruction]
FREE = (
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all"),
    *("while", "conditional", "call", "call-start", "async-start", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "get-dimension-size", "domain"),
)
VIEWS = ("bitcast", "reshape", "convert", "copy", "transpose")
PARTS = ("dynamic-slice", "slice", "gather")
# The first result of these is no array of its own but the operand again.
WORKSPACES = re.compile(r"^[su]8\[\d*\]")


def moved_bytes(instruction: Instruction, table: Table, computations: Mapping[str, Table]) -> int:
    """Of one execution."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if "AllocateBuffer" in instruction.attributes or "ConcatBitcast" in instruction.attributes:
        return 0
    callee = computations.get(instruction.attribute(r"\bcalls=%?([^\s,]+)") or "")
    if opcode == "fusion" and callee:
        reads = (_read(place, name, table, callee) for place, name in enumerate(instruction.operands))
        return sum(reads) + _written(root_of(callee), callee, instruction)
    operands = [_bytes(table[name].type) for name in instruction.operands if name in table]
    if opcode in PARTS:
        return 2 * _bytes(instruction.type)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "scatter":
        return 3 * operands[-1]
    if opcode.endswith("-start") and instruction.type.startswith("(") and opcode != "all-reduce-start":
        return _bytes(instruction.type)  # operands and results both
    return sum(operands) + _result(instruction)


def _bytes(type_text: str) -> int:
    """Of the arrays in the device's main memory."""
    if ":T(" not in type_text:
        return type_bytes(type_text)  # no TPU: there every array has a tiling
    arrays = re.findall(r"\b[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?", type_text)
    return sum(type_bytes(array) for array in arrays if not re.search(r"S\([1-9]\d*\)", array))


def _result(instruction: Instruction) -> int:
    """Of a call that has a workspace among its results, the others."""
    if instruction.opcode != "custom-call" or not instruction.type.startswith("("):
        return _bytes(instruction.type)
    arrays = re.findall(r"\b[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?", instruction.type)
    return sum(_bytes(array) for array in arrays if not WORKSPACES.match(array))


def _read(place: int, operand: str, table: Table, callee: Table) -> int:
    """Of one operand of a fusion."""
    whole = _bytes(table[operand].type) if operand in table else 0
    parameter = next(
        (x for x in callee.values() if x.opcode == "parameter" and x.literal == str(place)), None
    )
    if parameter is None or whole == 0:
        return whole
    return min(whole, _touched(parameter, callee))


def _touched(value: Instruction, callee: Table) -> int:
    """Bytes of a value that its users inside a fusion read."""
    total = 0
    for user in callee.values():
        if value.name not in user.operands:
            continue
        if user.opcode in PARTS and user.operands[0] == value.name:
            total += type_bytes(user.type)
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == value.name:
            pass  # in place: what is not written is not read
        elif user.opcode in VIEWS and not user.root:
            total += _touched(user, callee)
        else:
            return type_bytes(value.type)
    return total


def _written(root: Instruction | None, callee: Table, fusion: Instruction) -> int:
    if root is None:
        return _bytes(fusion.type)
    roots = [callee[name] for name in root.operands] if root.opcode == "tuple" else [root]
    types = re.findall(r"\b[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?", fusion.type)
    total = 0
    for value, type_text in zip(roots, types, strict=False):
        inner = value
        while inner.opcode in VIEWS and inner.operands[0] in callee:
            inner = callee[inner.operands[0]]
        if inner.opcode == "dynamic-update-slice":
            part = type_bytes(callee[inner.operands[1]].type)
        elif inner.opcode == "scatter":
            part = 2 * type_bytes(callee[inner.operands[-1]].type)
        else:
            part = type_bytes(type_text)
        total += min(part, _bytes(type_text))
    return total
