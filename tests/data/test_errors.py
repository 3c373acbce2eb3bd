"""Each malformed input: one line that names what is wrong, and nothing left that a later run would take."""

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.pipeline import prepare
from tests.data.corpora import BYTES, folder_config, some_texts, tfds_config, train_of, write_texts

ROOT = Path(__file__).parents[2]


def refuses(tmp_path, config, match, tokenizer=BYTES):
    with pytest.raises(DataError, match=match) as caught:
        prepare(config, tokenizer, progress=False)
    assert "\n" not in str(caught.value)
    cache = tmp_path / "cache"
    left = [path for path in cache.rglob("*") if path.is_dir() and ".building" in path.name]
    assert not left
    return str(caught.value)


def folder_with(tmp_path, name, raw):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    (folder / name).write_bytes(raw)
    return folder_config(folder, tmp_path / "cache")


def test_missing_folder(tmp_path):
    refuses(
        tmp_path, folder_config(tmp_path / "none", tmp_path / "cache"), r"data\.path=.*none does not exist"
    )


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    refuses(tmp_path, folder_config(tmp_path / "file", tmp_path / "cache"), "is not a folder")


@pytest.mark.parametrize("name", (None, "picture.png"))
def test_folder_without_documents(tmp_path, name):
    (tmp_path / "empty").mkdir()
    if name:
        (tmp_path / "empty" / name).write_bytes(b"x")
    refuses(tmp_path, folder_config(tmp_path / "empty", tmp_path / "cache"), r"no documents.*\.parquet")


def test_folder_with_nothing_but_empty_records(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": ""}\n')
    refuses(
        tmp_path, folder_config(folder, tmp_path / "cache"), "data.validation_fraction=0.3 leaves no train"
    )


@pytest.mark.parametrize("name", ("e.txt", "e.md", "e.jsonl", "e.jsonl.gz", "e.jsonl.zst", "e.parquet"))
def test_empty_file(tmp_path, name):
    refuses(tmp_path, folder_with(tmp_path, name, b""), rf"{name} is empty")


def test_unreadable_file(tmp_path):
    config = folder_with(tmp_path, "x.txt", b"x")
    path = tmp_path / "texts" / "x.txt"
    path.unlink()
    path.symlink_to(tmp_path / "gone")  # also unreadable for root, whom permissions do not stop
    refuses(tmp_path, config, r"x\.txt cannot be read \(No such file")


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    refuses(tmp_path, folder_with(tmp_path, "x.txt", b"caf\xe9"), r"x\.txt is not UTF-8 at byte 3")
    good = b'{"text": "a"}\n'
    config = folder_with(tmp_path, "y.jsonl", good + b'{"text": "\xff"}\n')
    os.remove(tmp_path / "texts" / "x.txt")
    refuses(tmp_path, config, rf"y\.jsonl:2 is not UTF-8 at byte {len(good) + 10}")


def test_broken_json_line_is_named(tmp_path):
    refuses(
        tmp_path, folder_with(tmp_path, "x.jsonl", b'{"text": "a"}\n{"text": \n'), r"x\.jsonl:2 is not JSON"
    )


def test_json_line_that_is_no_object(tmp_path):
    refuses(tmp_path, folder_with(tmp_path, "x.jsonl", b'["a"]\n'), r"x\.jsonl:1 is a list")


def test_missing_text_key_says_which_keys_exist(tmp_path):
    config = folder_with(tmp_path, "x.jsonl", b'{"body": "a", "id": 1}\n')
    refuses(tmp_path, config, r"data\.text_key=text is not in .*x\.jsonl:1; its keys are body, id")


def test_text_that_is_no_text(tmp_path):
    refuses(
        tmp_path,
        folder_with(tmp_path, "x.jsonl", b'{"text": 5}\n'),
        r"text_key=text is a int in .*x\.jsonl:1",
    )
    os.remove(tmp_path / "texts" / "x.jsonl")
    config = folder_with(tmp_path, "y.jsonl", b'{"text": "\\ud800"}\n')
    refuses(tmp_path, config, r"y\.jsonl:1 has half a surrogate pair at character 0")


def test_missing_parquet_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    config = folder_with(tmp_path, "x.parquet", b"-")
    refuses(tmp_path, config, r"x\.parquet is not a sound parquet file")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "texts" / "x.parquet")
    refuses(tmp_path, config, r"data\.text_key=text is not in .*x\.parquet; its columns are body")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "texts" / "x.parquet")
    refuses(tmp_path, config, r"data\.text_key=text is int64 in .*x\.parquet")


def test_truncated_archives(tmp_path):
    raw = gzip.compress(b'{"text": "a"}\n' * 100)
    refuses(tmp_path, folder_with(tmp_path, "x.jsonl.gz", raw[:-12]), r"x\.jsonl\.gz is truncated or corrupt")
    refuses(
        tmp_path, folder_with(tmp_path, "x.jsonl.gz", b"no gzip"), r"x\.jsonl\.gz is truncated or corrupt"
    )
    os.remove(tmp_path / "texts" / "x.jsonl.gz")
    refuses(
        tmp_path, folder_with(tmp_path, "x.jsonl.zst", b"no zstd"), r"x\.jsonl\.zst is truncated or corrupt"
    )


def test_a_mended_folder_is_taken_after_a_refusal(tmp_path):
    config = folder_with(tmp_path, "x.txt", b"\xff")
    refuses(tmp_path, config, "not UTF-8")
    (tmp_path / "texts" / "x.txt").write_text("good")
    assert prepare(config, BYTES, progress=False).description["rebuilt"] == []


def test_corpus_smaller_than_a_row(tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(6, longest=3))
    config = folder_config(folder, tmp_path / "cache", seq_len=4096, validation_fraction=0.5)
    refuses(tmp_path, config, r"data\.seq_len=4096 is more than the \d+ tokens of the train split")


def test_empty_validation_split(tmp_path):
    folder = write_texts(tmp_path / "texts", ["only one"])
    config = folder_config(folder, tmp_path / "cache", validation_fraction=0.0001)
    refuses(tmp_path, config, r"data\.validation_fraction=0\.0001 leaves no validation documents; raise it")


def test_bad_tokenizer_file(tmp_path):
    config = folder_with(tmp_path, "x.txt", b"x")
    for raw in (None, b"{}"):
        path = tmp_path / "t.json"
        if raw:
            path.write_bytes(raw)
        refuses(tmp_path, config, r"tokenizer\.path=.*t\.json", TokenizerConfig(kind="file", path=str(path)))


def test_cache_that_cannot_be_written(tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(5))
    (tmp_path / "file").write_text("x")
    refuses(
        tmp_path, folder_config(folder, tmp_path / "file" / "cache"), r"data\.cache_dir=.* cannot be written"
    )


@pytest.mark.parametrize(
    ("limit", "where"),
    [(40_000, "the folder corpus cannot be built"), (200_000, "/tokens/.* cannot be written")],
)
def test_full_disk(tmp_path, limit, where):
    """A limit on file size stands for a disk that fills up: as the corpus is built, as it is tokenized."""
    folder = write_texts(tmp_path / "texts", some_texts(20, longest=3000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        config = folder_config(folder, tmp_path / "cache")
        refuses(tmp_path, config, rf"data\.cache_dir.*{where}.*; free space or choose another")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert prepare(config, BYTES, progress=False).description["rebuilt"] == []


def test_a_script_without_its_guard_is_told_instead_of_waiting_for_ever(tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    script = tmp_path / "main.py"
    script.write_text(UNGUARDED.format(root=str(ROOT), folder=str(folder), cache=str(tmp_path / "cache")))
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert "DataError" in out.stderr
    assert 'put it under if __name__ == "__main__":' in out.stderr
    assert "data.workers=2: a tokenizing process died" in out.stderr


UNGUARDED = """
import sys
sys.path.insert(0, {root!r})
import data.tokens.store
from data.config import DataConfig, TokenizerConfig
from data.pipeline import prepare

data.tokens.store.JOB_BYTES = 2000
config = DataConfig(source="folder", path={folder!r}, cache_dir={cache!r}, validation_fraction=0.3)
prepare(config, TokenizerConfig(kind="byte"))
"""


def test_missing_tfds_dataset(tmp_path, dataset):
    refuses(tmp_path, tfds_config(tmp_path, tmp_path / "none"), r"data\.path=.*none: .* does not exist")
    named = tfds_config(tmp_path, tmp_path, name="wiki40b/en:1.3.0")
    refuses(tmp_path, named, r"data\.name=wiki40b/en:1\.3\.0: .* does not exist")
    refuses(tmp_path, tfds_config(tmp_path, tmp_path), "no readable dataset_info.json")


def test_tfds_without_the_text_key_or_the_split(tmp_path, dataset):
    refuses(
        tmp_path,
        tfds_config(tmp_path, dataset, text_key="body"),
        r"text_key=body is not in .*keys are path, text",
    )
    refuses(
        tmp_path,
        tfds_config(tmp_path, dataset, validation_split="test"),
        r"split test is not in .*validation",
    )


def test_tfds_in_a_format_that_needs_tensorflow(tmp_path, dataset):
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for shard in dataset.glob("*.array_record*"):
        shard.rename(str(shard).replace(".array_record", ".tfrecord"))
    refuses(
        tmp_path,
        tfds_config(tmp_path, dataset),
        "stored as tfrecord; prepare it with file_format=array_record",
    )


@pytest.mark.parametrize("keep", (0, 10, 100, 0.5, -1))
@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_truncated_array_record(tmp_path, dataset, keep, mode, capfd):
    shard = next(dataset.glob("*validation*"))
    raw = shard.read_bytes()
    shard.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    refuses(tmp_path, tfds_config(tmp_path, dataset, mode=mode), "is no sound TFDS dataset")
    assert capfd.readouterr() == ("", "")


def test_damaged_tfds_directories(tmp_path, dataset):
    for name in ("dataset_info.json", "features.json"):
        good = (dataset / name).read_text()
        (dataset / name).write_text("{")
        refuses(tmp_path, tfds_config(tmp_path, dataset), "dataset_info.json|is no sound TFDS dataset")
        (dataset / name).write_text(good)
    next(dataset.glob("*train*")).unlink()
    refuses(tmp_path, tfds_config(tmp_path, dataset), "is no sound TFDS dataset")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"source": "stdlibb"}, r"data\.source=stdlibb .*stdlib, folder, tfds"),
        ({"mode": "cache"}, r"data\.mode=cache .*cached, streaming"),
        ({"packing": "bestfit"}, r"data\.packing=bestfit .*best_fit"),
        ({"seq_len": 1}, r"data\.seq_len=1 .*2 or more"),
        ({"workers": 0}, r"data\.workers=0"),
        ({"prefetch": 0}, r"data\.prefetch=0"),
        ({"validation_fraction": 0.0}, r"data\.validation_fraction=0\.0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        ({"mode": "streaming", "packing": "best_fit"}, r"data\.packing=best_fit .*streaming"),
        ({"source": "folder"}, r"data\.source=folder needs data\.path"),
        ({"source": "tfds"}, r"data\.source=tfds needs data\.path"),
    ],
)
def test_impossible_data_configs(values, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**values)


@pytest.mark.parametrize("values", ({"kind": "bpee"}, {"vocab_size": 256}, {"kind": "file"}))
def test_impossible_tokenizer_configs(values):
    with pytest.raises(ValueError, match=r"^tokenizer\."):
        TokenizerConfig(**values)


def test_json_escapes_do_not_count_as_broken(tmp_path):
    config = folder_with(tmp_path, "x.jsonl", json.dumps({"text": "\U0001f642\u0000"}).encode())
    assert train_of(prepare(config, BYTES, progress=False)).num_documents > 0


def test_a_tilde_that_the_shell_left_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig(source="folder", path="~/texts").path == str(tmp_path / "texts")
    assert TokenizerConfig(kind="file", path="~/t.json").path == str(tmp_path / "t.json")
