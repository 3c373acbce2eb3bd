"""Documents by index, whatever they come from. TFDS is the front door of all three sources.

`stdlib` and `folder` are built on the spot by `data.tfds_builders` into the cache; `tfds` is a directory that
somebody prepared. From there on they are the same thing: ArrayRecord files with random access.
"""

import contextlib
import io
import json
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.cache import CorruptCache, building, digest_of, verify
from data.chat import FORMAT as CHAT_FORMAT
from data.chat import list_chat
from data.chat_template import ChatTemplate
from data.config import DataConfig
from data.errors import DataError
from data.files import fingerprint, list_folder, list_stdlib
from data.shuffle import bounded


class Documents(Sequence):
    """One split of a prepared TFDS directory: `documents[i]` is a text. Opened when asked; picklable."""

    def __init__(self, directory: Path, split: str, text_key: str):
        self.directory = Path(directory)
        self.split = split
        self.text_key = text_key
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # workers open their own

    def __len__(self) -> int:
        return len(self._opened())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.read(range(*index.indices(len(self))))
        if not 0 <= index < len(self):  # Sequence stops iterating at an IndexError
            raise IndexError(f"document {index} of {len(self)}")
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[str]:
        """Return the texts at `indices`. Raises DataError where the files are truncated or corrupt."""
        try:
            records = self._opened().__getitems__(list(indices))
        except DataError:
            raise
        except Exception as error:
            raise self._broken(error) from None
        return [self._text(record[self.text_key]) for record in records]

    @property
    def num_bytes(self) -> int:
        """Bytes of the records as TFDS counted them, 0 where it did not: only good for sizing work."""
        return int(self._builder().info.splits[self.split].num_bytes or 0)

    def _text(self, value: Any) -> str:
        if value is None:  # what tfds gives where a shard was cut at a block's edge
            raise self._broken(DataError("a record is missing"))
        if not isinstance(value, bytes):
            raise DataError(
                f"data.text_key={self.text_key} holds no text in {self.directory}; choose another key"
            )
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.directory} holds text that is not UTF-8 at byte {error.start} of a record"
            ) from None

    def _builder(self) -> Any:
        with quiet():
            import tensorflow_datasets as tfds

            try:
                return tfds.builder_from_directory(self.directory)
            except Exception as error:
                raise self._broken(error) from None

    def _opened(self) -> Any:
        if self._source is None:
            info = self._builder().info
            self._check(info)
            try:
                with quiet():
                    self._source = self._builder().as_data_source(split=self.split)
                    len(self._source)
            except Exception as error:
                self._source = None
                raise self._broken(error) from None
        return self._source

    def _check(self, info: Any) -> None:
        if info.file_format is None or info.file_format.value != "array_record":
            kind = info.file_format.value if info.file_format else "unknown"
            raise DataError(
                f"data.path={self.directory} is stored as {kind}; prepare it with file_format=array_record, "
                "which is read without TensorFlow"
            )
        if self.text_key not in info.features:
            keys = ", ".join(sorted(info.features))
            raise DataError(f"data.text_key={self.text_key} is not in {self.directory}; its keys are {keys}")
        known = set(info.splits)
        wanted = {part.split("[")[0].strip() for part in self.split.split("+")}
        if not wanted <= known:
            raise DataError(
                f"split {self.split} is not in {self.directory}, which has {', '.join(sorted(known))}; "
                "parts of one can serve: data.train_split='train[5%:]' data.validation_split='train[:5%]'"
            )

    def _broken(self, error: Exception) -> DataError:
        return DataError(
            f"{self.directory} is no sound TFDS dataset ({_first_line(error)}); prepare it again"
        )


def documents(config: DataConfig, split: str) -> Documents:
    """Return the "train" or "validation" documents of a corpus, built into the cache if need be."""
    corpus = Corpus(config)
    corpus.ensure()
    return corpus.split(split)


class Corpus:
    """A corpus by its inputs: their digest, and the TFDS directory that they become.

    `names`: the only files of the folder that are meant; None: all (`data.growth`). `chat`: what
    conversations are checked with, so that a bad one is named by its line.
    """

    names: frozenset[str] | None = None

    def __init__(self, config: DataConfig, chat: ChatTemplate | None = None):
        self.config, self.chat = config, chat
        self.inputs = _inputs(config, chat)
        self.digest = digest_of(self.inputs)
        cached = Path(config.cache_dir) / "documents" / self.digest[:16]
        self.directory = Path(self.inputs["directory"]) if config.source == "tfds" else cached
        if config.source == "tfds":
            del self.inputs["directory"]
            self.digest = digest_of(self.inputs)

    def ensure(self) -> str | None:
        """Build the TFDS directory unless a sound one is there; return why one was replaced, else None."""
        if self.config.source == "tfds":
            return None
        reason = None
        if self.directory.exists():
            try:
                verify(self.directory)
                return None
            except CorruptCache as error:
                reason = str(error)
        with building(self.directory, {"kind": "documents", "digest": self.digest}) as aside:
            _build(self.config, aside, self.names, self.chat)
        return reason

    def splits(self) -> list[str]:
        """Return those of "train" and "validation" that have documents; the corpus must be there."""
        if self.names is None:  # it would have been refused
            return ["train", "validation"]
        info = json.loads((_version_directory(self.directory) / "dataset_info.json").read_text())
        return [split["name"] for split in info["splits"]]

    def split(self, split: str) -> Documents:
        """Return one split's documents. Raises DataError when it is empty."""
        if self.config.source != "tfds":  # the builder has made sure that both splits have documents
            return Documents(_version_directory(self.directory), split, "text")
        name = self.config.train_split if split == "train" else self.config.validation_split
        found = Documents(self.directory, name, self.config.text_key)
        if len(found) == 0:
            raise DataError(f"data.{split}_split={name} is empty; name a split that has documents")
        return found


def stdlib_root() -> Path:
    """Return where this interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _inputs(config: DataConfig, chat: ChatTemplate | None) -> dict[str, Any]:
    """Return everything that decides which documents come out, json-able."""
    if config.source == "tfds":
        return _prepared_inputs(config)
    if chat is not None:
        root, files = list_chat(Path(str(config.path)))
        return {
            "source": config.source,
            "chat": {"format": CHAT_FORMAT, **chat.facts},
            "validation_fraction": config.validation_fraction,
            "files": fingerprint(root, files, config.workers),
        }
    root = stdlib_root() if config.source == "stdlib" else Path(str(config.path))
    files = list_stdlib(root) if config.source == "stdlib" else list_folder(root)
    return {
        "source": config.source,
        "text_key": config.text_key if config.source == "folder" else "text",
        "validation_fraction": config.validation_fraction,
        "files": fingerprint(root, files, config.workers),
    }


def _prepared_inputs(config: DataConfig) -> dict[str, Any]:
    """Names and sizes stand for the shards, which can be terabytes; ArrayRecord has checksums."""
    directory = _prepared_directory(config)
    shards = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix != ".json")
    return {
        "source": "tfds",
        "directory": str(directory),
        "text_key": config.text_key,
        "splits": [config.train_split, config.validation_split],
        "info": json.loads((directory / "dataset_info.json").read_text()),
        "shards": [[path.name, path.stat().st_size] for path in shards],
    }


def _prepared_directory(config: DataConfig) -> Path:
    root = Path(config.path) if config.path else Path.home() / "tensorflow_datasets"
    directory = root
    if config.name:
        directory = root.joinpath(*config.name.replace(":", "/").split("/"))
        versions = sorted(directory.glob("*/dataset_info.json"), key=_version) if directory.is_dir() else []
        if not (directory / "dataset_info.json").exists() and versions:
            directory = versions[-1].parent
    if not directory.is_dir():
        key = f"data.name={config.name}" if config.name else f"data.path={config.path}"
        raise DataError(f"{key}: {directory} does not exist; give a directory that tfds prepared")
    try:
        json.loads((directory / "dataset_info.json").read_text())
    except (OSError, ValueError):
        raise DataError(
            f"data.path: {directory} has no readable dataset_info.json, so it is no prepared TFDS dataset; "
            "point data.path at the version directory (as in wiki40b/en/1.3.0)"
        ) from None
    return directory


def _version(info: Path) -> tuple[int, ...]:
    parts = info.parent.name.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def _version_directory(cached: Path) -> Path:
    return next(cached.glob("*/*/dataset_info.json")).parent


def _build(
    config: DataConfig,
    aside: Path,
    names: frozenset[str] | None = None,
    chat: ChatTemplate | None = None,
) -> None:
    with quiet():
        from data import tfds_builders

        kind = tfds_builders.StdlibCorpus if config.source == "stdlib" else tfds_builders.FolderCorpus
        if chat is not None:
            kind = partial(tfds_builders.ChatCorpus, chat=chat)
        builder = kind(
            data_dir=str(aside),
            root=str(stdlib_root() if config.source == "stdlib" else config.path),
            validation_fraction=config.validation_fraction,
            text_key=config.text_key,
        )
        builder.names = names
        try:
            with bounded():
                builder.download_and_prepare()
        except Exception as error:
            raise _said_plainly(error, config) from None
    shutil.rmtree(aside / "downloads", ignore_errors=True)


def _said_plainly(error: Exception, config: DataConfig) -> DataError:
    """Return the line we meant to say, from under what tfds wrapped around it; else tfds's first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DataError):
            return inner
        inner = inner.__cause__ or inner.__context__
    return DataError(
        f"data.cache_dir={config.cache_dir}: the {config.source} corpus cannot be built there "
        f"({_first_line(error)}); free space or choose another"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tfds's prints and bars and absl's log off the terminal: what matters becomes a DataError."""
    import logging

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
