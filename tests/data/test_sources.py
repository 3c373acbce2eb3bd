"""The sources behind one interface: what each must hold whatever lies under it."""

import base64
import hashlib
import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.cache import verify
from data.config import SOURCES, DataConfig
from data.curation.optimize import documents
from data.errors import DataError
from data.pipeline import prepare
from data.sources import remote
from data.sources.array_record import read_records, shard_writer, text_record, write_prepared
from data.sources.corpus import Source
from data.sources.synthetic import LONGEST, Language
from tests.data.corpora import BYTES, documents_of, folder_config, some_texts, train_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_has_its_class(kind):
    module, _, name = SOURCES[kind].partition(":")
    found = getattr(importlib.import_module(module), name)
    wanted = [name for name, value in vars(Source).items() if callable(value) and not name.startswith("_")]
    assert all(callable(getattr(found, name)) for name in wanted) and "build" in wanted


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
    monkeypatch.setattr("data.sources.array_record.SHARD_BYTES", 500)
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
    from data.sources.tfds_builders import FolderCorpus

    theirs = FolderCorpus(root=str(corpus[0]), validation_fraction=0.3, data_dir=str(tmp_path / "theirs"))
    theirs.download_and_prepare()
    monkeypatch.setattr("data.sources.shuffling.BUFFER", buffer)
    ours = documents(folder_config(corpus[0], tmp_path / "ours"), "train").directory
    assert digests(ours) == digests(Path(theirs.data_dir))
    left = [path for path in (tmp_path / "ours").rglob("*") if "shuffle" in path.name]
    assert not left


def test_shuffle_keeps_integer_keys_in_order_and_finds_duplicates(tmp_path, monkeypatch):
    from tensorflow_datasets.core.shuffle import DuplicatedKeysError

    from data.sources.shuffling import Shuffler

    monkeypatch.setattr("data.sources.shuffling.BUFFER", 50)
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
import data.sources.shuffling
from data.config import DataConfig
from data.sources.corpus import Corpus

data.sources.shuffling.BUFFER = 1 << 20
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
        ({"source": "folder", "path": "ftp://a/b"}, "none", "has the scheme ftp; use s3://, gs:// or a path"),
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
