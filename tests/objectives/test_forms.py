"""Records of pairs, labels and completions: what becomes of them, and what is refused."""

import json

import numpy as np
import pytest

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.loading.held_out import EvalBatches
from data.loading.loader import Loader
from data.pipeline import prepare

PAIRS = [{"prompt": f"thing {i}?", "chosen": f"good {i}", "rejected": f"a bad answer {i}"} for i in range(40)]
LABELS = [{"prompt": f"thing {i}?", "completion": f"answer {i}", "label": i % 3 > 0} for i in range(40)]


def written(path, records):
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records), "utf-8")
    return path


def loader_of(tmp_path, form, records, rows=8, **settings):
    path = written(tmp_path / f"{form}.jsonl", records)
    values = {"packing": "none", "seq_len": 64, "validation_fraction": 0.2, **settings}
    data = DataConfig(
        source="folder", format=form, path=str(path), cache_dir=str(tmp_path / "cache"), workers=1, **values
    )
    prepared = prepare(data, TokenizerConfig(kind="byte"), progress=False)
    return Loader(prepared, data, global_batch_size=rows, seed=5), prepared, data


def texts_of(batch, counted=False):
    """Each row's text; or what of it counts."""
    found = []
    for row in range(len(batch["tokens"])):
        which = batch["loss_weights"][row] > 0 if counted else batch["segment_ids"][row] > 0
        ids = (batch["targets"] if counted else batch["tokens"])[row][which]
        found.append(bytes(int(i) for i in ids if i < 256).decode())
    return found


def test_two_rows_of_a_pair_stand_behind_each_other_in_every_epoch(tmp_path):
    loader, prepared, _ = loader_of(tmp_path, "pairs", PAIRS)
    assert prepared.train.num_documents % 2 == 0
    seen = []
    for step in range(3 * prepared.train.num_documents // 8):
        batch = loader.batch(step)
        answers = texts_of(batch, counted=True)
        for better, worse in zip(answers[0::2], answers[1::2], strict=True):
            assert better.startswith("good ") and worse == f"a bad answer {better[5:]}"
            seen.append(better)
        assert (batch["labels"][0::2] == batch["loss_weights"][0::2]).all()
        assert (batch["labels"][1::2] == -batch["loss_weights"][1::2]).all()
        assert set(np.unique(batch["loss_weights"])) == {0, 1}
    assert len(set(seen)) == prepared.train.num_documents // 2 and len(set(seen[:10])) == 10


def test_part_of_a_batch_is_that_of_the_whole(tmp_path):
    loader, _, _ = loader_of(tmp_path, "pairs", PAIRS)
    whole, rows = loader.batch(2), np.array([1, 4, 5])
    for name, values in loader.batch(2, rows).items():
        np.testing.assert_array_equal(values, whole[name][rows])


def test_held_out_is_what_was_wanted(tmp_path):
    _, prepared, data = loader_of(tmp_path, "pairs", PAIRS)
    held_out = EvalBatches(prepared.validation, data, batch_size=4)
    answers = [text for batch in held_out for text in texts_of(batch, counted=True)]
    assert answers and not any("bad" in text for text in answers)
    assert held_out.num_bytes == sum(len(text) for text in answers)


def test_a_judged_answer_has_a_neighbour_with_that_of_another_prompt(tmp_path):
    loader, _, _ = loader_of(tmp_path, "labels", LABELS)
    batch = loader.batch(0)
    for own, other in zip(texts_of(batch)[0::2], texts_of(batch)[1::2], strict=True):
        number = int(own.split("thing ")[1].split("?")[0])
        assert own.endswith(f"answer {number}")
        assert other.startswith(own.removesuffix(f"answer {number}")) and not other.endswith(f" {number}")
        assert np.abs(batch["labels"][1::2]).sum() == 0
    wanted = [int(text.split("thing ")[1].split("?")[0]) % 3 > 0 for text in texts_of(batch)[0::2]]
    assert (batch["labels"][0::2].sum(1) > 0).tolist() == wanted
    assert (batch["loss_weights"].sum(1) > 0).all()


def test_a_completion_is_its_prompt_and_no_frame(tmp_path):
    loader, prepared, _ = loader_of(
        tmp_path, "completion", [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(50)]
    )
    batch = loader.batch(0)
    for text, answer in zip(texts_of(batch), texts_of(batch, counted=True), strict=True):
        assert text.split("=")[1] == answer == str(int(text.split("+")[0]) + 1)
    assert (batch["targets"][0][batch["loss_weights"][0] > 0][-1]) == prepared.tokenizer.eos_id


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": {"role": "assistant", "content": "b"},
            "rejected": "c",
        },
        {
            "prompt": "a",
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
        },
    ],
    ids=["messages", "message", "whole conversations"],
)
def test_pairs_of_every_form_are_the_same_texts(tmp_path, record):
    records = [record, *PAIRS]
    loader, prepared, _ = loader_of(tmp_path, "pairs", records)
    stores = (prepared.train, prepared.validation)
    said = [bytes(int(i) for i in ids if i < 256).decode() for store in stores for ids in store.framed()]
    assert "user\naassistant\nb" in said and "user\naassistant\nc" in said


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("pairs", {"prompt": "a", "chosen": "b"}, "has no rejected"),
        ("pairs", {"chosen": "b", "rejected": "c"}, "has no prompt"),
        (
            "labels",
            {"prompt": "a", "completion": "b", "label": 1},
            "has label 1, where true or false belongs",
        ),
        ("completion", {"prompt": "a"}, "has no completion"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": 3}, "has no rejected"),
        ("pairs", ["a"], "is a list"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, form, record, message):
    good = {"pairs": PAIRS, "labels": LABELS, "completion": [{"prompt": "a", "completion": "b"}]}[form]
    with pytest.raises(DataError, match=f":{len(good) + 1} {message}"):
        loader_of(tmp_path, form, [*good, record])


def test_what_cannot_be_judged_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="data.seq_len=16: .* judged texts are longer"):
        loader_of(tmp_path, "pairs", PAIRS, seq_len=16)[0].batch(0)
    with pytest.raises(ValueError, match="use data.packing=none"):
        loader_of(tmp_path, "pairs", PAIRS, packing="best_fit")
    with pytest.raises(ValueError, match="data.format=labels weighs each token"):
        DataConfig(source="folder", path="x", format="labels", mode="streaming")
