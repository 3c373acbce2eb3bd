import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data.cache import verify
from data.config import DataConfig, TokenizerConfig
from data.curation.optimize import documents
from data.loading.loader import Loader
from data.pipeline import prepare
from data.sources.corpus import stdlib_root
from data.sources.files import STDLIB_EXCLUDED, in_validation, list_stdlib, read_documents
from data.tokens.bigram import bigram_bits_per_byte
from data.tokens.store import TokenStore
from tests.data.corpora import BYTES, documents_of, folder_config, some_texts, train_of, write_texts

ROOT = Path(__file__).parents[2]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def written(folder: Path) -> set[str]:
    return {path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


def test_splits_hold_every_document_once_by_its_content(corpus):
    config = folder_config(*corpus)
    train, held_out = list(documents(config, "train")), list(documents(config, "validation"))
    assert Counter(train + held_out) == Counter(written(corpus[0]))
    assert all(in_validation(text, 0.3) for text in held_out)
    assert not any(in_validation(text, 0.3) for text in train)


def test_split_stays_when_documents_come_and_go_and_duplicates_stay_together(tmp_path):
    texts = some_texts(40)
    few = write_texts(tmp_path / "few", texts[::2] * 2)
    many = write_texts(tmp_path / "many", texts)
    of_few = {
        split: list(documents(folder_config(few, tmp_path / "c"), split)) for split in ("train", "validation")
    }
    of_many = {split: list(documents(folder_config(many, tmp_path / "c"), split)) for split in of_few}
    for split, found in of_few.items():
        assert set(found) <= set(of_many[split])
        assert set(Counter(found).values()) == {2}


def test_share_held_out_follows_the_fraction():
    share = np.mean([in_validation(f"document {n}", 0.25) for n in range(4000)])
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_every_format_gives_its_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "mixed"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "binary.bin").write_bytes(b"\xff\xfe")
    (folder / "empty.py").write_text("")
    (folder / "a.txt").write_bytes("zeile\r\n语".encode())
    (folder / "deep" / "b.md").write_text("# b")
    (folder / "deep" / "er" / "c.py").write_text("c = 1\n")
    lines = [json.dumps({"text": f"line {n} é", "other": 1}) for n in range(3)]
    (folder / "d.jsonl").write_text("\n".join([lines[0], "", lines[1], json.dumps({"text": ""}), lines[2]]))
    with gzip.open(folder / "e.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "gzip"}) + "\n")
    (folder / "f.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": "zstd"}).encode()))
    table = pyarrow.table({"text": ["parquet 0", None, "parquet 1"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "g.parquet")
    expected = ["zeile\r\n语", "# b", "c = 1\n", *(f"line {n} é" for n in range(3))]
    expected += ["gzip", "zstd", "parquet 0", "parquet 1"]
    config = folder_config(folder, tmp_path / "cache", validation_fraction=0.5)
    found = [text for split in ("train", "validation") for text in documents(config, split)]
    assert sorted(found) == sorted(expected)


def test_text_key_chooses_the_field(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}))
    assert list(read_documents(tmp_path / "a.jsonl", "body")) == ["yes"]


def test_prepare_is_reused_without_building_again(corpus, prepared, monkeypatch):
    import data.pipeline as pipeline

    for name in ("write_store", "train_tokenizer", "building"):
        monkeypatch.setattr(pipeline, name, None)  # would raise if called
    again = prepare(folder_config(*corpus), BYTES, progress=False)
    assert again.digest == prepared.digest
    assert again.description == prepared.description
    assert np.array_equal(train_of(again).tokens, train_of(prepared).tokens)


def test_prepare_builds_anew_when_a_file_changes(tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    config = folder_config(folder, tmp_path / "cache")
    before = prepare(config, BYTES, progress=False)
    (folder / "000.txt").write_text("changed")
    after = prepare(config, BYTES, progress=False)
    assert after.digest != before.digest
    stored = [
        after.tokenizer.decode(ids) for store in (train_of(after), after.validation) for ids in store.framed()
    ]
    assert sorted(stored) == sorted(path.read_text() for path in folder.iterdir())


def test_digest_covers_corpus_and_tokenizer_but_not_place_or_packing(corpus, prepared, tmp_path):
    copy = write_texts(tmp_path / "elsewhere", some_texts(40))
    moved = prepare(folder_config(copy, tmp_path / "cache", packing="none", seq_len=8), BYTES, progress=False)
    assert moved.digest == prepared.digest
    other = prepare(folder_config(*corpus), TokenizerConfig(vocab_size=300), progress=False)
    assert other.digest != prepared.digest
    fraction = prepare(folder_config(*corpus, validation_fraction=0.5), BYTES, progress=False)
    assert fraction.digest != prepared.digest


def test_store_is_the_same_from_one_process_and_from_two_spawned(corpus, tmp_path, monkeypatch):
    import data.tokens.store

    monkeypatch.setattr(data.tokens.store, "JOB_BYTES", 2000)
    stores = []
    for workers in (1, 2):
        config = folder_config(corpus[0], tmp_path / str(workers), workers=workers)
        stores.append(prepare(config, TokenizerConfig(vocab_size=300), progress=False))
    assert len(data.tokens.store._jobs(documents(folder_config(corpus[0], tmp_path / "1"), "train"))) > 2
    one, two = (files_of(train_of(store).path.parent.parent / "tokens") for store in stores)
    assert one == two
    assert stores[0].digest == stores[1].digest


def test_store_counts_its_documents(corpus, prepared):
    texts = [prepared.tokenizer.decode(ids) for ids in train_of(prepared).framed()]
    assert texts == list(documents(folder_config(*corpus), "train"))
    assert train_of(prepared).num_documents == len(texts)
    assert train_of(prepared).num_bytes == sum(len(text.encode()) for text in texts)
    assert train_of(prepared).num_tokens == train_of(prepared).num_bytes + len(
        texts
    )  # one byte a token, and separators
    assert prepared.description["train"]["bytes"] == train_of(prepared).num_bytes


def test_corruption_is_found_said_and_built_again(tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    config = folder_config(folder, tmp_path / "cache")
    first = prepare(config, BYTES, progress=False)
    good = files_of(train_of(first).path)
    for name in good:
        path = train_of(first).path / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name} (is corrupt|is missing or broken|was changed)"):
            TokenStore.open(train_of(first).path)
        again = prepare(config, BYTES, progress=False)
        assert name in again.description["rebuilt"][0]
        assert files_of(train_of(again).path) == good


def test_a_corrupt_corpus_is_built_again_before_streaming(tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    config = folder_config(folder, tmp_path / "cache", mode="streaming")
    first = prepare(config, BYTES, progress=False)
    texts = list(documents_of(first))
    shard = next(documents_of(first).directory.glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:100])
    again = prepare(config, BYTES, progress=False)
    assert "train.array_record" in again.description["rebuilt"][0]
    assert list(documents_of(again)) == texts


def test_leftovers_of_a_killed_preparation_are_swept(corpus, prepared):
    leftover = corpus[1] / "tokens" / ".building-x"
    leftover.mkdir()
    prepare(folder_config(*corpus), BYTES, progress=False)
    assert not leftover.exists()


def test_a_prepared_tfds_directory_is_read_by_path_and_by_name(corpus, prepared, tmp_path):
    directory = documents(folder_config(*corpus), "train").directory
    options: dict[str, Any] = {"source": "tfds", "cache_dir": str(tmp_path), "seq_len": 16, "workers": 1}
    by_path = prepare(DataConfig(path=str(directory), **options), BYTES, progress=False)
    assert train_of(by_path).num_bytes == train_of(prepared).num_bytes
    root = str(directory.parent.parent)
    for name in ("folder_corpus", "folder_corpus:1.0.0", "folder_corpus/1.0.0"):
        by_name = prepare(DataConfig(path=root, name=name, **options), BYTES, progress=False)
        assert by_name.digest == by_path.digest
    slices: dict[str, Any] = {"train_split": "train[25%:]", "validation_split": "train[:25%]"}
    sliced = prepare(DataConfig(path=str(directory), **options, **slices), BYTES, progress=False)
    assert (
        train_of(sliced).num_documents + sliced.validation.num_documents == train_of(prepared).num_documents
    )


def test_given_tokenizer_file_is_used_as_it_is(corpus, prepared, tmp_path):
    prepared.tokenizer.save(tmp_path / "t.json")
    given = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    assert prepare(folder_config(*corpus), given, progress=False).digest == prepared.digest


def test_bigram_is_a_distribution_and_beats_the_uniform_model(prepared, streamed):
    bits = prepared.bigram_bits_per_byte()
    assert 0 < bits < math.log2(257)
    assert prepared.bigram_bits_per_byte() == bits == streamed.bigram_bits_per_byte()
    train = [np.array([2, 0, 1, 0, 2])]
    # Summing 2^-bits over every continuation of a context gives 1, seen contexts and unseen alike.
    for context in range(4):
        probabilities = [
            2 ** -bigram_bits_per_byte(train, [np.array([context, b])], vocab_size=4, validation_bytes=1)
            for b in range(4)
        ]
        assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-9)
        assert min(probabilities) > 0


def test_bigram_by_hand():
    # c(0,1)=1, c(0)=2, followers of 0: {1, 2}; unigram of 1: (1+1)/(4+4).
    value = bigram_bits_per_byte(
        [np.array([2, 0, 1, 0, 2])], [np.array([0, 1])], vocab_size=4, validation_bytes=2
    )
    assert math.isclose(value, -math.log2((1 + 2 * 2 / 8) / (2 + 2)) / 2)


def test_stdlib_is_this_interpreters_source_without_the_excluded_directories():
    files = list_stdlib(stdlib_root())
    names = {path.relative_to(stdlib_root()).as_posix() for path in files}
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not any(STDLIB_EXCLUDED & set(Path(name).parts) for name in names)
    assert all(name.endswith(".py") for name in names)


def test_stdlib_corpus_through_the_whole_room(tmp_path, monkeypatch):
    """The real builder and two spawned workers, on a few packages of the library to keep it short."""
    import data.sources.corpus

    root = tmp_path / "lib"
    for package in ("json", "email", "asyncio"):
        (root / package).mkdir(parents=True)
        for path in (stdlib_root() / package).glob("*.py"):
            (root / package / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(data.sources.corpus, "stdlib_root", lambda: root)
    config = DataConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.2, seq_len=32)
    prepared = prepare(config, TokenizerConfig(vocab_size=512), progress=False)
    assert prepared.description["source"] == "stdlib"
    assert prepared.tokenizer.vocab_size == 512
    batch = Loader(prepared, config, global_batch_size=2, seed=0).batch(0)
    assert batch["tokens"].max() < 512
    verify(Path(prepared.description["documents_path"]))


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_data_imports_no_jax_and_config_imports_nothing_heavy():
    everything = ", ".join(f"data.{path.stem}" for path in (ROOT / "data").glob("*.py"))
    out = run_python(f"import sys, {everything}; print('jax' in sys.modules, 'tensorflow' in sys.modules)")
    assert out.stdout.split() == ["False", "False"], out.stderr
    heavy = "numpy", "tokenizers", "tensorflow_datasets", "rich", "pyarrow"
    out = run_python(f"import sys, data.config; print([m for m in {heavy} if m in sys.modules])")
    assert out.stdout.strip() == "[]", out.stderr


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import data.tokens.store
from data.config import DataConfig, TokenizerConfig
from data.pipeline import prepare

data.tokens.store.JOB_BYTES = 2000
if __name__ == "__main__":
    config = DataConfig(source="folder", path={folder!r}, cache_dir={cache!r}, validation_fraction=0.3)
    print("digest", prepare(config, TokenizerConfig(kind="byte")).digest)
    print("jax", "jax" in sys.modules)
"""


def test_a_guarded_script_prepares_with_spawned_workers_and_a_quiet_terminal(corpus, prepared, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(corpus[0]), cache=str(tmp_path / "cache")))
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    *ours, digest, jax = out.stdout.splitlines()
    assert (digest, jax) == (f"digest {prepared.digest}", "jax False")
    # Our own lines and nothing of tfds, absl or tqdm, and stderr kept for what is wrong.
    assert ours and all(line.startswith("data: ") for line in ours)
    assert out.stderr == ""
