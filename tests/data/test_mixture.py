import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.config import DataConfig, components
from data.errors import DataError
from data.loading.curriculum import longest_piece
from data.loading.held_out import held_out_batches
from data.loading.loader import Loader
from data.loading.mixture import Interleaving
from data.pipeline import follow, prepare
from data.tokens.store import TokenStore
from tests.data.corpora import BYTES, folder_config, some_texts, write_texts
from tests.data.numbered import BATCH, SEQ_LEN, inputs_of, open_loader, samples, write_numbered

CONSTANT = [[(0, 0.5)], [(0, 0.3)], [(0, 0.2)]]
LINEAR = [[(0, 1.0), (300, 0.2)], [(0, 0.0), (100, 0.0), (200, 1.0)], [(0, 0.4)]]
ENDING = [[(10, 1.0), (40, 0.0)], [(0, 0.0), (30, 2.0)]]
WEIGHTS = {"constant": CONSTANT, "linear": LINEAR, "ending": ENDING, "alone": [[(0, 7.0)]]}


def due_by_steps(weights, batch, steps):
    """Rows due to each component, summed from the shares at each hundredth of a step."""
    points = sorted({0, *(step for schedule in weights for step, _ in schedule)})
    at = np.array([np.interp(points, *zip(*schedule, strict=True)) for schedule in weights])
    fine = (np.arange(steps * 100) + 0.5) / 100
    return np.array([np.interp(fine, points, share).sum() for share in at / at.sum(0)]) * batch / 100


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_row_of_every_component_has_one_place_wherever_one_begins_to_look(name):
    weights, batch, total = WEIGHTS[name], 24, 24 * 400
    order = Interleaving(weights, batch)
    component, row = order.rows(0, total)
    for i in range(len(weights)):
        assert np.array_equal(row[component == i], np.arange((component == i).sum()))
    for first, count in ((0, 1), (1, 24), (719, 3), (720, 24), (5000, 1000), (total - 1, 1)):
        assert np.array_equal(order.rows(first, count), (component[first:][:count], row[first:][:count]))
        assert np.array_equal(order.taken(first), np.bincount(component[:first], minlength=len(weights)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_shares_are_the_weights_to_about_a_row_at_every_moment(name):
    weights = WEIGHTS[name]
    order = Interleaving(weights, 24)
    for step in (1, 20, 100, 250, 417):  # 417 steps are 10,008 samples
        off = order.taken(24 * step) - due_by_steps(weights, 24, step)
        assert np.abs(off).max() < 1.5
        assert np.abs(off).max() / (24 * step) < 0.001 or step < 100
    far = 10**12  # rows, past all points
    assert np.abs(order.taken(far) - order.due(float(far))).max() < 1.5


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    seeds = {"": (60, 0, 0), "a": (60, 10_000, 1), "b": (25, 20_000, 2)}
    return {n: str(write_numbered(root / f"of{n}", *seed)) for n, seed in seeds.items()}


def config(tmp_path, mixed=False, **values):
    mixture = {"a": {"weight": [[0, 3.0], [20, 1.0]]}, "b": {"weight": 1.0}} if mixed else {}
    return DataConfig(seq_len=SEQ_LEN, cache_dir=str(tmp_path), mixture=mixture, **values)


def opened(data, places, **values):
    stores = {n: TokenStore.open(place) for n, place in places.items() if bool(n) == bool(data.mixture)}
    source = stores if data.mixture else stores[""]
    return Loader(source, data, global_batch_size=values.pop("batch", BATCH), seed=3, **values)


def test_realized_shares_are_the_weights_and_a_resume_anywhere_goes_on_with_the_same_batch(tmp_path, places):
    data = config(tmp_path, mixed=True)
    whole = opened(data, places)
    batches = [samples(whole.batch(step)) for step in range(30)]
    of_a = sum(tokens[0] < 20_000 for rows in batches for tokens, *_ in rows)
    assert abs(of_a - whole.shares(30)["a"] * 30 * BATCH) < 1e-6
    assert (
        abs(of_a / (30 * BATCH) - due_by_steps([[(0, 3.0), (20, 1.0)], [(0, 1.0)]], BATCH, 30)[0] / 720)
        < 2e-3
    )
    for step in (1, 7, 19, 29):
        again = opened(data, places)
        for done in range(step):
            again.batch(done)
        resumed = opened(data, places)
        resumed.restore(json.loads(json.dumps(again.state())))
        assert samples(resumed.batch(step)) == batches[step]


def test_a_mixture_of_one_corpus_is_that_corpus_bitwise(tmp_path, places):
    data = replace(config(tmp_path), mixture={"a": {"weight": 0.7}})
    mixed, plain = open_loader(data, {"a": places[""]}), open_loader(config(tmp_path), {"": places[""]})
    for step in (0, 1, 17):
        a, b = mixed.batch(step), plain.batch(step)
        assert all(np.array_equal(a[key], b[key]) for key in a)


CURRICULUM = [[0, 2], [2, 5], [4, SEQ_LEN]]


@pytest.mark.parametrize("curriculum", ([], CURRICULUM), ids=("whole pieces", "curriculum"))
@pytest.mark.parametrize("mixed", (False, True), ids=("alone", "mixture"))
@pytest.mark.parametrize("packing", ("concat", "best_fit", "first_fit", "none"))
@pytest.mark.parametrize("parts", (1, 3))  # of a batch: hosts, or steps of accumulation
def test_each_pair_of_an_epoch_once_in_pieces_of_the_steps_length(
    tmp_path, places, packing, mixed, curriculum, parts
):
    data = config(tmp_path, mixed, packing=packing, curriculum=curriculum)
    loader, share = opened(data, places), BATCH // parts
    names = [n for n in places if bool(n) == mixed]
    wanted = {n: inputs_of(TokenStore.open(places[n])) for n in names}
    rows = {n: e.rows_of(1) for n, e in zip(names, loader._epochs, strict=True)}
    read: dict = {n: [] for n in names}
    step = 0
    while any(len(read[n]) < rows[n] for n in names):
        made = [samples(loader.batch(step, slice(i * share, (i + 1) * share))) for i in range(parts)]
        for tokens, targets, segments, positions in (row for part in made for row in part):
            name = "" if not mixed else "a" if tokens[0] < 20_000 else "b"
            read[name].append(tokens)
            assert targets == [token + 1 for token in tokens]
            begins = [i for i, position in enumerate(positions) if position == 0]
            pieces = np.diff([*begins, len(tokens)])
            assert max(pieces) <= longest_piece(curriculum, step, SEQ_LEN)
            assert segments == np.repeat(np.arange(len(pieces)) + 1, pieces).tolist()
            assert positions == [i for piece in pieces for i in range(piece)]
        step += 1
    for name in names:
        assert Counter(t for row in read[name][: rows[name]] for t in row) == Counter(wanted[name])


def test_a_component_that_would_be_read_too_often_is_refused_with_numbers_that_help(tmp_path, places):
    data = config(tmp_path, mixed=True)
    rows = opened(data, places)._epochs[1].rows_of(2)
    data.mixture["b"]["epochs"] = 2
    opened(data, places, num_steps=10)
    with pytest.raises(
        DataError, match=r"data.mixture.b.epochs=2: training.num_steps=200 reads .* rows"
    ) as said:
        opened(data, places, num_steps=200)
    words = str(said.value).replace(",", "")
    steps = int(words.split("use at most ")[1].split()[0])
    epochs = float(words.split("b.epochs=")[2])
    taken = opened(data, places)._order.taken
    assert taken(steps * BATCH)[1] <= rows < taken((steps + 1) * BATCH)[1]
    opened(data, places, num_steps=steps)
    with pytest.raises(DataError, match="data.mixture.b.epochs=2"):
        opened(data, places, num_steps=steps + 1)
    data.mixture["b"]["epochs"] = epochs
    assert "epochs of 25 documents" in opened(data, places, num_steps=200).describe()


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"a": {"source": "stdlib"}}, "data.mixture.a has no weight"),
        ({"a": 1.0}, "data.mixture.a has no weight"),
        ({"a": {"weight": -1}}, "weights are numbers from 0"),
        ({"a": {"weight": "x"}}, "data.mixture.a.weight=x is neither a number nor a list"),
        ({"a": {"weight": [[0, 1], [0, 2]]}}, "steps must grow"),
        ({"a": {"weight": [[0, 0], [5, 1]]}}, "all weights are 0 at step 0"),
        ({"a": {"weight": 1, "wieght": 1}}, "data.mixture.a.wieght is not a key; did you mean weight"),
        ({"a": {"weight": 1, "seq_len": 8}}, "data.mixture.a.seq_len is the same for all"),
        ({"a": {"weight": 1, "epochs": 0}}, "data.mixture.a.epochs=0 is no positive number"),
        ({"a": {"weight": 1, "source": "foldr"}}, "data.mixture.a: data.source=foldr .* did you mean folder"),
        ({"a": {"weight": 1, "source": "folder"}}, "data.mixture.a: data.source=folder needs data.path"),
        ({"a/b": {"weight": 1}}, "without a slash"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mixture_is_said_in_one_line(mixture, said):
    with pytest.raises(ValueError, match=said) as caught:
        DataConfig(mixture=mixture)
    assert "\n" not in str(caught.value)


def test_a_stream_of_a_mixture_is_refused():
    with pytest.raises(ValueError, match="data.mixture needs data.mode=cached"):
        DataConfig(mode="streaming", mixture={"a": {"weight": 1}})


def test_virtual_shards_of_what_is_cached_are_refused():
    with pytest.raises(ValueError, match="data.virtual_shards=2 has no effect with data.mode=cached"):
        DataConfig(virtual_shards=2)


@pytest.mark.parametrize(
    ("curriculum", "said"),
    [
        ([[0, 4], [5, 4]], "lengths must grow"),
        ([[0, 4], [5, 9]], "between 2 and data.seq_len=8"),
        ([[0, 1], [5, 8]], "between 2 and data.seq_len=8"),
        ([[1, 4]], "steps must grow from 0"),
        ([[0, 2], [7, 4], [7, 8]], "steps must grow from 0"),
        ([[0, 2.5]], "no list of .step, length. pairs"),
        ([3], "no list of .step, length. pairs"),
    ],
)
def test_what_is_wrong_with_a_curriculum_is_said_in_one_line(curriculum, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(seq_len=8, curriculum=curriculum)


def test_components_are_prepared_with_one_tokenizer_each_in_stores_of_its_own(tmp_path):
    for name, seed in (("x", 1), ("y", 2)):
        write_texts(tmp_path / name, some_texts(30, seed=seed))
    mixture = {n: {"weight": 1.0 + i, "path": str(tmp_path / n)} for i, n in enumerate("yx")}
    data = folder_config(tmp_path / "none", tmp_path / "cache", mixture=mixture)
    tokenizer = replace(BYTES, kind="bpe", vocab_size=270)
    prepared = prepare(data, tokenizer, progress=False)
    assert list(prepared.components) == ["x", "y"]  # by name, whatever the order in the config
    assert len({part.tokenizer.digest for part in prepared.components.values()}) == 1
    assert len({part.train.path for part in prepared.components.values()}) == 2
    held_out = held_out_batches(prepared, data, batch_size=4)
    assert {n: b.num_bytes for n, b in held_out.items()} == {
        n: part.validation.num_bytes for n, part in prepared.components.items()
    }
    assert 0 < prepared.bigram_bits_per_byte() < 8
    there = follow(json.loads(json.dumps(prepared.facts())))
    assert (there.digest, there.description) == (prepared.digest, prepared.description)
    a, b = (Loader(p, data, global_batch_size=4, seed=0).batch(5)["tokens"] for p in (prepared, there))
    assert np.array_equal(a, b)
    heavier = {n: {**values, "weight": 9.0} for n, values in mixture.items()}
    again = prepare(
        replace(data, mixture=heavier), replace(BYTES, kind="bpe", vocab_size=270), progress=False
    )
    assert again.digest == prepared.digest  # a sweep over weights tokenizes once
    broken = replace(data, mixture={**mixture, "z": {"weight": 1.0, "path": str(tmp_path / "gone")}})
    with pytest.raises(DataError, match=r"^data.mixture.z: data.path=.*gone does not exist"):
        prepare(broken, BYTES, progress=False)
    assert list(components(data)) == ["x", "y"]
