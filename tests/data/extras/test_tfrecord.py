"""TFRecord, written by TFDS with the real TensorFlow, against the same dataset written as ArrayRecord."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.curation.optimize import documents
from data.errors import DataError
from data.pipeline import prepare
from data.sources.array_record import read_records
from data.sources.corpus import Corpus
from data.sources.tfrecord import TFRecordReader
from tests.data.corpora import BYTES, some_texts, train_of
from tests.data.extras import require

# protobuf 6.33 warns of what tfds's copy of an older json_format does.
pytestmark = pytest.mark.filterwarnings("ignore:label.* is deprecated")


def write_dataset(root: Path, file_format: str) -> Path:
    """Several shards a split, records long and short, some of them not ASCII."""
    require("tensorflow", "tensorflow")
    import tensorflow_datasets as tfds

    texts = [*some_texts(60, longest=400), "", "x" * 300_000]

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict:
            return {"train": self._examples(texts[8:]), "validation": self._examples(texts[:8])}

        def _generate_examples(self) -> Any:
            raise NotImplementedError

        def _examples(self, some: list[str]) -> Any:
            yield from ((f"key {n}", {"text": text, "id": n}) for n, text in enumerate(some))

    builder = Written(data_dir=str(root), file_format=file_format)
    shards = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=shards)
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    return {kind: write_dataset(root / kind, kind) for kind in ("tfrecord", "array_record")}


def config_of(path: Path, cache: Path, **values: Any) -> DataConfig:
    defaults: dict[str, Any] = {"seq_len": 16, "workers": 1}
    return DataConfig(source="tfds", path=str(path), cache_dir=str(cache), **(defaults | values))


def tokens_of(prepared: Any) -> list[str]:
    stores = (train_of(prepared), prepared.validation)
    return [hashlib.sha256((one.path / "tokens.bin").read_bytes()).hexdigest() for one in stores]


def test_tfrecord_reads_byte_identically_to_array_record(written, tmp_path):
    assert len(list(written["tfrecord"].glob("*train.tfrecord-0000?-of-00003"))) == 3
    configs = {kind: config_of(path, tmp_path / kind) for kind, path in written.items()}
    texts = {
        kind: [list(documents(config, split)) for split in ("train", "validation")]
        for kind, config in configs.items()
    }
    assert texts["tfrecord"] == texts["array_record"]
    assert sum(map(len, texts["tfrecord"])) == 62
    prepared = {kind: prepare(config, BYTES, progress=False) for kind, config in configs.items()}
    assert tokens_of(prepared["tfrecord"]) == tokens_of(prepared["array_record"])
    # Not the texts alone: every record, with the fields that nobody reads, shard by shard.
    copy = Path(Corpus(configs["tfrecord"]).split("train").directory)
    for shard in sorted(written["array_record"].glob("*.array_record*")):
        assert list(read_records(copy / shard.name)) == list(read_records(shard))
    again = prepare(configs["tfrecord"], BYTES, progress=False)
    assert (again.digest, again.description["rebuilt"]) == (prepared["tfrecord"].digest, [])


def test_a_split_that_is_not_there_is_named_before_anything_is_copied(written, tmp_path):
    config = config_of(written["tfrecord"], tmp_path, validation_split="test")
    with pytest.raises(DataError, match=r"split test is not in .*train, validation"):
        documents(config, "validation")


def damaged(raw: bytes) -> dict[str, bytes]:
    """A TFRecord file with each kind of damage. A record is: length, its crc, the bytes, their crc."""

    def flipped(position: int) -> bytes:
        return bytes([*raw[:position], raw[position] ^ 1, *raw[position + 1 :]])

    first = 16 + int.from_bytes(raw[:8], "little")
    found = {f"flipped at {position}": flipped(position) for position in (1, 9, 40, first - 2, first + 3)}
    return found | {"cut": raw[:-5], "cut in a length": raw[: first + 4]}


def test_the_reader_finds_every_kind_of_damage_and_goes_on(written, tmp_path):
    require("tensorflow", "tensorflow")
    shard = next(written["tfrecord"].glob("*train*-00001-of-*"))
    with TFRecordReader() as reader:
        whole = list(reader.read(shard))
        for name, raw in damaged(shard.read_bytes()).items():
            (tmp_path / "x").write_bytes(raw)
            try:
                found = list(reader.read(tmp_path / "x"))
            except ValueError as error:
                assert str(error).startswith("x: ") and "\n" not in str(error), name
            else:  # an end too early, without a word: then dataset_info.json's count tells (`copy_prepared`)
                assert len(found) < len(whole) and found == whole[: len(found)], name
        with pytest.raises(ValueError, match="^none: "):
            list(reader.read(tmp_path / "none"))
        assert list(reader.read(shard)) == whole
        reader._child.kill()
        with pytest.raises(ValueError, match="the reader died at "):
            list(reader.read(shard))


@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_damaged_tfrecord_stops_before_the_first_batch(written, tmp_path, mode):
    """A flipped bit; and a file cut between two records, which its own checksums do not notice."""
    directory = Path(shutil.copytree(written["tfrecord"], tmp_path / "written" / "1.0.0"))
    shard = next(directory.glob("*train*-00001-of-*"))
    raw = shard.read_bytes()
    between = raw[: 16 + int.from_bytes(raw[:8], "little")]
    shard.write_bytes(between if mode == "cached" else damaged(raw)["flipped at 40"])
    match = "holds 1 records, dataset_info.json says" if mode == "cached" else "corrupted record"
    with pytest.raises(DataError, match=f"is no sound TFDS dataset.*{match}") as caught:
        prepare(config_of(directory, tmp_path / "cache", mode=mode), BYTES, progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob(".building*"))


def test_the_trainer_never_imports_tensorflow(written, tmp_path):
    """In a process of its own, since this one has imported it to write the dataset."""
    code = f"""
import sys
from data.config import DataConfig
from data.sources.tfrecord import TFRecordReader
from data.curation.optimize import documents
config = DataConfig(source="tfds", path={str(written["tfrecord"])!r}, cache_dir={str(tmp_path)!r})
print(len(documents(config, "train")), "tensorflow" in sys.modules)
"""
    root = Path(__file__).parents[3]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["54", "False"], out.stderr
    assert out.stderr == ""
