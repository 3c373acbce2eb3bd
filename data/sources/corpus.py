"""Documents by index, whatever they come from. TFDS is the front door of all sources.

A source says what decides its documents and either is a directory of ArrayRecord files that somebody prepared
or builds one, once, into the cache. From there on they are the same thing: files with random access, so that
`cached` mode is exact whatever lies before it. A new kind of source is a class in a file of its own and a
line in `data.config.SOURCES`.
"""

import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from common.text import first_line
from data.cache import CorruptCache, building, digest_of, verify
from data.config import SOURCES, DataConfig
from data.errors import DataError
from data.sources.documents import Documents, Say, quiet, silent
from data.sources.files import fingerprint, list_folder, list_stdlib
from data.sources.remote import local_path
from data.tokens.chat import FORMAT as CHAT_FORMAT
from data.tokens.chat import is_padded, list_chat, read_chat
from data.tokens.chat_template import ChatTemplate


class Source(Protocol):
    """What every kind of source answers. It is made from a DataConfig and a `Say`; it may fetch what lies
    elsewhere, and says so.
    """

    @property
    def directory(self) -> Path | None:
        """Where prepared ArrayRecord files lie already; None where `build` makes them."""

    @property
    def text_key(self) -> str:
        """The field that holds the text in what was prepared or built."""

    @property
    def splits(self) -> dict[str, str]:
        """What "train" and "validation" are called in what was prepared or built."""

    def inputs(self) -> dict[str, Any]:
        """Return everything that decides which documents come out, json-able: its digest names them."""

    def check(self) -> None:
        """Raise DataError where records that are read only while training are not sound."""

    def freeze(self) -> None:
        """Take note that all is well: a change from now on is a fault."""

    def build(self, aside: Path) -> dict[str, int]:
        """Make a prepared directory at aside/NAME/VERSION; return the bad records left out, by kind."""


class FolderSource:
    """`data.source=folder`: a user's own files, here or in a bucket."""

    directory = None
    text_key = "text"
    splits = {"train": "train", "validation": "validation"}
    names: frozenset[str] | None = (
        None  # the only files that are meant; None: all (`data.tokens.generations`)
    )

    def __init__(self, config: DataConfig, say: Say = silent):
        self.config = config
        self.root = local_path(config, say)
        self.files = list_folder(self.root)

    def inputs(self) -> dict[str, Any]:
        """Files count by name and content."""
        inputs = {
            "source": self.config.source,
            "text_key": self.config.text_key,
            "validation_fraction": self.config.validation_fraction,
            "files": fingerprint(self.root, self.files, self.config.workers),
        }
        if self.config.on_bad_record == "skip":  # unsaid otherwise: what was prepared before is found again
            inputs["on_bad_record"] = "skip"
        return inputs

    def check(self) -> None:
        """Nothing: every record is read when it is built."""

    def freeze(self) -> None:
        """Nothing: what was built is held to its manifest."""

    def build(self, aside: Path) -> dict[str, int]:
        """Run our TFDS builder."""
        with quiet():
            from data.sources.shuffling import bounded_shuffle

            builder = self.builder(
                data_dir=str(aside),
                root=str(self.root),
                validation_fraction=self.config.validation_fraction,
                text_key=self.config.text_key,
                on_bad_record=self.config.on_bad_record,
            )
            builder.names = self.names
            try:
                with bounded_shuffle():
                    builder.download_and_prepare()
            except Exception as error:
                raise _said_plainly(error, self.config) from None
        shutil.rmtree(aside / "downloads", ignore_errors=True)
        return dict(builder.bad.counts)

    def builder(self, **options: Any) -> Any:
        """Return our TFDS builder, imported only where there is something to build."""
        from data.sources.tfds_builders import FolderCorpus

        return FolderCorpus(**options)


class StdlibSource(FolderSource):
    """`data.source=stdlib`: the standard library's own source, as installed here."""

    def __init__(self, config: DataConfig, say: Say = silent):
        self.config = config
        self.root = stdlib_root()
        self.files = list_stdlib(self.root)

    def inputs(self) -> dict[str, Any]:
        """Files count by name and content."""
        return super().inputs() | {"text_key": "text"}

    def builder(self, **options: Any) -> Any:
        """Return our TFDS builder."""
        from data.sources.tfds_builders import StdlibCorpus

        return StdlibCorpus(**options)


class ChatSource(FolderSource):
    """`data.source=folder` under data.format=chat: conversations in a folder's records, or in one file."""

    def __init__(self, config: DataConfig, say: Say, chat: ChatTemplate):
        self.config, self.chat = config, chat
        self.root, self.files = list_chat(local_path(config, say))

    def inputs(self) -> dict[str, Any]:
        """Files, and the template: what it refuses may be left out.

        A file of which nulls were once learnt that only its column's type has is another one since.
        """
        inputs = super().inputs() | {"chat": {"format": CHAT_FORMAT, **self.chat.inputs}}
        padded = {
            file for file in self.files if file.suffix == ".parquet" and is_padded(file, self.chat.form)
        }
        inputs["files"] = [
            (name, f"{digest}-without-padding" if file in padded else digest)
            for file, (name, digest) in zip(self.files, inputs["files"], strict=True)
        ]
        return {key: value for key, value in inputs.items() if key != "text_key"}

    def builder(self, **options: Any) -> Any:
        """Return our TFDS builder."""
        from data.sources.tfds_builders import ChatCorpus

        return ChatCorpus(files=self.files, read=self.read, **options)

    def read(self, path: Path, found: Callable[[str, str], None]) -> Iterator[str]:
        """Read a file's conversations, checked with the template."""
        return read_chat(path, self.chat, found)


def source_of(config: DataConfig, say: Say) -> Source:
    """What answers for the kind of source that a config names."""
    module, _, name = SOURCES[config.source].partition(":")
    return getattr(import_module(module), name)(config, say)


class Corpus:
    """A corpus by its inputs: their digest, and the TFDS directory that they become.

    `chat`: what conversations are checked with, so that a bad one is named by its line.
    """

    def __init__(self, config: DataConfig, say: Say = silent, chat: ChatTemplate | None = None):
        self.config = config
        if chat is not None and config.source == "folder":
            self.source: Source = ChatSource(config, say, chat)
        else:
            self.source = source_of(config, say)
        self.inputs = self.source.inputs()
        self.digest = digest_of(self.inputs)
        cached = Path(config.cache_dir) / "documents" / self.digest[:16]
        self.directory = self.source.directory or cached

    def ensure(self) -> str | None:
        """Build the TFDS directory unless a sound one is there; return why one was replaced, else None."""
        self.source.check()
        if self.source.directory is not None:
            return None
        reason = None
        if self.directory.exists():
            try:
                verify(self.directory)
                return None
            except CorruptCache as error:
                reason = str(error)
        about: dict[str, Any] = {"kind": "documents", "digest": self.digest}
        with building(self.directory, about) as aside:
            about["skipped"] = self.source.build(aside)
        return reason

    def splits(self) -> list[str]:
        """Return those of "train" and "validation" that have documents; the corpus must be there."""
        if getattr(self.source, "names", None) is None:  # it would have been refused
            return ["train", "validation"]
        info = json.loads((_version_directory(self.directory) / "dataset_info.json").read_text("utf-8"))
        return [split["name"] for split in info["splits"]]

    def split(self, split: str) -> Documents:
        """Return one split's documents. Raises DataError when it is empty."""
        directory = self.source.directory or _version_directory(self.directory)
        name = self.source.splits[split]
        found = Documents(directory, name, self.source.text_key)
        if len(found) == 0:
            raise DataError(f"data.{split}_split={name} is empty; name a split that has documents")
        return found

    def freeze(self) -> None:
        """Take note that what was prepared is whole: from now on, a change in place is a fault."""
        self.source.freeze()

    def plan(self) -> str | None:
        """Say in a line what `ensure` is going to build; None where it is there already."""
        if self.source.directory is not None or self.directory.exists():
            return None
        files = self.inputs.get("files")
        return f"making the {self.config.source} corpus" + (f" ({len(files)} files)" if files else "")

    def skipped(self) -> dict[str, int]:
        """Return how many bad records were left out, by kind, as the corpus was built."""
        if self.config.on_bad_record != "skip" or not self.directory.exists():
            return {}
        return verify(self.directory, contents=False).get("skipped", {})


def stdlib_root() -> Path:
    """Return where this interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _version_directory(cached: Path) -> Path:
    return next(cached.glob("*/*/dataset_info.json")).parent


def _said_plainly(error: Exception, config: DataConfig) -> DataError:
    """Return the line we meant to say, from under what tfds wrapped around it; else tfds's first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DataError):
            return inner
        inner = inner.__cause__ or inner.__context__
    return DataError(
        f"data.cache_dir={config.cache_dir}: the {config.source} corpus cannot be built there "
        f"({first_line(error)}); free space or choose another"
    )
