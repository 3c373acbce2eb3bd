"""Corpora that grow: what is there stays as it is, old runs find the old one, new ones the new."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from artifacts.directory import RunDirectory
from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.loading.loader import Loader
from data.pipeline import follow, prepare
from data.prepared import Prepared
from data.tokens.store import TokenStore
from scripts.prepare_data import run
from tests.data.corpora import BYTES, folder_config, some_texts, train_of, write_texts
from training.setup import prepare_together

TEXTS = some_texts(40)
BPE = TokenizerConfig(vocab_size=300)


def add(folder: Path, texts: list[str], first: int) -> None:
    for number, text in enumerate(texts, first):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")


def stamps(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of writing and content of every file but the lock."""
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def texts_of(prepared: Prepared) -> list[str]:
    stores = train_of(prepared), prepared.validation
    return sorted(prepared.tokenizer.decode(ids) for store in stores if store for ids in store.framed())


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return folder_config(write_texts(tmp_path / "texts", TEXTS[:20]), tmp_path / "cache")


def grow(config: DataConfig, **options: Any) -> Prepared:
    return prepare(config, BPE, progress=False, **options)


def test_appending_touches_nothing_and_tokenizes_only_what_is_new(config, tmp_path, monkeypatch):
    import data.pipeline

    old = grow(config)
    before = stamps(tmp_path / "cache")
    add(tmp_path / "texts", TEXTS[20:30], 20)
    written, inner = [], data.pipeline.write_store

    def counted(directory, documents, *args, **values):
        written.extend(documents)
        inner(directory, documents, *args, **values)

    monkeypatch.setattr(data.pipeline, "write_store", counted)
    new = grow(config, append=True)
    assert sorted(written) == sorted(TEXTS[20:30])
    assert {name: now for name, now in stamps(tmp_path / "cache").items() if name in before} == before
    assert texts_of(new) == sorted(TEXTS[:30])
    assert new.tokenizer.digest == old.tokenizer.digest  # the first corpus's: none is trained anew
    assert new.digest != old.digest
    assert new.description["generation"] == 1
    # A third one, on top of the second; and nothing to do for a fourth.
    add(tmp_path / "texts", TEXTS[30:], 30)
    third = grow(config, append=True)
    assert texts_of(third) == sorted(TEXTS) and third.description["generation"] == 2
    written.clear()
    assert grow(config, append=True).digest == third.digest and not written


def test_old_documents_keep_their_place_and_batches_hold_old_and_new(config, tmp_path):
    old = grow(config)
    add(tmp_path / "texts", TEXTS[20:], 20)
    new = grow(config, append=True)
    count = train_of(old).num_documents
    for index in range(count):
        assert np.array_equal(train_of(new).document(index), train_of(old).document(index))
    batches = Loader(new, config, global_batch_size=4, seed=0)
    rows = -(-train_of(new).num_tokens // config.seq_len)
    seen: list[int] = []
    for step in range(-(-rows // 4)):
        batch = batches.batch(step, slice(0, min(4, rows - 4 * step)))
        seen += batch["targets"][batch["loss_weights"] > 0].tolist()
    targets = np.concatenate([ids[1:] for ids in train_of(new).framed()])
    assert np.array_equal(np.sort(seen), np.sort(targets))


def test_each_generation_is_found_again(config, tmp_path):
    first = grow(config)
    add(tmp_path / "texts", TEXTS[20:30], 20)
    second = grow(config, append=True)
    before = stamps(tmp_path / "cache")
    assert grow(config).digest == second.digest
    assert grow(config, wanted=first.digest).digest == first.digest
    assert grow(DataConfig(**{**vars(config), "generation": 0})).digest == first.digest
    with pytest.raises(DataError, match=r"data\.generation=2 is not there: .* generations 0 to 1"):
        grow(DataConfig(**{**vars(config), "generation": 2}))
    assert follow(second.facts()).digest == second.digest
    assert np.array_equal(train_of(follow(second.facts())).starts, train_of(second).starts)
    assert stamps(tmp_path / "cache") == before
    # Files that were never appended make another corpus, as they always did, and leave the old ones findable.
    add(tmp_path / "texts", TEXTS[30:], 30)
    assert grow(config).digest not in (first.digest, second.digest)
    assert grow(config, wanted=second.digest).digest == second.digest


@pytest.mark.parametrize("what", ("changed", "removed"))
def test_old_files_that_are_no_longer_the_same_are_named(config, tmp_path, what):
    grow(config)
    add(tmp_path / "texts", TEXTS[20:], 20)
    before = stamps(tmp_path / "cache")
    (tmp_path / "texts" / "003.txt").unlink()
    if what == "changed":
        (tmp_path / "texts" / "003.txt").write_text("changed")
    with pytest.raises(DataError, match=rf"--append: .* were {what}: 003\.txt; put them back"):
        grow(config, append=True)
    assert stamps(tmp_path / "cache") == before


def test_appending_to_nothing_and_to_what_cannot_grow_is_refused(config, tmp_path):
    with pytest.raises(DataError, match="--append: nothing of this folder has been prepared"):
        grow(config, append=True)
    grow(config)
    with pytest.raises(DataError, match="nothing of this folder .* this tokenizer"):
        prepare(config, BYTES, progress=False, append=True)
    with pytest.raises(DataError, match=r"--append needs data\.source=folder and data\.mode=cached"):
        grow(DataConfig(**{**vars(config), "mode": "streaming"}), append=True)
    with pytest.raises(ValueError, match=r"data\.generation=0 needs data\.source=folder"):
        DataConfig(generation=0)


def test_a_split_to_which_nothing_came_stays(config, tmp_path):
    old = grow(config)
    new_text = next(text for text in TEXTS[20:] if held_out(text) is False)
    add(tmp_path / "texts", [new_text], 20)
    new = grow(config, append=True)
    assert train_of(new).num_documents == train_of(old).num_documents + 1
    assert [ids.tolist() for ids in new.validation.framed()] == [
        ids.tolist() for ids in old.validation.framed()
    ]
    assert grow(config).digest == new.digest


def held_out(text: str) -> bool:
    from data.sources.files import in_validation

    return in_validation(text, 0.3)


def test_a_flipped_byte_in_an_old_generation_is_found_and_only_that_is_made_again(config, tmp_path):
    old = grow(config)
    add(tmp_path / "texts", TEXTS[20:], 20)
    new = grow(config, append=True)
    good = texts_of(new)
    path = train_of(old).path / "tokens.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"tokens\.bin is corrupt"):
        TokenStore.open(train_of(new).path)
    again = grow(config)
    assert len(again.description["rebuilt"]) == 1 and "tokens.bin" in again.description["rebuilt"][0]
    assert texts_of(again) == good and again.digest == new.digest


def test_a_broken_record_of_generations_is_named(config, tmp_path):
    grow(config)
    record = next((tmp_path / "cache" / "corpora").glob("*.json"))
    record.write_text(record.read_text().replace("000.txt", "001.txt"))
    with pytest.raises(DataError, match=rf"{record.name} is broken"):
        grow(config)


def test_a_run_that_goes_on_takes_its_generation_and_a_new_one_the_newest(config, tmp_path):
    """By the digest that the run's manifest holds, as `training.setup.compose` hands it on."""
    old = grow(config)
    add(tmp_path / "texts", TEXTS[20:], 20)
    new = grow(config, append=True)
    run = RunDirectory(tmp_path / "run", {})
    both = SimpleNamespace(data=config)
    assert prepare_together(both, BPE, run.data_digest).digest == new.digest
    run._manifest = {"data": {"digest": old.digest}}
    again = prepare_together(both, BPE, run.data_digest)
    assert again.digest == old.digest and texts_of(again) == sorted(TEXTS[:20])


def test_the_script_appends(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["+experiment=debug", "data=folder", "data.path=texts", "data.cache_dir=cache", "data.seq_len=16"]
    words += ["data.validation_fraction=0.3"]
    assert run([*words, "--append"]) == 2
    assert "run once without --append" in capsys.readouterr().err
    for more in ([], ["--append"]):
        assert run([*words, *more]) == 0
        add(tmp_path / "texts", TEXTS[20:], 20)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = [int(row[1]) for row in rows if row[0] in ("train", "validation")]
    assert sum(counts[:2]) == 20 and sum(counts[2:]) == 40
