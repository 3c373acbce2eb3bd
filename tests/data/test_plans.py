import numpy as np
import pytest

import data.loading.plan_cache as plans
from data.config import DataConfig
from data.loading.bin_packing import best_fit, first_fit
from data.loading.loader import Loader
from data.loading.packing import PackingPlan
from data.tokens.store import TokenStore
from tests.data.numbered import BATCH, SEQ_LEN, write_numbered


def placed_one_by_one(lengths, room, rule):
    """Each piece's row by a rule over the rows that take it: (row, room left, when it was last filled)."""
    rows, state = [], []
    for when, length in enumerate(lengths.tolist()):
        fitting = [(row, left, filled) for row, (left, filled) in enumerate(state) if left >= length]
        row = min(fitting, key=rule)[0] if fitting else len(state)
        state += [(room, when)] * (row == len(state))
        state[row] = state[row][0] - length, when
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_fits_place_every_piece_where_the_plain_rules_do(seed):
    rng = np.random.default_rng(seed)
    room = int(rng.integers(2, 30))
    lengths = rng.integers(1, room + 1, int(rng.integers(1, 150)))
    assert first_fit(lengths, room).tolist() == placed_one_by_one(lengths, room, lambda row: row[0])
    longest_first = np.argsort(-lengths, kind="stable")
    rows = placed_one_by_one(lengths[longest_first], room, lambda row: (row[1], -row[2]))
    assert best_fit(lengths, room)[longest_first].tolist() == rows


@pytest.fixture
def store(tmp_path):
    return TokenStore.open(write_numbered(tmp_path / "store", 80))


def loader(store, tmp_path, **values):
    data = DataConfig(seq_len=SEQ_LEN, packing="first_fit", cache_dir=str(tmp_path), **values)
    return Loader(store, data, global_batch_size=BATCH, seed=3)


def test_a_slow_plan_is_kept_and_one_that_was_damaged_is_made_again_and_said(
    tmp_path, store, monkeypatch, capsys
):
    quick = loader(store, tmp_path).batch(4)
    assert not (tmp_path / "plans").exists()
    monkeypatch.setattr(plans, "SECONDS", -1)
    loader(store, tmp_path).batch(4)
    kept = sorted((tmp_path / "plans").iterdir())
    assert kept
    wholes = [path.read_bytes() for path in kept]
    with monkeypatch.context() as patch:  # from the file, not made
        patch.setattr("data.loading.loader.make_plan", None)
        again = loader(store, tmp_path)
        assert all(np.array_equal(again.batch(4)[key], quick[key]) for key in quick)
    assert not capsys.readouterr().out
    flipped = bytearray(wholes[0])
    flipped[-9] ^= 4
    for damaged in (bytes(flipped), wholes[0][:-8], wholes[0] + b"12345678", b"", b"[]\n", b"{}"):
        kept[0].write_bytes(damaged)
        again = loader(store, tmp_path)
        assert all(np.array_equal(again.batch(4)[key], quick[key]) for key in quick)
        again.batch(0)
        assert f"building again: {kept[0]} is corrupt" in capsys.readouterr().out
        assert [path.read_bytes() for path in kept] == wholes


def test_plans_of_other_epochs_seeds_lengths_packings_and_stores_lie_apart(tmp_path, store, monkeypatch):
    monkeypatch.setattr(plans, "SECONDS", -1)
    other = TokenStore.open(write_numbered(tmp_path / "other", 80, first=5))
    keys = [(0, 0, "none", 8), (0, 1, "none", 8), (1, 0, "none", 8), (0, 0, "none", 9), (0, 0, "concat", 8)]
    cases = [*((store, key) for key in keys), (other, keys[0])]
    for number, (of, key) in enumerate(cases):
        made = PackingPlan(*(np.full(3, number) for _ in range(3)))
        assert plans.kept_plan(of, str(tmp_path), key, lambda made=made: made) is made
    for number, (of, key) in enumerate(cases):
        assert plans.kept_plan(of, str(tmp_path), key, lambda: None).starts.tolist() == [number] * 3
