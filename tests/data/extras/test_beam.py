"""Stores made by Apache Beam: the bytes that this machine's own processes make."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import data.tokens.store
from data.config import TokenizerConfig
from data.errors import DataError
from data.pipeline import prepare
from data.tokens.beam import beam_engine
from data.tokens.shards import local_engine
from scripts.prepare_data import beam_options
from tests.data.corpora import BYTES, folder_config, some_texts, train_of, write_texts
from tests.data.extras import require

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def beam(monkeypatch):
    require("apache_beam", "beam")
    monkeypatch.setattr(data.tokens.store, "JOB_BYTES", 1000)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.filterwarnings("ignore")  # Beam's and protobuf's own
def test_beam_makes_the_same_bytes_and_only_the_missing_shards(corpus, prepared, tmp_path):
    engine = beam_engine(beam_options("direct", []))
    config = replace(folder_config(*corpus), cache_dir=str(tmp_path / "cache"))
    handed: list[list[int]] = []

    def dies(work, shards):
        yield from local_engine(1)(work, {number: shards[number] for number in (0, 2)})
        raise KeyboardInterrupt

    def counted(work, shards):
        handed.append(list(shards))
        yield from engine(work, shards)

    with pytest.raises(KeyboardInterrupt):
        prepare(config, BYTES, progress=False, engine=dies)
    ours = prepare(config, BYTES, progress=False, engine=counted)
    assert handed[0][:2] == [1, 3]
    for split in ("train", "validation"):
        mine, theirs = (getattr(done, split).path for done in (ours, prepared))
        assert files_of(mine) == files_of(theirs)


@pytest.mark.filterwarnings("ignore")
def test_a_truncated_corpus_stops_the_pipeline_with_our_own_line(corpus, prepared, tmp_path):
    config = folder_config(write_texts(tmp_path / "texts", some_texts(20)), tmp_path / "cache")
    tokens = train_of(prepare(config, BYTES, progress=False)).path
    documents = Path(prepare(config, BYTES, progress=False).description["documents_path"])
    shard = next(documents.rglob("*train.array_record*"))

    def late(work, shards):  # the corpus breaks only once the pipeline reads it
        shard.write_bytes(shard.read_bytes()[:50])
        yield from beam_engine(beam_options("direct", []))(work, shards)

    with pytest.raises(DataError, match="no sound TFDS dataset|the Beam pipeline failed") as caught:
        prepare(config, TokenizerConfig(vocab_size=300), progress=False, engine=late)
    assert "\n" not in str(caught.value)
    assert tokens.exists()


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_runner_is_one_line():
    with pytest.raises(DataError, match="NoSuchRunner"):
        next(iter(beam_engine(beam_options("NoSuchRunner", []))(None, {0: range(1)})))


def test_the_script_takes_a_runner_and_its_options(corpus, prepared, tmp_path):
    words = ["+experiment=debug", "data=folder", f"data.path={corpus[0]}", "data.validation_fraction=0.3"]
    words += ["tokenizer=byte", f"data.cache_dir={tmp_path}/cache", "data.seq_len=16", "--runner", "direct"]
    words += ["--runner-option", "direct_num_workers=2"]
    words += ["--runner-option", "direct_running_mode=multi_processing"]
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *words]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=150)
    assert out.returncode == 0, out.stderr
    path = re.search(r"^train: (.*)$", out.stdout, re.MULTILINE)
    assert path and files_of(Path(path[1])) == files_of(train_of(prepared).path)
