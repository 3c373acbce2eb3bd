"""TFDS builders for the corpora that are made on the user's machine. ArrayRecord, no TensorFlow.

Importing this module imports tfds (about 0.4 s), so `data.sources` does it only when there is something to
build.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from common.text import first_line
from data.errors import DataError
from data.sources.bad_records import BadRecords
from data.sources.files import in_validation, list_folder, list_stdlib, read_documents, relative

# (file, what a bad record is told to) → conversations as canonical JSON.
ReadConversations = Callable[[Path, Callable[[str, str], None]], Iterator[str]]


class _TextCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Files under one root, split by document content; TFDS shuffles by the hash of each document's place."""

    VERSION = tfds.core.Version("1.0.0")
    names: frozenset[str] | None = None  # the only files that are meant; a split of them may be empty

    def __init__(
        self,
        *,
        root: str,
        validation_fraction: float,
        text_key: str = "text",
        on_bad_record: str = "stop",
        **kwargs: Any,
    ):
        self.bad = BadRecords(on_bad_record)
        self._root = Path(root)
        self._fraction = validation_fraction
        self._text_key = text_key
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        splits = {"train": False, "validation": True}
        if self.names is not None:  # tfds refuses an empty split
            splits = {split: held_out for split, held_out in splits.items() if self._any(held_out)}
            if not splits:
                raise DataError(f"data.path={self._root}: its new files hold no documents; put some there")
        self._counts = next(iter(splits.values()))
        return {split: self._generate_examples(held_out) for split, held_out in splits.items()}

    def _any(self, held_out: bool) -> bool:
        unseen = BadRecords(self.bad.policy)
        texts = (text for path in self._files() for text in self._texts(path, unseen))
        return any(in_validation(text, self._fraction) == held_out for text in texts)

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[str, dict[str, str]]]:
        empty = True
        # Both splits read every file; what is left out is counted by one of them.
        bad = self.bad if held_out == self._counts else BadRecords(self.bad.policy)
        for path in self._files():
            name = relative(self._root, path)
            for number, text in enumerate(self._texts(path, bad)):
                if in_validation(text, self._fraction) == held_out:
                    empty = False
                    yield f"{name}:{number}", {"text": text, "path": name}
        if empty:  # tfds would say so with an assertion
            split, change = ("validation", "raise") if held_out else ("train", "lower")
            raise DataError(
                f"data.validation_fraction={self._fraction} leaves no {split} documents; {change} it, "
                "or add documents to the corpus (a file, or a record of one, is a document)"
            )

    def _texts(self, path: Path, bad: BadRecords) -> Iterator[str]:
        """Read a file; what nobody has foreseen in it is told with its name, not as a fault of the cache."""
        try:
            yield from self._read(path, bad)
        except DataError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(
                f"data.path: {path} cannot be read ({reason}); mend it or move it away"
            ) from error

    def _files(self) -> list[Path]:
        raise NotImplementedError

    def _read(self, path: Path, bad: BadRecords) -> Iterator[str]:
        return read_documents(path, self._text_key, bad)


class StdlibCorpus(_TextCorpus):
    """The source and docstrings of the Python standard library, as installed here: one document a module."""

    def _files(self) -> list[Path]:
        return list_stdlib(self._root)


class FolderCorpus(_TextCorpus):
    """A user's own .txt, .md, .py, .jsonl (.gz, .zst) and .parquet files."""

    def _files(self) -> list[Path]:
        files = list_folder(self._root)
        return [path for path in files if self.names is None or relative(self._root, path) in self.names]


class ChatCorpus(_TextCorpus):
    """Conversations of .jsonl (.gz, .zst) and .parquet files, each as canonical JSON."""

    def __init__(self, *, files: list[Path], read: ReadConversations, **kwargs: Any):
        self._chat_files, self._read_conversations = files, read
        super().__init__(**kwargs)

    def _files(self) -> list[Path]:
        root, files = self._root, self._chat_files
        return [path for path in files if self.names is None or relative(root, path) in self.names]

    def _read(self, path: Path, bad: BadRecords) -> Iterator[str]:
        return self._read_conversations(path, bad.found)
