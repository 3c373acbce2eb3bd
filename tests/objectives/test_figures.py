"""What other weights say of a run's tokens: every target once, and enough before it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.loading.loader import Loader
from data.tokens.store import TokenStore
from training.figures.annotate import _figures_of, windows
from training.objectives.distill import teacher_fields


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


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
@pytest.mark.parametrize("steps", [0, 1, 3, 40])
def test_what_is_asked_is_what_the_steps_read_and_answers_are_those_of_the_whole(packing, steps, tmp_path):
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(random.integers(2, 50, 40))])
    tokens = random.integers(0, 99, offsets[-1]).astype(np.uint16)
    store = TokenStore(Path("."), tokens, offsets, np.ones(99, int), 1, bos_id=0, eos_id=1)
    data = DataConfig(seq_len=16, packing=packing, cache_dir=str(tmp_path))
    loader = Loader(store, data, global_batch_size=4, seed=3)
    marks = replace(store, figures={"at": np.arange(store.num_addresses)})
    told = Loader(marks, data, global_batch_size=4, seed=3)
    read = [batch["at"][batch["segment_ids"] > 0] for batch in map(told.batch, range(steps))]
    wanted = loader.targets_of(steps)
    assert sorted(np.flatnonzero(wanted)) == sorted({int(at) for some in read for at in some})

    asked = []

    def score(batch):
        asked.append(int((batch["segment_ids"] > 0).any(1).sum()))
        said = batch["targets"] + 1000 * batch["tokens"] + batch["positions"]
        return {"soft_targets": said[None], "teacher_logprobs": said[None].astype(np.float32)}

    fields = teacher_fields(1)
    some = _figures_of(store, fields, score, (4, 16), wanted)
    rows, asked = sum(asked), []
    whole = _figures_of(store, fields, score, (4, 16), np.ones(store.num_addresses, bool))
    assert rows < sum(asked) if steps < 40 else rows == sum(asked)
    for name in fields:
        np.testing.assert_array_equal(some[name][:, wanted], whole[name][:, wanted])
