import json
import threading
from collections import Counter

import numpy as np
import pytest

from data.batch import TEXT
from data.errors import DataError
from data.loading.held_out import EvalBatches
from data.loading.loader import Loader
from data.loading.prefetch import Prefetcher
from tests.data.corpora import documents_of, folder_config, train_of

BATCH = 4


def cached(prepared, corpus, seed=0, batch=BATCH, **values):
    return Loader(prepared, folder_config(*corpus, **values), global_batch_size=batch, seed=seed)


def streaming(streamed, corpus, seed=0, batch=BATCH):
    return Loader(streamed, folder_config(*corpus, mode="streaming"), global_batch_size=batch, seed=seed)


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in TEXT)


def pairs(batch):
    real = batch["loss_weights"] > 0
    return Counter(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))


def document_pairs(ids, start=0):
    return Counter(zip(ids[start:-1].tolist(), ids[start + 1 :].tolist(), strict=True))


def epoch_pairs(store):
    return sum((document_pairs(ids) for ids in store.framed()), Counter())


def test_batches_have_the_agreed_shapes_and_types(prepared, corpus):
    batch = cached(prepared, corpus).batch(0)
    assert set(batch) == {"tokens", "targets", "positions", "segment_ids", "loss_weights"}
    assert {value.shape for value in batch.values()} == {(BATCH, 16)}
    assert batch["loss_weights"].dtype == np.float32
    assert {batch[key].dtype for key in TEXT if key != "loss_weights"} == {np.dtype(np.int32)}


@pytest.mark.parametrize("packing", ("concat", "best_fit", "first_fit", "none"))
def test_a_batch_is_a_pure_function_of_seed_and_step(prepared, corpus, packing):
    forward = cached(prepared, corpus, packing=packing)
    batches = [forward.batch(step) for step in range(300)]  # several epochs
    backward = cached(prepared, corpus, packing=packing)
    for step in (299, 150, 0, 151, 77, 298):
        assert same(backward.batch(step), batches[step])
    other = cached(prepared, corpus, seed=1, packing=packing)
    assert not same(other.batch(0), batches[0])


@pytest.mark.parametrize("packing", ("concat", "best_fit", "first_fit", "none"))
def test_each_epoch_has_every_pair_once_in_another_order(prepared, corpus, packing):
    loader = cached(prepared, corpus, batch=1, packing=packing)
    wanted, step = epoch_pairs(train_of(prepared)), 0
    rows: list[list[bytes]] = []
    for _ in range(3):
        seen: Counter = Counter()
        first = step
        while seen.total() < wanted.total():
            seen += pairs(loader.batch(step))
            step += 1
        assert seen == wanted
        rows.append([loader.batch(s)["tokens"].tobytes() for s in range(first, step)])
    assert rows[0] != rows[1] != rows[2]


@pytest.mark.parametrize("hosts", (1, 2, 4))
def test_rows_are_the_global_batchs_rows_on_any_number_of_hosts(prepared, streamed, corpus, hosts):
    share = BATCH // hosts
    for make, source in ((cached, prepared), (streaming, streamed)):
        whole = make(source, corpus)
        parts = [make(source, corpus) for _ in range(hosts)]
        for step in range(60):
            rows = [part.batch(step, slice(h * share, (h + 1) * share)) for h, part in enumerate(parts)]
            assert same({key: np.concatenate([r[key] for r in rows]) for key in TEXT}, whole.batch(step))


def test_a_batch_larger_than_an_epoch_spans_epochs(prepared, corpus):
    one = cached(prepared, corpus, batch=1)
    rows = len(list(EvalBatches(train_of(prepared), folder_config(*corpus), batch_size=1)))
    big = cached(prepared, corpus, batch=3 * rows).batch(0)
    for row in (0, rows - 1, rows, 2 * rows, 3 * rows - 1):
        assert np.array_equal(big["tokens"][row], one.batch(row)["tokens"][0])


def test_documents_start_with_bos_and_end_with_eos(prepared, corpus):
    store, tokenizer = train_of(prepared), prepared.tokenizer
    assert tokenizer.decode(store.document(3)) in set(
        (corpus[0] / f"{n:03d}.txt").read_text() for n in range(40)
    )
    loader = cached(prepared, corpus, batch=1, packing="none", seq_len=4096)
    for step in range(store.num_documents):
        row = {key: value[0] for key, value in loader.batch(step).items()}
        count = int(row["loss_weights"].sum())
        assert row["tokens"][0] == tokenizer.bos_id
        assert row["targets"][count - 1] == tokenizer.eos_id
        assert np.array_equal(row["targets"][: count - 1], row["tokens"][1:count])


def test_stream_goes_on_identically_after_a_restore_at_every_step(streamed, corpus):
    loader = streaming(streamed, corpus)
    states, batches = [loader.state()], []
    for step in range(150):
        batches.append(loader.batch(step))
        states.append(json.loads(json.dumps(loader.state())))
    assert any(at > 0 for _, at in states[20]["lanes"])  # in the middle of documents
    for step in (0, 1, 2, 20, 63, 100, 148):
        again = streaming(streamed, corpus)
        again.restore(states[step])
        assert again.state() == states[step]
        assert all(same(again.batch(s), batches[s]) for s in range(step, min(step + 40, 150)))
    twice = streaming(streamed, corpus)  # and after a second restore, which is where others go wrong
    twice.restore(states[20])
    twice.batch(20)
    thrice = streaming(streamed, corpus)
    thrice.restore(twice.state())
    assert all(same(thrice.batch(s), batches[s]) for s in range(21, 60))


@pytest.mark.parametrize("batch", (1, 4, 40))
def test_stream_reads_what_the_store_holds(prepared, streamed, corpus, batch):
    """At any step: what came out is every document begun, less what its lane has not read yet."""
    loader = streaming(streamed, corpus, batch=batch)
    stored = Counter(ids.tobytes() for ids in train_of(prepared).framed())
    count = len(documents_of(streamed))
    seen: Counter = Counter()
    orders = loader._stream
    step = 0
    while loader.state()["queue"] < 2 * count + batch:
        seen += pairs(loader.batch(step))
        step += 1
        if step % 25:
            continue
        state = loader.state()
        begun = [orders._index(k) for k in range(state["queue"])]
        framed = list(train_of(prepared).framed())
        expected: Counter = sum((document_pairs(framed[i]) for i in begun), Counter())
        for k, at in state["lanes"]:
            expected -= document_pairs(framed[orders._index(k)], at)
        assert seen == expected
    assert sorted(orders._index(k) for k in range(count)) == list(range(count))
    assert stored.total() == count


def test_stream_refuses_steps_out_of_order_and_another_batch_size(streamed, prepared, corpus):
    loader = streaming(streamed, corpus)
    loader.batch(0)
    with pytest.raises(DataError, match="step 1 is due, not 5"):
        loader.batch(5)
    with pytest.raises(DataError, match="training.global_batch_size=2"):
        streaming(streamed, corpus, batch=2).restore(loader.state())
    with pytest.raises(DataError, match="data.mode=cached"):
        cached(prepared, corpus).restore(loader.state())


def test_eval_covers_every_held_out_pair_once(prepared, corpus):
    store, config = prepared.validation, folder_config(*corpus)
    batches = EvalBatches(store, config, batch_size=3)
    assert sum((pairs(batch) for batch in batches), Counter()) == epoch_pairs(store)
    assert {batch["tokens"].shape for batch in batches} == {(3, 16)}
    assert len(list(batches)) == len(batches)
    assert (batches.num_tokens, batches.num_bytes) == (store.num_tokens, store.num_bytes)
    assert all(same(a, b) for a, b in zip(batches, EvalBatches(store, config, batch_size=3), strict=True))


def test_part_of_eval_counts_the_bytes_it_covers(prepared, corpus):
    store, config = prepared.validation, folder_config(*corpus)
    part = EvalBatches(store, config, batch_size=3, max_batches=2)
    assert len(part) == len(list(part)) == 2
    assert part.num_tokens == sum(int(batch["loss_weights"].sum()) for batch in part)
    separators = sum(int((batch["targets"] == store.eos_id).sum()) for batch in part)
    assert part.num_bytes == part.num_tokens - separators  # the byte tokenizer: a token is a byte
    counted = EvalBatches(store, config, batch_size=3)._covered()
    assert counted == (store.num_tokens, store.num_bytes)


def test_prefetcher_gives_the_loaders_batches_and_states(streamed, prepared, corpus):
    for make, source in ((cached, prepared), (streaming, streamed)):
        plain = make(source, corpus)
        ahead = Prefetcher(make(source, corpus), start=0, depth=3)
        for step in range(12):
            batch, waited, state = ahead.next()
            assert same(batch, plain.batch(step))
            assert state == plain.state()
            assert waited >= 0
        before = threading.active_count()
        ahead.close()
        assert threading.active_count() == before - 1


def test_prefetcher_raises_what_the_loader_raised():
    class Broken(Loader):
        def __init__(self):
            pass

        def batch(self, step, rows=None):
            if step == 2:
                raise DataError("broken at 2")
            return {}

        def state(self):
            return {}

    ahead = Prefetcher(Broken(), start=1, depth=4)
    ahead.next()
    for _ in range(2):
        with pytest.raises(DataError, match="broken at 2"):
            ahead.next()
    ahead.close()


def test_describe_counts_rows_and_steps(prepared, streamed, corpus):
    rows = len(EvalBatches(train_of(prepared), folder_config(*corpus), batch_size=1))
    line = cached(prepared, corpus).describe()
    assert f"{train_of(prepared).num_documents} documents" in line and f"{rows} rows of 16" in line
    assert "streaming" in streaming(streamed, corpus).describe()
