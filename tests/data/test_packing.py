import numpy as np
import pytest

from data.batch import TEXT
from data.loading.curriculum import cut_pieces
from data.loading.packing import empty_batch, fill, make_plan, permutation

SEQ_LEN = 8
PACKINGS = ("concat", "best_fit", "first_fit", "none")


def toy(lengths):
    """Documents whose every entry is unique, stored as inputs and one final target each."""
    lengths = np.array(lengths)
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    return np.arange(1, (lengths + 1).sum() + 1), starts, lengths


def all_rows(packing, lengths, **options):
    tokens, starts, lengths = toy(lengths)
    order = permutation(len(starts), 7)
    plan = make_plan(packing, starts[order], lengths[order], SEQ_LEN)
    batch = empty_batch(plan.num_rows, SEQ_LEN)
    fill(batch, np.arange(plan.num_rows), tokens, plan, np.arange(plan.num_rows), **options)
    return tokens, starts, lengths, plan, batch


CASES = ([3], [8], [1, 1, 1], [8, 8], [7, 9, 16, 1, 23], list(range(1, 40)))


@pytest.mark.parametrize("lengths", CASES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_input_and_target_is_in_exactly_one_row(packing, lengths):
    tokens, starts, lengths, _, batch = all_rows(packing, lengths)
    real = batch["loss_weights"] > 0
    inputs = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    assert sorted(batch["tokens"][real]) == list(tokens[inputs])
    assert sorted(batch["targets"][real]) == list(tokens[inputs + 1])


@pytest.mark.parametrize("lengths", CASES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_segments_are_runs_of_one_document_counted_from_one(packing, lengths):
    tokens, starts, _, plan, batch = all_rows(packing, lengths)
    document = np.searchsorted(starts, np.arange(len(tokens)), side="right")
    for row in range(plan.num_rows):
        segments = batch["segment_ids"][row]
        count = segments.max()
        assert list(np.unique(segments[segments > 0])) == list(range(1, count + 1))
        for segment in range(1, count + 1):
            inside = np.flatnonzero(segments == segment)
            assert list(inside) == list(range(inside[0], inside[-1] + 1))
            assert list(batch["positions"][row][inside]) == list(range(len(inside)))
            ids = batch["tokens"][row][inside]
            assert list(ids) == list(range(ids[0], ids[0] + len(ids)))
            assert len(set(document[ids - 1])) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_targets_shift_and_padding_weighs_nothing(packing):
    _, _, _, _, batch = all_rows(packing, CASES[-1])
    real = batch["segment_ids"] > 0
    assert np.array_equal(batch["targets"][real], batch["tokens"][real] + 1)
    assert np.array_equal(batch["loss_weights"], real.astype(np.float32))
    for key in ("tokens", "targets", "positions"):
        assert not batch[key][~real].any()


def test_concat_pads_only_the_last_row():
    *_, plan, batch = all_rows("concat", CASES[-1])
    assert plan.num_rows == -(-sum(CASES[-1]) // SEQ_LEN)
    assert (batch["segment_ids"][:-1] > 0).all()


def test_none_has_one_piece_a_row():
    *_, plan, batch = all_rows("none", CASES[-1])
    assert batch["segment_ids"].max() == 1
    assert plan.num_rows == sum(-(-n // SEQ_LEN) for n in CASES[-1])


def spelled_out(tokens, plan, row, seq_len, weights):
    """One row's arrays, token by token: what `fill` is held to."""
    values = {key: [0] * seq_len for key in TEXT}
    at, number = 0, 0
    for piece in range(plan.row_offsets[row], plan.row_offsets[row + 1]):
        for offset in range(plan.lengths[piece]):
            address = plan.starts[piece] + offset
            number += offset == 0
            values["tokens"][at] = tokens[address]
            values["targets"][at] = tokens[address + 1]
            values["positions"][at] = offset
            values["segment_ids"][at] = number
            values["loss_weights"][at] = 1 if weights is None else weights[address + 1]
            at += 1
    return {key: np.array(v, np.float32 if key == "loss_weights" else np.int32) for key, v in values.items()}


class Parts:
    """Tokens that are no array: only addresses can be asked for, and only those that exist."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, addresses):
        assert addresses.ndim == 1 and addresses.min() >= 0
        return self.values[addresses]


@pytest.mark.parametrize("way", ["slices", "addresses", "parts", "memmap"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_way_to_fill_gives_the_same_bits(packing, way, weighted, monkeypatch, tmp_path):
    monkeypatch.setattr("data.loading.fill.LONG", 1 if way in ("slices", "memmap") else 10**6)
    monkeypatch.setattr("data.loading.fill.TOGETHER", 64)  # several groups of rows
    seq_len = 16
    rng = np.random.default_rng(0)
    tokens, starts, lengths = toy(rng.integers(1, 40, 60))
    tokens, weights = tokens.astype(np.uint16), (tokens % 2).astype(np.uint8)
    plan = make_plan(packing, starts, lengths, seq_len)
    rows = permutation(plan.num_rows, 5)[:30]
    where = np.sort(permutation(40, 6)[: len(rows)])
    if way == "memmap":
        tokens.tofile(tmp_path / "tokens.bin")
        tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r")
    expected = empty_batch(40, seq_len)
    for at, row in zip(where, rows, strict=True):
        one = spelled_out(tokens, plan, row, seq_len, weights if weighted else None)
        for key in TEXT:
            expected[key][at] = one[key]
    batch = empty_batch(40, seq_len)
    for values in batch.values():
        values[where] = 99  # rows are written whole, whatever they held
    as_given = Parts if way == "parts" else np.asanyarray
    given = {"weights": as_given(weights)} if weighted else {}
    fill(batch, where, as_given(tokens), plan, rows, **given)
    for key in TEXT:
        assert batch[key].dtype == expected[key].dtype
        assert np.array_equal(batch[key], expected[key]), key


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_curriculum_cuts_pieces_and_keeps_every_pair(packing):
    *_, whole = all_rows(packing, CASES[-1])
    cut = {key: values.copy() for key, values in whole.items()}
    cut_pieces(cut, 3)
    for key in ("tokens", "targets", "loss_weights"):
        assert np.array_equal(cut[key], whole[key])
    for row in range(len(whole["tokens"])):
        number = 0
        for at, position in enumerate(whole["positions"][row]):
            real = whole["segment_ids"][row, at] > 0
            number += real and position % 3 == 0
            assert (cut["positions"][row, at], cut["segment_ids"][row, at]) == (position % 3, number * real)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_weight_of_a_target_is_that_of_its_entry(packing):
    tokens, *_ = toy(CASES[-1])
    weights = (tokens % 3).astype(np.uint8)
    *_, batch = all_rows(packing, CASES[-1], weights=weights)
    expected = np.where(batch["segment_ids"] > 0, batch["targets"] % 3, 0)
    assert np.array_equal(batch["loss_weights"], expected.astype(np.float32))


def test_best_fit_cuts_only_what_exceeds_a_row_and_wastes_little():
    rng = np.random.default_rng(0)
    _, starts, lengths = toy(rng.integers(1, 60, 3000))
    plan = make_plan("best_fit", starts, lengths, 64)
    assert len(plan.starts) == len(starts)
    assert plan.num_rows <= 1.02 * -(-lengths.sum() // 64)


def test_best_fit_is_never_beaten_by_a_row_with_more_room():
    # 5 goes first, then 4: best fit puts 3 beside 5 (no room left), worst fit would put it beside 4.
    _, starts, lengths = toy([3, 4, 5])
    plan = make_plan("best_fit", starts, lengths, SEQ_LEN)
    rows = [
        sorted(plan.lengths[a:b].tolist())
        for a, b in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True)
    ]
    assert sorted(rows) == [[3, 5], [4]]


def test_permutation_is_a_function_of_its_key_alone():
    assert sorted(permutation(1000, 3, 1, 0)) == list(range(1000))
    assert np.array_equal(permutation(1000, 3, 1, 0), permutation(1000, 3, 1, 0))
    seen = {
        tuple(permutation(1000, *key)[:20]) for key in ((3, 1, 0), (3, 0, 0), (3, 1, 1), (1, 3, 0), (-1,))
    }
    assert len(seen) == 5
    # Pinned: an order that changes with a package would change every run that resumes.
    assert permutation(8, 0).tolist() == PINNED


PINNED = [1, 4, 5, 7, 6, 0, 3, 2]
