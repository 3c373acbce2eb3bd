"""Short pieces first: the longest piece of a document in a row grows over the steps.

Rows keep their length, so that no shape changes and nothing is compiled again; a piece longer than the step
allows is cut where it stands, each part a segment of its own whose positions begin at 0. No target moves or
is lost: only what a token may attend to is shortened. After Jin et al. (2023, "GrowLength") and Zhu et al.
(2025, "SkyLadder").
"""

from collections.abc import Sequence

import numpy as np


def longest_piece(curriculum: Sequence[Sequence[int]], step: int, seq_len: int) -> int:
    """Return the limit at a 0-based step: that of the last point at or before it; `seq_len` without any."""
    return next((length for first, length in reversed(curriculum) if first <= step), seq_len)


def cut_pieces(batch: dict[str, np.ndarray], longest: int) -> None:
    """Cut, in place, the pieces of a batch [B, T] into parts of `longest` and a shorter last one."""
    real = batch["segment_ids"] > 0
    batch["positions"] %= longest
    begins = real & (batch["positions"] == 0)
    batch["segment_ids"][:] = np.cumsum(begins, axis=1) * real
