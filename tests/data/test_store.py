"""Stores made in shards: the same bytes whatever happened on the way, and read as one array."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.tokens.shards
import data.tokens.store
from data.config import TokenizerConfig
from data.curation.optimize import documents
from data.errors import DataError
from data.loading.loader import Loader
from data.pipeline import follow, prepare
from data.tokens.encoding import Encoded, TextEncoder, TextEncoding
from data.tokens.joined_memmap import ALIGN, first_entries, mapped
from data.tokens.store import TokenStore, write_store
from data.tokens.tokenizer import train_tokenizer
from tests.data.corpora import BYTES, folder_config, some_texts, train_of, write_texts

ROOT = Path(__file__).parents[2]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data.tokens.store, "JOB_BYTES", 1000)


@dataclass(frozen=True)
class OddsOnly(TextEncoding):
    """Weights entries by the parity of their ids."""

    def open(self) -> "OddsEncoder":
        return OddsEncoder(super().open().tokenizer)


class OddsEncoder(TextEncoder):
    weighted = True

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [Encoded(one.ids, (one.ids % 2).astype(np.uint8)) for one in super().encode_batch(texts)]


def written(directory: Path, corpus, encoding=TextEncoding, **values) -> dict[str, bytes]:
    directory.mkdir(exist_ok=True)
    tokenizer = directory.parent / "tokenizer.json"
    train_tokenizer([], BYTES).save(tokenizer)
    found = documents(folder_config(*corpus), "train")
    write_store(directory, found, encoding(tokenizer), **{"workers": 1, "about": {"inputs": "x"}, **values})
    return files_of(directory)


def test_bytes_are_those_of_the_first_version(corpus, prepared):
    """Digests of what the store of this corpus was before it was made in shards."""
    found = {
        name: hashlib.sha256(raw).hexdigest()[:16] for name, raw in files_of(train_of(prepared).path).items()
    }
    assert found == FIRST


FIRST = {
    "manifest.json": "e77d3843d882bed1",
    "offsets.npy": "909e56ee3482988b",
    "token_bytes.npy": "26d9510e7f6dbb4b",
    "tokens.bin": "a537a09f67570e8a",
}


def test_a_weighted_store_has_a_weight_for_each_entry(corpus, tmp_path, small_shards):
    plain = written(tmp_path / "plain", corpus)
    about: dict = {"inputs": "x"}
    odds = written(tmp_path / "odds", corpus, OddsOnly, about=about)
    tokens = np.frombuffer(plain["tokens.bin"], about["dtype"])
    assert odds.pop("weights.bin") == (tokens % 2).astype(np.uint8).tobytes()
    assert odds == plain


def test_several_files_read_as_the_one(corpus, prepared, tmp_path, monkeypatch, small_shards):
    monkeypatch.setattr(data.tokens.store, "FILE_BYTES", 4000)
    config = replace(folder_config(*corpus), cache_dir=str(tmp_path / "cache"))
    parts = prepare(config, BYTES, progress=False)
    one, several = train_of(prepared), train_of(parts)
    names = sorted(path.name for path in several.path.glob("tokens*"))
    assert len(names) > 2 and names[0] == f"tokens-00000-of-{len(names):05d}.bin"
    assert b"".join((several.path / name).read_bytes() for name in names) == one.tokens.tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(one.framed(), several.framed(), strict=True))
    assert np.array_equal(one.lengths, several.lengths) and one.num_tokens == several.num_tokens
    for packing in ("concat", "best_fit"):
        loaders = [
            Loader(store, replace(config, packing=packing), global_batch_size=7, seed=3)
            for store in (one, several)
        ]
        for step in range(4):
            a, b = (loader.batch(step) for loader in loaders)
            assert all(np.array_equal(a[key], b[key]) for key in a)
    (several.path / names[1]).write_bytes(b"\0" * (several.path / names[1]).stat().st_size)
    with pytest.raises(DataError, match=f"{names[1]} is corrupt"):
        TokenStore.open(several.path)


def test_mapped_files_begin_where_they_are_said_to(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1 << 16, size, dtype=np.uint16) for size in (5, ALIGN, 3 * ALIGN + 1, 1)]
    paths = [tmp_path / str(number) for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        array.tofile(path)
    counts = [len(array) for array in arrays]
    together = mapped(paths, counts, np.dtype("<u2"))
    for array, first in zip(arrays, first_entries(counts), strict=True):
        assert np.array_equal(together[first : first + len(array)], array)
    with pytest.raises(ValueError):
        together[0] = 1
    paths[1].write_bytes(b"short")
    with pytest.raises(DataError, match="1 has not the"):
        mapped(paths, counts, np.dtype("<u2"))


def counting(made: list[int]):
    inner = data.tokens.shards.local_engine(1)

    def engine(work, shards):
        made.extend(shards)
        return inner(work, shards)

    return engine


@pytest.mark.parametrize("harm", ("flip", "cut", "lost", "record"))
def test_only_sound_shards_are_taken_over(corpus, tmp_path, small_shards, harm):
    whole = written(tmp_path / "whole", corpus)
    made: list[int] = []

    def dies(work, shards):
        for number, record in enumerate(counting(made)(work, shards)):
            yield record
            if number == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "again", corpus, engine=dies)
    journal = tmp_path / "again" / "shards"
    shard = journal / ("00002.json" if harm == "record" else "00002.tokens")
    raw = shard.read_bytes()
    if harm == "lost":
        shard.unlink()
    else:
        shard.write_bytes({"flip": bytes([raw[0] ^ 1]) + raw[1:], "cut": raw[:-2], "record": b"{"}[harm])
    total, made[:] = len(made), []
    assert written(tmp_path / "again", corpus, engine=counting(made)) == whole
    assert made == [2, *range(6, total)]


def test_shards_of_other_inputs_are_thrown_away(corpus, tmp_path, small_shards):
    def dies(work, shards):
        yield from data.tokens.shards.local_engine(1)(work, {0: shards[0]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "store", corpus, engine=dies)
    made: list[int] = []
    written(tmp_path / "store", corpus, engine=counting(made), about={"inputs": "another tokenizer"})
    assert made[0] == 0


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import data.tokens.shards, data.tokens.store
from data.config import DataConfig, TokenizerConfig
from data.pipeline import prepare

data.tokens.store.JOB_BYTES = 1000
if __name__ == "__main__":
    config = DataConfig(
        source="folder", path={folder!r}, cache_dir={cache!r}, validation_fraction=0.3, workers=2
    )
    prepare(config, TokenizerConfig(kind="byte"))
else:  # a worker, slow enough to be killed in mid-work
    import time
    write = data.tokens.shards.write_shard
    def slowly(*args):
        time.sleep(0.02)
        return write(*args)
    data.tokens.shards.write_shard = slowly
"""


def test_a_preparation_killed_three_times_ends_with_the_same_bytes(corpus, prepared, tmp_path):
    """SIGKILL of the whole process group, each time a few shards later; no finished shard is made again."""
    script, cache = tmp_path / "main.py", tmp_path / "cache"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(corpus[0]), cache=str(cache)))
    seen: dict[Path, tuple[int, int]] = {}
    for finished in (1, 3, 6):
        process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
        try:
            records = wait_for_records(process, cache, finished)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert {path: stamp for path, stamp in records.items() if path in seen} == seen
        seen = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in records}
    again = prepare(replace(folder_config(*corpus), cache_dir=str(cache)), BYTES, progress=False)
    for split in ("train", "validation"):
        ours, theirs = (getattr(done, split).path for done in (again, prepared))
        assert files_of(ours) == files_of(theirs)
    assert not list(cache.glob("*/.*"))


def wait_for_records(process: subprocess.Popen, cache: Path, count: int) -> dict[Path, tuple[int, int]]:
    while process.poll() is None:
        found = sorted(cache.glob("tokens/.partial-*-train/shards/*.json"))
        if len(found) >= count:
            return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}
        time.sleep(0.005)
    raise AssertionError(f"ended with {process.returncode} before it was killed")


def test_a_store_of_another_tokenizer_in_its_place_is_not_used(corpus, tmp_path):
    """Whole by its own manifest, under the right name, and yet not what the name says."""
    config = folder_config(write_texts(tmp_path / "texts", some_texts(20)), tmp_path / "cache")
    right = prepare(config, BYTES, progress=False)
    good = files_of(train_of(right).path)
    other = prepare(config, TokenizerConfig(vocab_size=300), progress=False)
    shutil.rmtree(train_of(right).path)
    shutil.copytree(train_of(other).path, train_of(right).path)
    again = prepare(config, BYTES, progress=False)
    assert "with another tokenizer" in again.description["rebuilt"][0]
    assert files_of(train_of(again).path) == good


def test_a_process_that_follows_refuses_another_tokenizer(prepared, tmp_path):
    facts = json.loads(json.dumps(prepared.facts()))
    train_tokenizer(some_texts(20), TokenizerConfig(vocab_size=300)).save(tmp_path / "tokenizer.json")
    facts["description"]["tokenizer_path"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="is another tokenizer"):
        follow(facts)


def test_a_corpus_shuffled_through_files_is_the_one_shuffled_in_memory(
    corpus, prepared, tmp_path, monkeypatch
):
    import data.sources.shuffling

    monkeypatch.setattr(data.sources.shuffling, "BUFFER", 1500)
    config = replace(folder_config(*corpus), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        assert list(documents(config, split)) == list(documents(folder_config(*corpus), split))
    assert not list(tmp_path.rglob(".shuffle-*"))


class Same:
    """As many documents as one likes, all of 4 kB."""

    def __init__(self, count: int):
        self.count, self.num_bytes = count, 4000 * count

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> list[str]:
        return ["x" * 4000] * len(indices)


@dataclass(frozen=True)
class Letters(TextEncoding):
    """Code points for ids: no time goes into it."""

    def open(self) -> "LetterEncoder":
        return LetterEncoder(super().open().tokenizer)


class LetterEncoder(TextEncoder):
    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [Encoded(np.frombuffer(text.encode(), np.uint8).astype(np.uint16)) for text in texts]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Sixteen times the documents: what is held at a time is one block of 2 MB, in its several forms."""
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([], BYTES).save(tokenizer)
    peaks = []
    for count in (1000, 16000):
        directory = tmp_path / str(count)
        directory.mkdir()
        tracemalloc.start()
        texts: Any = Same(count)
        write_store(directory, texts, Letters(tokenizer), workers=1, about={"inputs": "x"})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (directory / "tokens.bin").stat().st_size == count * 8000
    assert peaks[1] - peaks[0] < 2 << 20
