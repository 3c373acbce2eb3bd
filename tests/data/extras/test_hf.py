"""Hugging Face `datasets`: what it saved, what it streams, and what it cannot reach."""

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data.config import DataConfig
from data.curation.optimize import documents
from data.errors import DataError
from data.pipeline import prepare
from tests.data.corpora import BYTES, some_texts, train_of
from tests.data.extras import require

# protobuf 6.33 warns of what tfds's copy of an older json_format does.
pytestmark = pytest.mark.filterwarnings("ignore:label.* is deprecated")


@pytest.fixture(scope="module")
def datasets():
    return require("datasets", "hf")


def hf_config(cache: Path, **values: Any) -> DataConfig:
    defaults: dict[str, Any] = {"seq_len": 16, "workers": 1}
    return DataConfig(source="hf", cache_dir=str(cache), **(defaults | values))


TEXTS = some_texts(150)
SLICES: dict[str, Any] = {"train_split": "train[20%:]", "validation_split": "train[:20%]"}


def test_a_saved_dataset_reads_in_its_order(datasets, tmp_path):
    parts = {"train": TEXTS[:140], "validation": TEXTS[140:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    config = hf_config(tmp_path / "cache", path=str(tmp_path / "saved"))
    prepared = prepare(config, BYTES, progress=False)
    assert list(documents(config, "train")) == TEXTS[:140]
    assert list(documents(config, "validation")) == TEXTS[140:]
    assert train_of(prepared).num_documents == 140
    assert prepare(config, BYTES, progress=False).digest == prepared.digest


def test_one_saved_split_is_cut_in_two(datasets, tmp_path):
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    config = hf_config(tmp_path / "cache", path=str(tmp_path / "saved"), text_key="body", **SLICES)
    assert list(documents(config, "validation")) + list(documents(config, "train")) == TEXTS
    with pytest.raises(DataError, match=r"split validation is not in .*which has train; parts of one"):
        prepare(hf_config(tmp_path / "cache", path=config.path, text_key="body"), BYTES, progress=False)
    with pytest.raises(DataError, match=r"data\.text_key=text is not in .*its columns are body"):
        prepare(hf_config(tmp_path / "cache", path=config.path, **SLICES), BYTES, progress=False)


@pytest.mark.parametrize("name", ("json", None))
def test_a_folder_of_data_files_is_streamed_once(datasets, tmp_path, name):
    folder = tmp_path / "files"
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[50 * part : 50 * part + 50]]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    config = hf_config(tmp_path / "cache", path=str(folder), name=name, **SLICES)
    assert list(documents(config, "validation")) + list(documents(config, "train")) == TEXTS
    assert not list((tmp_path / "cache").rglob("*.lock"))
    digest = prepare(config, BYTES, progress=False).digest
    (folder / "1.jsonl").write_text('{"text": "another"}\n')
    assert prepare(config, BYTES, progress=False).digest != digest


def test_what_the_library_would_leave_out_unsaid_is_refused(datasets, tmp_path):
    """It passes over linked folders, and takes the end of a .zst file for that of its text."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    frame = zstandard.ZstdCompressor().compress
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl.zst").write_bytes(frame(lines) + frame(lines))
    config = hf_config(tmp_path / "cache", path=str(folder), **SLICES)
    assert len(documents(config, "validation")) + len(documents(config, "train")) == 2 * len(TEXTS)
    (folder / "a.jsonl.zst").write_bytes(frame(lines) + frame(lines)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is truncated or corrupt"):
        prepare(config, BYTES, progress=False)
    (folder / "a.jsonl.zst").write_bytes(frame(lines))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "b.jsonl").write_bytes(lines)
    (folder / "more").symlink_to(tmp_path / "disk")
    with pytest.raises(DataError, match=r"more/b\.jsonl lies in a linked folder, .*use data\.source=folder"):
        prepare(config, BYTES, progress=False)


def test_a_saved_split_may_be_a_linked_folder(datasets, tmp_path):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "saved" / "train").symlink_to(tmp_path / "elsewhere")
    config = hf_config(tmp_path / "cache", path=str(tmp_path / "saved"), **SLICES)
    digest = prepare(config, BYTES, progress=False).digest
    datasets.Dataset.from_dict({"text": TEXTS[:140]}).save_to_disk(str(tmp_path / "other"))
    (tmp_path / "saved" / "train").unlink()
    (tmp_path / "saved" / "train").symlink_to(tmp_path / "other")
    assert prepare(config, BYTES, progress=False).digest != digest


def test_values_that_are_no_text_stop_and_invalid_utf8_is_counted(datasets, tmp_path):
    import pyarrow
    import pyarrow.parquet

    datasets.Dataset.from_dict({"text": [1, 2]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(DataError, match=r"data\.text_key=text is int64 in .*; it must be text"):
        prepare(hf_config(tmp_path / "cache", path=str(tmp_path / "numbers"), **SLICES), BYTES)
    raw = pyarrow.array([*(text.encode() for text in TEXTS), b"caf\xe9"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "parquet" / "train.parquet")
    config = hf_config(tmp_path / "cache", path=str(tmp_path / "parquet"), **SLICES)
    with pytest.raises(DataError, match="record 150 is not UTF-8 at byte 3"):
        prepare(config, BYTES, progress=False)
    config.on_bad_record = "skip"
    assert prepare(config, BYTES, progress=False).description["skipped"] == {"utf8": 1}
    assert list(documents(config, "validation")) + list(documents(config, "train")) == TEXTS


@pytest.mark.parametrize("damage", ("cut", "gone"))
def test_a_damaged_saved_dataset_is_one_line(datasets, tmp_path, damage):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    shard = next((tmp_path / "saved").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:3000]) if damage == "cut" else shard.unlink()
    config = hf_config(tmp_path / "cache", path=str(tmp_path / "saved"), **SLICES)
    with pytest.raises(DataError, match=r"data\.path=.*saved cannot be read") as caught:
        prepare(config, BYTES, progress=False)
    assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach_is_one_line(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = hf_config(tmp_path, name="nobody/nothing:some@main")
    with pytest.raises(DataError, match=r"data\.name=nobody/nothing:some@main .*HF_HUB_OFFLINE") as caught:
        prepare(config, BYTES, progress=False)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there(datasets, tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        prepare(hf_config(tmp_path, path=str(tmp_path / "none")), BYTES, progress=False)
