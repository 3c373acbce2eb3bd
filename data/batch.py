"""The fields of a batch, once: what a loader fills, what a step takes, and where each of them lies."""

from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray | None  # of a global batch: a range, increasing row numbers, or all


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

# Of texts that are judged (data.format=pairs and labels), what belongs together in rows behind each other.
LABELS: dict[str, Field] = {
    "labels": Field("float32"),  # of an answer's targets: 1 wanted, -1 unwanted, 0 all else
}
# Log-probabilities of the targets by the weights that a run began with.
REFERENCE: dict[str, Field] = {"reference_logprobs": Field("float32")}
# Of answers that the run itself has drawn.
ROLLOUT: dict[str, Field] = {
    "advantages": Field("float32"),  # of each target that counts: its answer's
    "behaviour_logprobs": Field("float32"),  # log-probabilities of the targets by the weights that drew them
    "drawn_reward": Field("float32"),  # the mean of all that was drawn for the batch, everywhere
}
