"""The fields of a batch, once: what a loader fills, what a step takes, and where each of them lies."""

from typing import NamedTuple


class Field(NamedTuple):
    """One array of a batch: its dtype's name and its dims, rows first.

    A dim is "batch", "length" (a position of the row), or a number of things that each position has.
    """

    dtype: str
    dims: tuple[str | int, ...] = ("batch", "length")


# Every source of text gives these. An objective that wants more says so in its own `fields`.
TEXT: dict[str, Field] = {
    "tokens": Field("int32"),
    "targets": Field("int32"),  # the token behind each position
    "positions": Field("int32"),  # from 0 at each document's begin
    "segment_ids": Field("int32"),  # documents of a row, from 1; 0 is padding
    "loss_weights": Field("float32"),  # how much a position counts: 0 or more
}
