"""Tiny corpora, prepared once for all tests of this room."""

import random
from pathlib import Path

import pytest

from data.config import DataConfig, TokenizerConfig
from data.pipeline import Prepared, prepare

BYTES = TokenizerConfig(kind="byte")


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def some_texts(count: int, longest: int = 90, seed: int = 1) -> list[str]:
    """Texts of very different lengths, no two alike, some of them not ASCII."""
    rng = random.Random(seed)
    words = "def return lambda ÄÖ 语言 🙂 x_1 == import".split()
    return [
        f"{number} " + " ".join(rng.choice(words) for _ in range(rng.randrange(longest)))
        for number in range(count)
    ]


def folder_config(folder: Path, cache: Path, **values) -> DataConfig:
    defaults = {"validation_fraction": 0.3, "seq_len": 16, "workers": 1}
    return DataConfig(source="folder", path=str(folder), cache_dir=str(cache), **(defaults | values))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 40 texts, and the cache that its tests share."""
    root = tmp_path_factory.mktemp("corpus")
    return write_texts(root / "texts", some_texts(40)), root / "cache"


@pytest.fixture(scope="session")
def prepared(corpus: tuple[Path, Path]) -> Prepared:
    return prepare(folder_config(*corpus), BYTES, progress=False)


@pytest.fixture(scope="session")
def streamed(corpus: tuple[Path, Path]) -> Prepared:
    return prepare(folder_config(*corpus, mode="streaming"), BYTES, progress=False)
