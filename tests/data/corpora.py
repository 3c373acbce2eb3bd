"""Tiny corpora for the tests of this room."""

import random
from pathlib import Path
from typing import Any

from data.config import DataConfig, TokenizerConfig
from data.prepared import Prepared
from data.sources.documents import Documents
from data.tokens.store import TokenStore

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


def folder_config(folder: Path, cache: Path, **values: Any) -> DataConfig:
    defaults: dict[str, Any] = {"validation_fraction": 0.3, "seq_len": 16, "workers": 1}
    return DataConfig(source="folder", path=str(folder), cache_dir=str(cache), **(defaults | values))


def train_of(prepared: Prepared) -> TokenStore:
    assert prepared.train is not None
    return prepared.train


def documents_of(prepared: Prepared) -> Documents:
    assert prepared.documents is not None
    return prepared.documents


def tfds_config(tmp_path: Path, path: Path, **values: Any) -> DataConfig:
    defaults: dict[str, Any] = {"seq_len": 16, "workers": 1, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(source="tfds", path=str(path), **(defaults | values))
