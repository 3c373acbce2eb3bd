"""How often a loop runs, from the loop itself.

XLA for GPUs writes `known_trip_count` beside a loop, libtpu does not. But the loops of `jax.lax.scan` and
`fori_loop` all count: one element of their state begins at a constant, grows by a constant and is compared
with a constant. These three are looked for, through copies, fusions and the loops around.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from planner.hlo.text import Instruction, root_of

Computations = Mapping[str, Mapping[str, Instruction]]
THROUGH = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")
FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclass(frozen=True)
class Scope:
    """A computation as it is run: what its parameters are, and where these stand.

    loop: its one parameter is a loop's state, begun with the argument. own: the loop is the one that is
    looked at, whose state is not to be replaced by what it begins with.
    """

    name: str
    arguments: tuple[str, ...] = ()
    caller: "Scope | None" = None
    loop: bool = False
    own: bool = False


@dataclass(frozen=True)
class Value:
    """A number, added to an element of the loop's state where `element` is given."""

    number: int
    element: int | None = None


def trip_count(loop: Instruction, scope: Scope, computations: Computations) -> int | None:
    """Iterations of a `while` that stands in this scope; None where its text does not tell."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (loop.attribute(rf"\b{key}=%?([^\s,]+)") or "" for key in ("condition", "body"))
    inside = Scope(condition, loop.operands, scope, loop=True, own=True)
    found = _comparison(inside, computations)
    if found is None:
        return None
    place, where = found
    direction = place.attribute(r"direction=(\w+)") or ""
    left, right = (evaluate(name, where, computations) for name in place.operands)
    if left is None or right is None:
        return None
    if left.element is None:
        left, right, direction = right, left, FLIPPED.get(direction, "")
    limit = _begun(right, loop, body, scope, computations)
    if left.element is None or limit is None:
        return None
    step = _next(left.element, body, computations)
    start = evaluate(loop.operands[0], scope, computations, left.element)
    if start is None or start.element is not None or step is None or step.element != left.element:
        return None
    return _count(start.number + left.number, step.number, limit, direction)


def _count(start: int, step: int, limit: int, direction: str) -> int | None:
    """How often `start`, `start + step`, … stand in this relation to the limit, from the first on."""
    if direction in ("LE", "GE"):
        limit, direction = (limit + 1, "LT") if direction == "LE" else (limit - 1, "GT")
    rising = {"LT": step > 0, "GT": step < 0, "NE": step != 0 and (limit - start) % step == 0}
    if not rising.get(direction, False) or (direction == "NE" and (limit - start) // step < 0):
        return None
    return max(0, math.ceil((limit - start) / step))


def _comparison(scope: Scope, computations: Computations) -> tuple[Instruction, Scope] | None:
    """The comparison that a computation comes down to, and the scope that it stands in."""
    root = root_of(computations.get(scope.name, {}))
    while root is not None and root.opcode in THROUGH:
        root = computations[scope.name].get(root.operands[0])
    if root is None or root.opcode == "compare":
        return (root, scope) if root is not None else None
    callee = root.attribute(r"\b(?:calls|to_apply)=%?([^\s,]+)")
    if callee is None or root.opcode not in ("fusion", "call"):
        return None
    return _comparison(Scope(callee, root.operands, scope), computations)


def _begun(
    value: Value, loop: Instruction, body: str, scope: Scope, computations: Computations
) -> int | None:
    """A number that does not change while the loop runs."""
    if value.element is None:
        return value.number
    if _next(value.element, body, computations) != Value(0, value.element):
        return None
    first = evaluate(loop.operands[0], scope, computations, value.element)
    return None if first is None or first.element is not None else first.number + value.number


def _next(element: int, body: str, computations: Computations) -> Value | None:
    """What one run of the body makes of an element of the state."""
    root = root_of(computations.get(body, {}))
    if root is None:
        return None
    return evaluate(root.name, Scope(body, loop=True, own=True), computations, element)


def evaluate(name: str, scope: Scope, computations: Computations, element: int | None = None) -> Value | None:
    """The whole number that an instruction gives, or element of its tuple; None for anything else."""
    instruction = computations.get(scope.name, {}).get(name)
    if instruction is None:
        return None
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        return Value(int(instruction.literal)) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if opcode == "get-tuple-element":
        return evaluate(operands[0], scope, computations, int(instruction.attribute(r"index=(\d+)") or 0))
    if opcode == "tuple" and element is not None:
        return evaluate(operands[element], scope, computations)
    if opcode in THROUGH:
        return evaluate(operands[0], scope, computations, element)
    if opcode == "parameter":
        return _parameter(instruction, scope, computations, element)
    if opcode == "while" and element is not None:
        body = instruction.attribute(r"\bbody=%?([^\s,]+)") or ""
        same = _next(element, body, computations) == Value(0, element)
        return evaluate(operands[0], scope, computations, element) if same else None
    if opcode in ("fusion", "call"):
        callee = instruction.attribute(r"\b(?:calls|to_apply)=%?([^\s,]+)") or ""
        root = root_of(computations.get(callee, {}))
        inside = Scope(callee, operands, scope)
        return evaluate(root.name, inside, computations, element) if root is not None else None
    if opcode in ("add", "subtract"):
        left, right = (evaluate(operand, scope, computations) for operand in operands)
        return _sum(left, right, opcode == "subtract")
    return None


def _parameter(
    instruction: Instruction, scope: Scope, computations: Computations, element: int | None
) -> Value | None:
    if scope.own:
        return Value(0, element) if element is not None else None
    if scope.caller is None:
        return None
    if scope.loop:
        same = element is not None and _next(element, scope.name, computations) == Value(0, element)
        return evaluate(scope.arguments[0], scope.caller, computations, element) if same else None
    number = int(instruction.literal or 0)
    return evaluate(scope.arguments[number], scope.caller, computations, element)


def _sum(left: Value | None, right: Value | None, minus: bool) -> Value | None:
    if left is None or right is None or (right.element is not None and (minus or left.element is not None)):
        return None
    number = left.number - right.number if minus else left.number + right.number
    return Value(number, right.element if left.element is None else left.element)
