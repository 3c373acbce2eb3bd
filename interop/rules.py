"""One line a parameter, read both ways: their name, ours, and how the dims of theirs become the dims of ours.

A rule never computes: it says which part of a parameter of ours *is* which part of an array of theirs, as a
view. Reading copies from the view, writing copies into it, and a slice of ours is a product of slices of
theirs, so that a device reads what it holds and nothing else.

Letters are dims: D stream, N query heads, K key/value heads, H head size, F feed-forward, V vocabulary, R and
Q latents; C the two of a fused pair and E experts, which theirs keeps in files of their own.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

Index = tuple[int | slice, ...]  # of one layer's parameter of ours
Placement = tuple[Index, np.ndarray]  # where in ours, and the view of theirs that is the same
Get = Callable[[str], np.ndarray]  # an array of theirs by its name
Read = Callable[[tuple[str, ...], int | None], np.ndarray]  # a parameter by its path, one layer of it by row


class Stacked(Protocol):
    """What is read of a model: which layers it has, and the ParamInfo of every parameter, by path."""

    @property
    def segments(self) -> tuple[Any, ...]:
        """(count, period) of each stretch of layers with the same period."""

    @property
    def info(self) -> Any:
        """The tree: "segments" by segment and place, and what no layer has."""


@dataclass(frozen=True)
class Rule:
    """A parameter of ours (its path in a layer) and what of theirs it is made of."""

    ours: str
    theirs: str | tuple[str, ...]  # {n} is the layer, {e} the expert; several names are ours's C, in order
    dims: str  # "(N H) D -> D N H": one group a dim of theirs, one letter a dim of ours
    part: tuple[str, int, int, int] | None = (
        None  # letter of theirs, [first, end) of which is ours, all of it
    )
    # From this column of the last dim on, or between these, theirs has (2i, 2i+1) where ours has halves.
    pairs: int | tuple[int, int] | None = None
    at: int | None = None  # which one of ours's C this is
    cut: tuple[int, int, int] | None = None  # of their first dim, before letters: [first, end), all of it
    into: tuple[str, int, int] | None = None  # a letter of ours, of which these [first, end) are filled
    add: float = 0.0  # ours is theirs plus this

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, as templates."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


class Origin(NamedTuple):
    """An array of theirs and the rule by which it is a part of a parameter."""

    name: str
    rule: Rule
    pair: int  # which one of the rule's names
    expert: int


class Slot(NamedTuple):
    """One layer's part of a parameter (or one that no layer has), and all that it is made of."""

    path: tuple[str, ...]  # in the parameter tree
    row: int | None  # of the stack [count, ...]
    shape: tuple[int, ...]  # of this one
    sources: tuple[Origin, ...]


def slots(model: Stacked, rules: Sequence[Rule]) -> Iterator[Slot]:
    """All that must be filled of a model's parameters, layer by layer. ValueError where no rule says how."""
    by_path: dict[str, list[Rule]] = {}
    for rule in rules:
        by_path.setdefault(rule.ours, []).append(rule)

    def made_of(
        where: str, path: tuple[str, ...], shape: tuple[int, ...], n: int, mixer: str = ""
    ) -> tuple[Origin, ...]:
        # Mixers may call a parameter alike, and mean another array.
        found = by_path.get(f"{mixer}:{where}") or by_path.get(where)
        if not found:
            raise ValueError(f"no rule says what {'/'.join(path)} is called there")
        return tuple(source for rule in found for source in _sources(rule, shape, n))

    first = 0
    for s, segment in enumerate(model.segments):
        for p, spec in enumerate(segment.period):
            for path, info in _leaves(model.info["segments"][str(s)][str(p)]):
                whole, shape = ("segments", str(s), str(p), *path), info.shape[1:]
                for row in range(segment.count):
                    n = first + p + len(segment.period) * row
                    yield Slot(whole, row, shape, made_of("/".join(path), whole, shape, n, spec.mixer))
        first += segment.count * len(segment.period)
    for part, tree in model.info.items():
        if part == "segments":
            continue
        for path, info in _leaves(tree):
            # A layer for a further token is called as if it were one more behind the last.
            depth = int(path[0]) if part == "mtp" else 0
            inner = path[1:] if part == "mtp" else path
            where = "/".join(inner[1:] if inner[0] == "block" else (part, *inner))
            yield Slot(
                (part, *path), None, info.shape, made_of(where, (part, *path), info.shape, first + depth)
            )


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, inner in tree.items():
        yield from _leaves(inner, (*path, name))


def _sources(rule: Rule, shape: tuple[int, ...], n: int) -> Iterator[Origin]:
    left, right = letters(rule)
    # Experts that theirs stacks as we do are a letter on the left, and one array.
    experts = shape[right.index("E")] if "E" in right and "E" not in sum(left, ()) else 1
    for expert in range(experts):
        for pair, name in enumerate(rule.names):
            yield Origin(name.format(n=n, e=expert), rule, pair, expert)


def letters(rule: Rule) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The groups of letters that are dims of theirs, and the letters of ours."""
    left, right = rule.dims.split("->")
    groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", left))
    return groups, tuple(right.split())


def their_shape(source: Origin, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the whole array of theirs must have, for a parameter of ours of this shape."""
    groups, _ = letters(source.rule)
    sizes = _sizes(source.rule, shape)
    found = [math.prod(_size(letter, sizes) for letter in group) for group in groups]
    if source.rule.cut is not None:
        found[0] = source.rule.cut[2]
    return tuple(found)


def _sizes(rule: Rule, shape: tuple[int, ...]) -> dict[str, int]:
    _, right = letters(rule)
    assert len(right) == len(shape), (rule, shape)
    sizes = dict(zip(right, shape, strict=True))
    if rule.into is not None:
        sizes[rule.into[0]] = rule.into[2] - rule.into[1]
    return sizes | ({rule.part[0]: rule.part[3]} if rule.part else {})


def _size(letter: str, sizes: dict[str, int]) -> int:
    return int(letter) if letter.isdecimal() else sizes[letter]


def placements(source: Origin, theirs: np.ndarray, shape: tuple[int, ...]) -> Iterator[Placement]:
    """Where in a parameter of ours of this shape which views of the array lie.

    Raises ValueError where the array has another shape than the rule says.
    """
    rule = source.rule
    groups, right = letters(rule)
    wanted = their_shape(source, shape)
    if theirs.shape != wanted:
        raise ValueError(f"{source.name} is {list(theirs.shape)} there and must be {list(wanted)}")
    sizes, left = _sizes(rule, shape), [letter for group in groups for letter in group]
    if rule.cut is not None:
        theirs = theirs[rule.cut[0] : rule.cut[1]]
    view = theirs.reshape([_size(letter, sizes) for letter in left])
    assert np.shares_memory(view, theirs) or not view.size, rule  # or what is written would be lost
    if rule.part is not None:
        letter, first, end, _ = rule.part
        view = view[(slice(None),) * left.index(letter) + (slice(first, end),)]
    # A letter of theirs that is none of ours, or of which ours is told by `at`, is one thick by now.
    alone = [letter for letter in left if letter not in right or (letter == "C" and rule.at is not None)]
    view = view.squeeze(tuple(left.index(letter) for letter in alone))
    left = [letter for letter in left if letter not in alone]
    view = view.transpose([left.index(letter) for letter in right if letter in left])
    stacked = {"C": source.pair if rule.at is None else rule.at, "E": source.expert}
    filled = {rule.into[0]: slice(*rule.into[1:])} if rule.into else {}
    region: Index = tuple(
        filled.get(d, slice(0, n)) if d in left else stacked[d] for d, n in zip(right, shape, strict=True)
    )
    if rule.pairs is None:
        yield region, view
        return
    begin, end = rule.pairs if isinstance(rule.pairs, tuple) else (rule.pairs, shape[-1])
    middle = begin + (end - begin) // 2
    if begin:
        yield (*region[:-1], slice(0, begin)), view[..., :begin]
    yield (*region[:-1], slice(begin, middle)), view[..., begin:end:2]
    yield (*region[:-1], slice(middle, end)), view[..., begin + 1 : end : 2]
    if end < shape[-1]:
        yield (*region[:-1], slice(end, shape[-1])), view[..., end:]


def read(
    slot: Slot, get: Get, wanted: tuple[slice, ...] | None = None, dtype: Any = np.float32
) -> np.ndarray:
    """A slice of a parameter, [wanted]; of their arrays only what it is made of is touched."""
    wanted = wanted or tuple(slice(0, n) for n in slot.shape)
    out = np.empty([part.stop - part.start for part in wanted], dtype)
    filled = 0
    for source in slot.sources:
        for region, view in placements(source, get(source.name), slot.shape):
            if (met := _meet(region, wanted)) is not None:
                here, there = met
                part = view[there].astype(dtype)
                out[here] = part + dtype(source.rule.add) if source.rule.add else part
                filled += part.size
    assert filled == out.size, (slot.path, filled, out.size)  # else the rules leave a hole, or overlap
    return out


def _meet(region: Index, wanted: tuple[slice, ...]) -> tuple[Index, tuple[slice, ...]] | None:
    """Where a region lies in a wanted slice, and which part of it does; None where they do not meet."""
    here: list[int | slice] = []
    there: list[slice] = []
    for place, part in zip(region, wanted, strict=True):
        if isinstance(place, int):
            if not part.start <= place < part.stop:
                return None
            here.append(place - part.start)
            continue
        low, high = max(place.start, part.start), min(place.stop, part.stop)
        if low >= high:
            return None
        here.append(slice(low - part.start, high - part.start))
        there.append(slice(low - place.start, high - place.start))
    return tuple(here), tuple(there)


def write(slot: Slot, ours: np.ndarray, buffer: Get) -> None:
    """Copy a parameter of ours into the arrays of theirs that `buffer` gives by name, to be written to."""
    for source in slot.sources:
        for region, view in placements(source, buffer(source.name), slot.shape):
            part = ours[region]
            view[...] = part - part.dtype.type(source.rule.add) if source.rule.add else part


def arrays(
    found: list[Slot], read: Read, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their arrays as they become whole, layer by layer: no more than one layer's lie in memory.

    Several parameters of ours may share an array of theirs (queries, keys and values of GPT-2).
    """
    left: dict[str, int] = {}
    for slot in found:
        for name in {source.name for source in slot.sources}:
            left[name] = left.get(name, 0) + 1
    open_arrays: dict[str, np.ndarray] = {}
    for slot in _by_layer(found):
        ours = read(slot.path, slot.row)

        def buffer(name: str, kind: Any = ours.dtype) -> np.ndarray:
            return open_arrays.setdefault(name, np.zeros(shapes[name], kind))

        write(slot, ours, buffer)
        for name in {source.name for source in slot.sources}:
            left[name] -= 1
            if not left[name]:
                yield name, open_arrays.pop(name)


def _by_layer(found: list[Slot]) -> list[Slot]:
    """Slots in an order in which those of one array of theirs stand together: by segment, row and place."""
    return sorted(found, key=lambda slot: (slot.path[:2], slot.row or 0, slot.path[2:3]))
