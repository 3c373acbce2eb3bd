"""Copying: from a token file into the rows of a batch, given which pieces each row has.

Two ways, the same values. By slices: a few calls of numpy a piece, each a copy at the speed of memory: best
where pieces are long. By addresses: a few passes over every token, whatever the pieces: best where they are
short, and the only way where the tokens are no array in memory.

Letters: R rows, P their pieces in order, T row length.
"""

from typing import Protocol, runtime_checkable

import numpy as np

LONG = 320  # tokens: from this mean length of a piece on, slices are faster
TOGETHER = 1 << 15  # tokens addressed at once: what is worked on stays in a core's cache


@runtime_checkable
class Entries(Protocol):
    """One value per address of a token file: an array, or what reads several files as one."""

    def __getitem__(self, addresses: np.ndarray, /) -> np.ndarray:
        """Return the values at these addresses."""


def write_rows(
    batch: dict[str, np.ndarray],
    where: np.ndarray,
    tokens: Entries,
    pieces: tuple[np.ndarray, np.ndarray, np.ndarray],
    weights: Entries | None = None,
) -> None:
    """Write rows `where` [R] of a batch of [B, T] arrays whole, padding included, whatever they held.

    pieces: (first address [P], length [P], pieces of each row [R]); those of a row are at most T tokens.
    weights: the loss weight of a target, at its address; None: 1.
    """
    starts, lengths, counts = pieces
    arrays = isinstance(tokens, np.ndarray) and (weights is None or isinstance(weights, np.ndarray))
    if arrays and lengths.sum() >= LONG * len(lengths):
        # The plain view: slicing a memmap costs ten times as much as slicing an array.
        _by_slices(batch, where, np.asarray(tokens), pieces, None if weights is None else np.asarray(weights))
        return
    together = max(1, TOGETHER // batch["tokens"].shape[1])
    ends = np.cumsum(counts)
    for first in range(0, len(where), together):
        rows = slice(first, first + together)
        here = slice(int(ends[first] - counts[first]), int(ends[rows][-1]))
        _by_addresses(batch, where[rows], tokens, (starts[here], lengths[here], counts[rows]), weights)


def _by_slices(
    batch: dict, where: np.ndarray, tokens: np.ndarray, pieces: tuple, weights: np.ndarray | None
) -> None:
    count_up = np.arange(batch["tokens"].shape[1], dtype=np.int32)
    spans = zip(pieces[0].tolist(), pieces[1].tolist(), strict=True)
    for row, count in zip(where.tolist(), pieces[2].tolist(), strict=True):
        inputs, targets, positions = (batch[key][row] for key in ("tokens", "targets", "positions"))
        segments, loss = batch["segment_ids"][row], batch["loss_weights"][row]
        at = 0
        for number in range(1, count + 1):
            start, length = next(spans)
            there = slice(at, at + length)
            inputs[there] = tokens[start : start + length]
            targets[there] = tokens[start + 1 : start + length + 1]
            positions[there] = count_up[:length]
            segments[there] = number
            if weights is not None:
                loss[there] = weights[start + 1 : start + length + 1]
            at += length
        if weights is None:
            loss[:at] = 1.0
        for values in (inputs, targets, positions, segments, loss):
            values[at:] = 0


def _by_addresses(
    batch: dict, where: np.ndarray, tokens: Entries, pieces: tuple, weights: Entries | None
) -> None:
    """Padding is one more piece of each row, number 0, and then set to zero."""
    starts, lengths, counts = pieces
    seq_len = batch["tokens"].shape[1]
    ends = np.cumsum(counts)
    used = np.diff(np.cumsum(lengths)[ends - 1], prepend=0)
    starts, lengths = np.insert(starts, ends, 0), np.insert(lengths, ends, seq_len - used)
    numbers = np.arange(1, len(lengths) + 1) - np.repeat(ends - counts + np.arange(len(counts)), counts + 1)
    numbers[ends + np.arange(len(counts))] = 0
    begins = np.cumsum(lengths) - lengths
    index = np.arange(len(where) * seq_len)
    address = (index + np.repeat(starts - begins, lengths)).reshape(-1, seq_len)
    position = (index - np.repeat(begins, lengths)).reshape(-1, seq_len)
    padded = [(row, slice(used[row], None)) for row in np.flatnonzero(used < seq_len).tolist()]
    for row, rest in padded:
        address[row, rest] = 0  # any that exists
    values = {
        "tokens": tokens[address.reshape(-1)],
        "positions": position,
        "segment_ids": np.repeat(numbers.astype(np.int32), lengths),
    }
    address += 1
    values["targets"] = tokens[address.reshape(-1)]
    values["loss_weights"] = np.broadcast_to(1.0, index.shape)
    if weights is not None:
        values["loss_weights"] = weights[address.reshape(-1)]
    for key, value in values.items():
        batch[key][where] = value.reshape(-1, seq_len)
        for row, rest in padded:
            batch[key][where[row], rest] = 0
