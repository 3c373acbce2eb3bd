"""What other weights say of a run's tokens: every target once, and enough before it."""

import numpy as np
import pytest

from training.figures.annotate import windows


@pytest.mark.parametrize("size", [8, 16])
def test_windows_have_every_target_once_and_half_a_row_before_it(size):
    lengths = np.array([1, size - 1, size, size + 1, 3 * size // 2, 3 * size // 2 + 1, 5 * size + 3])
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    begins, sizes, known = windows(starts, lengths, size)
    assert sizes.max() <= size and (known < sizes).all()
    owner = np.searchsorted(starts, begins, side="right") - 1
    seen = {}
    for begin, length, skipped, document in zip(begins, sizes, known, owner, strict=True):
        first = begin - starts[document]
        for at in range(first + skipped, first + length):
            assert (document, at) not in seen
            seen[document, at] = at - first
    assert len(seen) == lengths.sum()
    assert all(before >= min(at, size // 2) for (_, at), before in seen.items())
