"""Records that are no text, and shards that are damaged or change: stopped at, or skipped and counted."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from data.curation.optimize import documents
from data.errors import DataError
from data.pipeline import prepare
from data.sources.array_record import text_record, write_prepared
from data.sources.bad_records import BadRecords
from data.sources.corpus import Corpus
from data.sources.files import read_documents
from tests.data.corpora import BYTES, folder_config, some_texts, tfds_config, write_texts

# Bad records --------------------

BAD = {
    "utf8": b'{"text": "\xff"}',
    "json": b'{"text": ',
    "no_object": b'["a"]',
    "no_key": b'{"body": "a"}',
    "no_text": b'{"text": 5}',
    "surrogate": b'{"text": "\\ud800"}',
}


def folder_with_bad(tmp_path, kinds, **values):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    lines = [b'{"text": "good %d"}' % number for number in range(10)]
    (folder / "x.jsonl").write_bytes(b"\n".join([*(BAD[kind] for kind in kinds), *lines]))
    return folder_config(folder, tmp_path / "cache", **values)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_stops_the_run_and_says_how_to_skip_it(tmp_path, kind):
    with pytest.raises(DataError, match=r"x\.jsonl:1.*, or .*data\.on_bad_record=skip") as caught:
        prepare(folder_with_bad(tmp_path, [kind]), BYTES, progress=False)
    assert "\n" not in str(caught.value)


def test_skipped_records_are_counted_and_said_at_every_start(tmp_path, capsys):
    config = folder_with_bad(tmp_path, [*BAD, "utf8"], on_bad_record="skip")
    (tmp_path / "texts" / "y.txt").write_bytes(b"caf\xe9")
    counts = {**dict.fromkeys(BAD, 1), "utf8": 3}
    for _ in range(2):
        prepared = prepare(config, BYTES)
        assert prepared.description["skipped"] == counts
        said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        assert said == [
            "data: left out 1 json, 1 no_key, 1 no_object, 1 no_text, 1 surrogate, 3 utf8 bad records "
            "(data.on_bad_record=skip)"
        ]
    there = [*documents(config, "train"), *documents(config, "validation")]
    assert sorted(there) == sorted([*some_texts(20), *(f"good {number}" for number in range(10))])


def test_skipping_is_part_of_the_digest_and_stopping_is_not_said(tmp_path):
    stop = Corpus(folder_with_bad(tmp_path, []))
    skip = Corpus(folder_with_bad(tmp_path, [], on_bad_record="skip"))
    assert "on_bad_record" not in stop.inputs
    assert stop.digest != skip.digest


def test_parquet_that_is_not_utf8_is_found_record_by_record(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"a", b"\xff", b"c", None, b""], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"x\.parquet: record 1 is not UTF-8 at byte 0"):
        list(read_documents(path, "text"))
    bad = BadRecords("skip")
    assert list(read_documents(path, "text", bad)) == ["a", "c"]
    assert bad.counts == {"utf8": 1}


def test_json_nested_too_deep_is_a_bad_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl:1 is not JSON"):
        list(read_documents(path, "text"))


def test_a_record_of_fifty_megabytes_comes_back_whole(tmp_path):
    text = "0123456789abcdeä" * (50 * 2**20 // 17)
    folder = write_texts(tmp_path / "texts", some_texts(5))
    (folder / "x.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", "utf-8")
    config = folder_config(folder, tmp_path / "cache")
    found = [one for split in ("train", "validation") for one in documents(config, split)]
    assert max(found, key=len) == text


# Somebody else's shards --------------------


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_a_flipped_bit_in_a_prepared_shard_is_found_before_the_first_batch(tmp_path, dataset, mode):
    """Wherever it is, in either split: cached mode tokenizes every record, streaming mode reads each."""
    config = tfds_config(tmp_path, dataset, mode=mode)
    for shard in sorted(dataset.glob("*.array_record*")):
        records = shard.read_bytes().rstrip(b"\0")[:60_000]
        used = max(n for n in range(64, len(records), 64) if any(records[n - 64 : n]))
        for position in range(200, used, used // 9):
            flip(shard, position)
            with pytest.raises(DataError, match="is no sound TFDS dataset"):
                prepare(config, BYTES, progress=False)
            flip(shard, position)
    prepare(config, BYTES, progress=False)  # and what was mended is taken


@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_a_shard_that_changes_in_place_is_found_at_the_next_start(tmp_path, dataset, mode):
    config = tfds_config(tmp_path, dataset, mode=mode)
    first = prepare(config, BYTES, progress=False)
    shard = next(dataset.glob("*validation*"))
    shard.touch()  # another time, the same content
    assert prepare(config, BYTES, progress=False).digest == first.digest
    flip(shard, 500)
    with pytest.raises(DataError, match=r"validation.*changed since it was prepared .*restore it"):
        prepare(config, BYTES, progress=False)
    flip(shard, 500)
    assert prepare(config, BYTES, progress=False).digest == first.digest


def test_a_warm_start_reads_no_shard(tmp_path, dataset, monkeypatch):
    config = tfds_config(tmp_path, dataset)
    first = prepare(config, BYTES, progress=False)
    monkeypatch.setattr("data.sources.shard_hashes.file_digest", None)
    assert prepare(config, BYTES, progress=False).digest == first.digest
    config = tfds_config(tmp_path, dataset, mode="streaming")
    prepare(config, BYTES, progress=False)
    monkeypatch.setattr("data.sources.tfds.Documents.read", None)
    Corpus(config).ensure()


def bad_dataset(tmp_path: Path) -> Path:
    records = [text.encode() for text in some_texts(30)]
    records[17] = b"caf\xe9"
    splits = {"train": map(text_record, records), "validation": [text_record(b"held out")]}
    write_prepared(tmp_path, "bad", splits)
    return tmp_path / "bad" / "1.0.0"


@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_invalid_utf8_in_a_prepared_dataset_stops_or_is_skipped(tmp_path, mode):
    path = bad_dataset(tmp_path)
    with pytest.raises(DataError, match="not UTF-8 at byte 3 of a record"):
        prepare(tfds_config(tmp_path, path, mode=mode), BYTES, progress=False)
    config = tfds_config(tmp_path, path, mode=mode, on_bad_record="skip")
    assert prepare(config, BYTES, progress=False).description["skipped"] == {"utf8": 1}
    kept = [text for number, text in enumerate(some_texts(30)) if number != 17]
    assert list(documents(config, "train")) == kept


def test_tfrecord_without_tensorflow_names_the_command(tmp_path, dataset, monkeypatch):
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name)
    )
    with pytest.raises(DataError, match=r"stored as tfrecord; .*pip install -e '\.\[tensorflow\]'"):
        prepare(tfds_config(tmp_path, dataset), BYTES, progress=False)


def test_a_builder_that_is_not_prepared_says_how_and_download_prepares_it(tmp_path):
    import tensorflow_datasets as tfds

    class OwnCorpus(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict:
            return {"train": self._generate_examples(0, 20), "validation": self._generate_examples(20, 30)}

        def _generate_examples(self, first: int, end: int) -> Any:
            yield from ((number, {"text": some_texts(30)[number]}) for number in range(first, end))

    config = tfds_config(tmp_path, tmp_path / "root", name="own_corpus")
    with pytest.raises(DataError, match=r"does not exist;.*data\.name=own_corpus data\.download=true"):
        prepare(config, BYTES, progress=False)
    config.download = True
    prepared = prepare(config, BYTES, progress=False)
    assert sorted(documents(config, "train")) == sorted(some_texts(30)[:20])
    config.download = False  # it is there now
    assert prepare(config, BYTES, progress=False).digest == prepared.digest
    unknown = tfds_config(tmp_path, tmp_path / "root", name="no_such_corpus", download=True)
    with pytest.raises(DataError, match=r"data\.name=no_such_corpus cannot be downloaded") as caught:
        prepare(unknown, BYTES, progress=False)
    assert "\n" not in str(caught.value)
