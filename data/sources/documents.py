"""One split of a prepared TFDS directory as a sequence of texts: ArrayRecord files with random access."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.text import first_line
from data.errors import DataError

Say = Callable[[str], None]  # where a line about what is under way goes


def silent(line: str) -> None:
    """A `Say` that says nothing."""


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
        return [self._text(record[self.text_key]) for record in self._records(indices)]

    def records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return whole records, as `read` does: each field by its name, and the text under `""` as well."""
        return [{**record, "": self._text(record[self.text_key])} for record in self._records(indices)]

    def _records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return self._opened().__getitems__(list(indices))
        except DataError:
            raise
        except Exception as error:
            raise self._broken(error) from None

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
        return open_builder(self.directory)

    def _opened(self) -> Any:
        if self._source is None:
            info = self._builder().info
            self._check(info)
            try:
                if info.splits[self.split].num_examples == 0:
                    self._source = ()  # tfds cannot open a split without records
                    return self._source
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
        self.check_names(info)

    def check_names(self, info: Any) -> None:
        """Raise DataError where the dataset lacks the text key or the split."""
        if self.text_key not in info.features:
            keys = ", ".join(sorted(info.features))
            raise DataError(f"data.text_key={self.text_key} is not in {self.directory}; its keys are {keys}")
        known = set(info.splits)
        if not set(base_splits(self.split)) <= known:
            raise DataError(
                f"split {self.split} is not in {self.directory}, which has {', '.join(sorted(known))}; "
                "parts of one can serve: data.train_split='train[5%:]' data.validation_split='train[:5%]'"
            )

    def _broken(self, error: Exception) -> DataError:
        return broken(self.directory, error)


def open_builder(directory: Path) -> Any:
    """Return TFDS's builder of a prepared directory. Raises DataError where its JSON is broken."""
    with quiet():
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(directory)
        except Exception as error:
            raise broken(directory, error) from None


def broken(directory: Path, error: Exception) -> DataError:
    """Return the line for files that are damaged or missing."""
    return DataError(f"{directory} is no sound TFDS dataset ({first_line(error)}); prepare it again")


def base_splits(*splits: str) -> list[str]:
    """Return the splits that some are cut from: of `train[5%:]` and `train[:5%]+test`, train and test."""
    parts = [part.split("[")[0].strip() for split in splits for part in split.split("+")]
    return list(dict.fromkeys(parts))


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
