"""Documents to rows. A plan says which pieces of which documents make up each row; filling copies them.

Letters: R rows, P pieces, T row length, B rows in a batch. A piece is a run of inputs of one document: an
address in the token file and a length. Whatever the packing, each (input, target) pair of an epoch is in
exactly one piece.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from data.batch import TEXT
from data.errors import DataError
from data.loading.bin_packing import best_fit, first_fit
from data.loading.fill import Entries, write_rows

WINDOW = 1 << 16  # pieces that best_fit and first_fit consider together
Fit = Callable[[np.ndarray, int], np.ndarray]
FITS: dict[str, Fit] = {"best_fit": best_fit, "first_fit": first_fit}


@dataclass(frozen=True)
class PackingPlan:
    """Pieces in the order of their rows; row r has the pieces [row_offsets[r], row_offsets[r + 1])."""

    starts: Int[np.ndarray, " P"]
    lengths: Int[np.ndarray, " P"]
    row_offsets: Int[np.ndarray, " R1"]

    @property
    def num_rows(self) -> int:
        """How many rows an epoch has."""
        return len(self.row_offsets) - 1


def permutation(n: int, *key: int) -> Int[np.ndarray, " n"]:
    """Return a permutation of range(n) that is a function of the key alone.

    Sorting splitmix64 hashes rather than asking numpy's Generator, whose streams may change between versions.
    """
    state = np.uint64(0)
    for part in key:
        state = _splitmix(np.array([part % 2**64], np.uint64) + state)[0]
    return np.argsort(_splitmix(np.arange(n, dtype=np.uint64) ^ state), kind="stable")


def _splitmix(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood (2014), the mixing step of SplitMix64; arithmetic is modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_plan(packing: str, starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> PackingPlan:
    """Pack documents, given in visiting order, into rows of `seq_len`.

    `concat`, `best_fit`, `first_fit`, or `none`: every piece in a row of its own.
    """
    if packing == "concat":
        return _concat(starts, lengths, seq_len)
    if packing in FITS:
        return _fitted(starts, lengths, seq_len, FITS[packing])
    if packing == "none":
        starts, lengths = _pieces(starts, lengths, seq_len)
        return PackingPlan(starts, lengths, np.arange(len(starts) + 1))
    raise DataError(f"data.packing={packing} is not known; use concat, best_fit, first_fit or none")


def _concat(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> PackingPlan:
    """One long stream, cut every `seq_len`: only the last row is padded."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = begins // seq_len  # the row in which each document begins
    counts = -(-ends // seq_len) - first
    row = _ranges(first, counts)
    cuts = np.maximum(row * seq_len, np.repeat(begins, counts))
    return PackingPlan(
        starts=np.repeat(starts - begins, counts) + cuts,
        lengths=np.diff(cuts, append=ends[-1]),
        row_offsets=np.searchsorted(row, np.arange(row[-1] + 2)),
    )


def _pieces(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut each document into pieces of `seq_len` and a shorter last one."""
    counts = -(-lengths // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = number * seq_len
    return np.repeat(starts, counts) + skipped, np.minimum(np.repeat(lengths, counts) - skipped, seq_len)


def _fitted(starts: np.ndarray, lengths: np.ndarray, seq_len: int, fit: Fit) -> PackingPlan:
    """Fit pieces within windows of the visiting order: only what exceeds a row is cut."""
    starts, lengths = _pieces(starts, lengths, seq_len)
    row_of = np.empty(len(starts), dtype=np.int64)
    num_rows = 0
    for first in range(0, len(starts), WINDOW):
        window = slice(first, first + WINDOW)
        row_of[window] = fit(lengths[window], seq_len) + num_rows
        num_rows = int(row_of[window].max()) + 1
    order = np.argsort(row_of, kind="stable")
    return PackingPlan(starts[order], lengths[order], np.searchsorted(row_of[order], np.arange(num_rows + 1)))


def empty_batch(num_rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """Return a batch of padding: segment 0 and weight 0 everywhere."""
    return {name: np.zeros((num_rows, seq_len), field.dtype) for name, field in TEXT.items()}


def fill(
    batch: dict[str, np.ndarray],
    where: np.ndarray,
    tokens: Entries,
    plan: PackingPlan,
    rows: np.ndarray,
    *,
    weights: Entries | None = None,
) -> None:
    """Copy the plan's `rows` into the batch's rows `where`.

    Those rows are written whole, padding included. Segment ids number a row's pieces from 1; positions
    restart at each piece. `tokens` and `weights` have one entry per address; the loss weight of a target is
    that of its entry, 1 without `weights`.
    """
    piece, counts = pieces_of(plan, rows), plan.row_offsets[rows + 1] - plan.row_offsets[rows]
    starts, lengths = plan.starts[piece], plan.lengths[piece]
    write_rows(batch, where, tokens, (starts, lengths, counts), weights)


def pieces_of(plan: PackingPlan, rows: Int[np.ndarray, " B"]) -> Int[np.ndarray, " Q"]:
    """Return the numbers of the pieces that the plan's `rows` have, one row's behind the other's."""
    first = plan.row_offsets[rows]
    return _ranges(first, plan.row_offsets[rows + 1] - first)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the concatenation of range(start, start + count)."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
