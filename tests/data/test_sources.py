"""The sources behind one interface: what each must hold whatever lies under it."""

import base64
import hashlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import remote
from data.bad_records import KINDS, BadRecords
from data.cache import verify
from data.config import SOURCES as NAMES
from data.config import DataConfig
from data.errors import DataError
from data.files import read_documents
from data.pipeline import prepare
from data.records import read_records, shard_writer, text_record, write_prepared
from data.source_synthetic import LONGEST, Language
from data.sources import SOURCES, Corpus, documents
from tests.data.corpora import BYTES, documents_of, folder_config, some_texts, train_of, write_texts

ROOT = Path(__file__).parents[2]


def test_every_source_has_a_line_in_the_table():
    assert tuple(SOURCES) == NAMES


# Records --------------------


@pytest.mark.parametrize("size", (0, 1, 113, 114, 127, 128, 16_300, 16_384, 3_000_000))
def test_our_record_is_the_one_tfds_serializes(size):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    serializer = ExampleSerializer(features.get_serialized_info())
    text = b"\xc3\xa4" * (size // 2) + b"x" * (size % 2)
    assert text_record(text) == serializer.serialize_example({"text": text})


def test_what_is_written_in_order_is_read_in_order_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("data.records.SHARD_BYTES", 500)
    texts = some_texts(40)
    write_prepared(tmp_path, "x", {"train": (text_record(t.encode()) for t in texts), "validation": []})
    directory = tmp_path / "x" / "1.0.0"
    assert len(list(directory.glob("*train*"))) > 3
    config = DataConfig(source="tfds", path=str(directory), cache_dir=str(tmp_path / "cache"))
    assert list(documents(config, "train")) == texts
    with pytest.raises(DataError, match=r"data\.validation_split=validation is empty"):
        documents(config, "validation")


def test_a_flipped_bit_in_a_shard_is_an_error_or_changes_nothing(tmp_path):
    """ArrayRecord's own checksums: the law that `never silently trained on` stands on."""
    shard, copy = tmp_path / "a", tmp_path / "b"
    rng = random.Random(0)
    records = [rng.randbytes(rng.randrange(1, 300)) for _ in range(30)]
    with shard_writer(shard) as writer:
        for record in records:
            writer.write(record)
    raw = shard.read_bytes()
    # The file ends in a block of padding and the index: most of its length, and none of its records.
    used = len(raw.rstrip(b"\0")) if raw.rstrip(b"\0") != raw else len(raw)
    found = 0
    for position in [*range(0, 9000, 61), *range(max(0, used - 120), used, 3)]:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << rng.randrange(8)
        copy.write_bytes(damaged)
        try:
            assert list(read_records(copy)) == records, position
        except AssertionError:
            raise
        except Exception:
            found += 1
    assert found > 50


# TFDS's shuffle --------------------


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file()
    }


@pytest.mark.parametrize("buffer", (1 << 30, 4000, 1))
def test_our_shuffle_is_the_one_of_tfds_whatever_it_holds_in_memory(corpus, tmp_path, monkeypatch, buffer):
    """`buffer`: all in memory; spilled once; each file split down to single records."""
    from data.tfds_builders import FolderCorpus

    theirs = FolderCorpus(root=str(corpus[0]), validation_fraction=0.3, data_dir=str(tmp_path / "theirs"))
    theirs.download_and_prepare()
    monkeypatch.setattr("data.shuffling.BUFFER", buffer)
    ours = documents(folder_config(corpus[0], tmp_path / "ours"), "train").directory
    assert digests(ours) == digests(Path(theirs.data_dir))
    left = [path for path in (tmp_path / "ours").rglob("*") if "shuffle" in path.name]
    assert not left


def test_shuffle_keeps_integer_keys_in_order_and_finds_duplicates(tmp_path, monkeypatch):
    from tensorflow_datasets.core.shuffle import DuplicatedKeysError

    from data.shuffling import Shuffler

    monkeypatch.setattr("data.shuffling.BUFFER", 50)
    ordered = Shuffler(tmp_path, "salt", disable_shuffling=True)
    for key in (5, 1, 300, 2):
        ordered.add(key, b"x" * 20)
    assert [key for key, _ in ordered] == [1, 2, 5, 300]
    once = Shuffler(tmp_path, "salt", ignore_duplicates=True)
    twice = Shuffler(tmp_path, "salt")
    for shuffler in (once, twice):
        for key, data in (("a", b"first"), ("b", b"b" * 100), ("a", b"again")):
            shuffler.add(key, data)
    assert sorted(data for _, data in once) == [b"b" * 100, b"first"]
    with pytest.raises(DuplicatedKeysError):
        list(twice)


MEMORY = """
import sys, threading
from pathlib import Path
import data.shuffling
from data.config import DataConfig
from data.sources import Corpus

data.shuffling.BUFFER = 1 << 20
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[1:]:
    peak = 0
    Corpus(DataConfig(source="folder", path=folder, cache_dir=folder + "-cache")).ensure()
    print(peak)
done.set()
"""


def test_building_a_corpus_takes_no_more_memory_for_ten_times_the_text(tmp_path):
    """With a buffer of 1 MB, so that 40 MB stand for a corpus that memory could not hold."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    line = b'{"text": "' + b"some words " * 900 + b'%d"}\n'
    for name, count in (("small", 400), ("large", 4000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(b"".join(line % n for n in range(count)))
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    small, large = map(int, out.stdout.split())  # kB
    assert large - small < 12_000, out.stderr


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_record_stops_the_run_and_says_how_to_skip_it(tmp_path, kind):
    with pytest.raises(DataError, match=r"x\.jsonl:1.*, or .*data\.on_bad_record=skip") as caught:
        prepare(folder_with_bad(tmp_path, [kind]), BYTES, progress=False)
    assert "\n" not in str(caught.value)


def test_skipped_records_are_counted_and_said_at_every_start(tmp_path, capsys):
    config = folder_with_bad(tmp_path, [*KINDS, "utf8"], on_bad_record="skip")
    (tmp_path / "texts" / "y.txt").write_bytes(b"caf\xe9")
    counts = {**dict.fromkeys(KINDS, 1), "utf8": 3}
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


@pytest.fixture
def dataset(corpus, tmp_path):
    directory = documents(folder_config(*corpus), "train").directory
    return shutil.copytree(directory, tmp_path / "folder_corpus" / "1.0.0")


def tfds_config(tmp_path, path, **values):
    defaults: dict[str, Any] = {"seq_len": 16, "workers": 1, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(source="tfds", path=str(path), **(defaults | values))


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
    monkeypatch.setattr("data.shard_record.file_digest", None)
    assert prepare(config, BYTES, progress=False).digest == first.digest
    config = tfds_config(tmp_path, dataset, mode="streaming")
    prepare(config, BYTES, progress=False)
    monkeypatch.setattr("data.source_tfds.Documents.read", None)
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


# Synthetic --------------------


def test_a_synthetic_document_is_a_function_of_seed_and_index():
    language = Language(3)
    every = language.documents(np.arange(50))
    assert language.documents(np.array([41, 7])) == [every[41], every[7]]
    assert Language(3).documents(np.arange(50)) == every
    assert Language(4).documents(np.arange(50)) != every
    assert len(set(every)) == 50
    # Frozen: another text would silently be another benchmark.
    assert hashlib.sha256(b"\n".join(every)).hexdigest()[:16] == FROZEN
    assert all(LONGEST // 4 <= len(text.split()) < LONGEST for text in every)


FROZEN = "b0663e98a2b16a3c"


def test_synthetic_text_has_something_to_learn():
    """Zipf's frequencies; the previous word tells much of the next."""
    words = b" ".join(Language(0).documents(np.arange(300))).split()
    values, ids = np.unique(words, return_inverse=True)
    counts = np.sort(np.bincount(ids))[::-1]
    assert counts[0] > 8 * counts[50] > 0
    pairs = np.bincount(ids[:-1] * len(values) + ids[1:])
    pairs = pairs[pairs > 0] / pairs.sum()
    alone = counts / counts.sum()
    entropy, joint = (-(p * np.log2(p)).sum() for p in (alone, pairs))
    assert joint - entropy < 0.8 * entropy


@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_synthetic_through_the_whole_room(tmp_path, mode):
    config = DataConfig(source="synthetic", synthetic_documents=60, cache_dir=str(tmp_path), mode=mode)
    config.workers = 1
    prepared = prepare(config, BYTES, progress=False)
    assert prepared.validation.num_documents == 3
    expected = [text.decode() for text in Language(0).documents(np.arange(20))]
    assert list(documents(config, "train"))[:19] == expected[:19]
    assert documents(config, "validation")[0] == expected[19]
    if mode == "cached":
        assert train_of(prepared).num_documents == 57
    else:
        assert len(documents_of(prepared)) == 57
    verify(Path(prepared.description["documents_path"]))


# What is not installed, or elsewhere --------------------


@pytest.mark.parametrize(
    ("values", "module", "match"),
    [
        ({"source": "hf", "path": "x"}, "datasets", r"pip install -e '\.\[hf\]'"),
        ({"source": "folder", "path": "s3://a/b"}, "s3fs", r"data\.path=s3://a/b .*'\.\[s3\]'"),
        ({"source": "tfds", "path": "gs://a/b"}, "gcsfs", r"data\.path=gs://a/b .*'\.\[gcs\]'"),
        ({"source": "folder", "path": "ftp://a/b"}, "none", r"has the scheme ftp; use s3 or gs://"),
    ],
)
def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch, values, module, match):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(DataError, match=match):
        prepare(DataConfig(cache_dir=str(tmp_path), **values), BYTES, progress=False)


def test_md5_is_taken_where_a_server_tells_one():
    """GCS says it outright; S3's ETag is one unless the object came in parts."""
    md5 = hashlib.md5(b"x", usedforsecurity=False)
    assert remote._md5({"md5Hash": base64.b64encode(md5.digest()).decode()}) == md5.hexdigest()
    assert remote._md5({"ETag": f'"{md5.hexdigest()}"'}) == md5.hexdigest()
    assert remote._md5({"ETag": f'"{md5.hexdigest()}-2"'}) is None
    assert remote._md5({"size": 1}) is None


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"on_bad_record": "skp"}, r"data\.on_bad_record=skp .*did you mean skip"),
        ({"source": "hf"}, r"data\.source=hf needs data\.path"),
        ({"source": "synthetic", "name": "x"}, r"data\.name=x is no seed"),
        ({"source": "synthetic", "synthetic_documents": 19}, r"data\.synthetic_documents=19 .*20 or more"),
    ],
)
def test_impossible_sources(values, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**values)
