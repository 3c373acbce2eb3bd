"""Texts that are scored, as the arrays of forward passes: where each lies, and what is read once for several.

W rows of a pass, one a way of the mesh that splits batches, or more where each text has its own; T tokens of
a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from kernels.attention_tree import Paths

TOKENS = 1024  # of a row, or a power of two times as many where a text is longer
QUERIES = 8  # successive positions of a block
KEYS = 64  # positions that a block reads at a time
SCORED = 4096  # tokens of a pass of rows with a text each, where a row is no longer
LEAST_ROW = 32  # tokens of such a row
Texts = Sequence[Sequence[int]]
Batch = dict[str, Any]
Place = tuple[int, int, Int[np.ndarray, "..."]]  # texts of one pass differ in length


@dataclass(frozen=True)
class ScorePass:
    """A batch, and where the texts that it holds lie: their number, their row and their tokens' places."""

    batch: Batch
    texts: list[Place]


@dataclass
class _Tree:
    """A row in which texts that begin alike share what they have in common, as far as it is room for them."""

    size: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[tuple[range, list[int]]] = field(default_factory=list)
    text: Sequence[int] = ()
    path: list[int] = field(default_factory=list)

    def add(self, text: Sequence[int]) -> Int[np.ndarray, " T"] | None:
        """The places of its tokens, or None where it is too much; texts come in the order of dictionaries."""
        shared = _shared(self.text, text)
        firsts = range(shared - shared % QUERIES, len(text), QUERIES) if shared < len(text) else range(0)
        if len(self.tokens) + len(text) - shared > self.size:
            return None
        if len(self.blocks) + len(firsts) > self.size // 4:
            return None
        path = [*self.path[:shared], *range(len(self.tokens), len(self.tokens) + len(text) - shared)]
        self.tokens += text[shared:]
        self.positions += range(shared, len(text))
        self.blocks += [(range(max(at, shared), min(at + QUERIES, len(text))), path) for at in firsts]
        self.text, self.path = text, path
        return np.array(path, np.int32)


def tree_passes(texts: Sequence[tuple[int, ...]], ways: int) -> Iterator[ScorePass]:
    """Passes over all texts, each token of a beginning that several share read once in a pass.

    A text's length alone says how long its rows are.
    """
    sizes: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        sizes.setdefault(_power(len(text), TOKENS), []).append(number)
    for size, numbers in sorted(sizes.items()):
        numbers.sort(key=lambda number: texts[number])
        trees, placed = [_Tree(size)], list[Place]()
        for number in numbers:
            path = trees[-1].add(texts[number])
            if path is None:
                if len(trees) == ways:
                    yield ScorePass(_tree_batch(trees, ways, size), placed)
                    trees, placed = [], []
                trees.append(_Tree(size))
                path = trees[-1].add(texts[number])
                assert path is not None
            placed.append((number, len(trees) - 1, path))
        yield ScorePass(_tree_batch(trees, ways, size), placed)


def _tree_batch(trees: list[_Tree], ways: int, size: int) -> Batch:
    batch = {name: np.zeros((ways, size), np.int32) for name in ("tokens", "positions", "segment_ids")}
    queries = np.full((ways, size // 4, QUERIES), -1, np.int32)
    keys = np.zeros((ways, size // 4, size), np.int32)
    own = np.zeros((ways, size), np.int32)
    for row, tree in enumerate(trees):
        count = len(tree.tokens)
        batch["tokens"][row, :count] = tree.tokens
        batch["positions"][row, :count] = tree.positions
        batch["segment_ids"][row, :count] = 1
        for block, (positions, path) in enumerate(tree.blocks):
            at = np.array(path[positions.start : positions.stop])
            place = np.arange(positions.start, positions.stop) % QUERIES
            queries[row, block, place] = at
            own[row, at] = block * QUERIES + place
            keys[row, block, : positions.stop] = path[: positions.stop]
    return {**batch, "paths": Paths(queries, keys.reshape(ways, size // 4, -1, KEYS), own)}


def row_passes(texts: Sequence[tuple[int, ...]], ways: int, most: int | None) -> Iterator[ScorePass]:
    """Passes in which each text that differs has a row of its own, of a length that its own length decides.

    For mixers that go through a row from its begin. most: places of a row, where positions are a table.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, text in enumerate(texts):
        rows.setdefault(text, []).append(number)
    sizes: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        size = _power(len(row), LEAST_ROW)
        sizes.setdefault(size if most is None else min(size, most), []).append(row)
    for size, group in sorted(sizes.items()):
        step = max(1, SCORED // size)
        step += -step % ways
        for i in range(0, len(group), step):
            part = group[i : i + step]
            placed = [(n, r, np.arange(len(row))) for r, row in enumerate(part) for n in rows[row]]
            yield ScorePass(_row_batch(part, (step, size)), placed)


def _row_batch(texts: Texts, shape: tuple[int, int]) -> Batch:
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["positions"][:] = np.arange(shape[1])
    for row, text in enumerate(texts):
        batch["tokens"][row, : len(text)] = text
        batch["segment_ids"][row, : len(text)] = 1
    return batch


def _power(size: int, least: int) -> int:
    """`least`, or a power of two times as much, for so many tokens."""
    while least < size:
        least *= 2
    return least


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
