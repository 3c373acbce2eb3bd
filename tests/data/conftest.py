"""A corpus prepared once for all tests of this room, in both modes."""

import shutil
from pathlib import Path

import pytest

from data.curation.optimize import documents
from data.pipeline import prepare
from data.prepared import Prepared
from tests.data.corpora import BYTES, folder_config, some_texts, write_texts


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


@pytest.fixture
def dataset(corpus: tuple[Path, Path], tmp_path: Path) -> Path:
    """A private copy of a prepared TFDS directory."""
    directory = documents(folder_config(*corpus), "train").directory
    return shutil.copytree(directory, tmp_path / "folder_corpus" / "1.0.0")
