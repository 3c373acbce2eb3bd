"""Hosts that come and go in mid-run, as real processes: every step has the samples that one host gives it."""

from collections import Counter

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.tokens.store import TokenStore
from tests.data.numbered import (
    BATCH,
    SEQ_LEN,
    Hosts,
    Numbers,
    inputs_of,
    open_loader,
    samples,
    write_numbered,
)

MIXTURE = {"a": {"weight": [[0, 3.0], [20, 1.0]]}, "b": {"weight": 1.0}}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered")
    return {
        "": str(write_numbered(root / "alone", 200)),
        "a": str(write_numbered(root / "a", 120, first=10_000, seed=1)),
        "b": str(write_numbered(root / "b", 120, first=20_000, seed=2)),
    }


def config(tmp_path, **values):
    return DataConfig(seq_len=SEQ_LEN, cache_dir=str(tmp_path / "cache"), **values)


def hosts_on(tmp_path, places, data):
    (tmp_path / "out").mkdir()
    places = {name: place for name, place in places.items() if bool(name) == bool(data.mixture)}
    return Hosts(data, places, tmp_path / "out"), open_loader(data, places)


def assert_as_one_host(run, one):
    assert sorted(run.seen) == list(range(run.step))
    assert all(run.seen[step] == samples(one.batch(step)) for step in range(run.step))


CASES = {
    "concat": {},
    "mixture, first-fit, curriculum": {
        "packing": "first_fit",
        "mixture": MIXTURE,
        "curriculum": [[0, 3], [9, SEQ_LEN]],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_hosts_4_2_8_3_1_in_mid_run_and_three_kills_give_one_hosts_samples(tmp_path, places, case):
    run, one = hosts_on(tmp_path, places, config(tmp_path, **CASES[case]))
    for hosts in (4, 2, 8, 3, 1):
        run.run(hosts, 3)
    for hosts in (4, 3, 2):
        run.killed(hosts, 3)
    run.run(1, 2)
    assert run.step >= 5 * 3 + 2
    assert_as_one_host(run, one)


def test_over_an_epoch_of_changing_hosts_nothing_is_read_twice_and_nothing_is_missed(tmp_path, places):
    run, one = hosts_on(tmp_path, places, config(tmp_path))
    rows = one._epochs[0].rows_of(1)
    for hosts in (4, 2, 8, 3):
        run.run(hosts, 3)
    run.run(1, -(-rows // BATCH) - run.step)
    read = [row for step in range(run.step) for row in run.seen[step]][:rows]
    inputs = Counter(token for tokens, *_ in read for token in tokens)
    assert set(inputs.values()) == {1}
    assert sorted(inputs) == inputs_of(TokenStore.open(places[""]))


@pytest.mark.parametrize("shards", (0, 8))
def test_streams_go_on_exactly_over_any_legal_number_of_hosts_and_kills(tmp_path, shards):
    """With V virtual shards host counts that divide V; with none, any."""
    run, one = hosts_on(tmp_path, {}, config(tmp_path, mode="streaming", virtual_shards=shards))
    for hosts in (4, 2, 8, 1) if shards else (3, 1):
        run.run(hosts, 2)
    for hosts in (4, 2, 8) if shards else (2,):
        run.killed(hosts, 3)
    run.run(1, 1)
    assert_as_one_host(run, one)


def test_each_virtual_shard_reads_each_of_its_documents_once_an_epoch(tmp_path):
    shards, documents = 4, Numbers(300)
    loader = open_loader(config(tmp_path, mode="streaming", virtual_shards=shards), {})
    seen = [Counter() for _ in range(shards)]
    step = 0
    while any(s["queue"] < 2 * 75 + 6 for s in loader.state()["shards"].values()):  # two epochs and the lanes
        for number, (_, targets, *_) in enumerate(samples(loader.batch(step))):
            seen[number * shards // BATCH].update(targets)
        step += 1
    for v, counted in enumerate(seen):
        own = {n for i in range(v, 300, shards) for n in documents.numbers(i)}
        assert set(counted) - {0} <= own  # and no other shard's
        ahead = loader.state()["shards"][str(v)]
        begun = [loader._stream.streams[v]._index(k) for k in range(ahead["queue"])]
        expected = Counter(n for i in begun for n in documents.numbers(i))
        for k, at in ahead["lanes"]:
            expected -= Counter(list(documents.numbers(loader._stream.streams[v]._index(k)))[at:])
        assert counted - Counter({0: counted[0]}) == expected
        assert sorted(begun[:75]) == list(range(v, 300, shards)) == sorted(begun[75:150])


def test_hosts_that_split_a_virtual_shard_are_refused_before_anything_is_read(tmp_path):
    data = config(tmp_path, mode="streaming", virtual_shards=4)
    loader = open_loader(data, {})
    loader.check_rows(slice(6, 18))  # shards 1 and 2
    for rows in (slice(0, 8), slice(5, 12)):
        with pytest.raises(DataError, match=r"virtual_shards=4: .* shard .*divides the shards \(1, 2, 4\)"):
            loader.check_rows(rows)
        with pytest.raises(DataError, match="virtual_shards=4"):
            loader.batch(0, rows)
    assert loader.state() == open_loader(data, {}).state()


def test_positions_that_do_not_fit_are_refused(tmp_path):
    data = config(tmp_path, mode="streaming", virtual_shards=4)
    half, other = open_loader(data, {}), config(tmp_path, mode="streaming", virtual_shards=2)
    half.batch(0, slice(0, 12))
    assert sorted(half.state()["shards"]) == ["0", "1"]
    with pytest.raises(DataError, match="lacks shard 2, 3"):
        open_loader(data, {}).restore(half.state())
    whole = open_loader(data, {}).state()
    with pytest.raises(DataError, match="virtual_shards=2 cannot go on from a stream of 4"):
        open_loader(other, {}).restore(whole)
    alone = config(tmp_path, mode="streaming")
    with pytest.raises(DataError, match="virtual_shards=0 cannot go on from a stream of 4"):
        open_loader(alone, {}).restore(whole)
    with pytest.raises(DataError, match="virtual_shards=4 cannot go on from a stream of 0"):
        open_loader(data, {}).restore(open_loader(alone, {}).state())
    with pytest.raises(DataError, match="virtual_shards=5 does not divide training.global_batch_size=24"):
        open_loader(config(tmp_path, mode="streaming", virtual_shards=5), {})
