"""Hugging Face `datasets` (extra `hf`), written once into ArrayRecord in their own order.

    data.path=DIR                   what `save_to_disk` wrote, or a folder of data files without a script
    data.name=json data.path=DIR    a builder of the library (json, csv, parquet, text) over a folder
    data.name=ORG/REPO:CONFIG@REV   a dataset of the hub, streamed

From then on the library is not needed: random access, and the exactness of `cached` mode, come from the copy.
"""

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.text import reason
from data.config import DataConfig
from data.errors import DataError
from data.sources.array_record import text_record, write_prepared
from data.sources.bad_records import BadRecords
from data.sources.documents import Say, base_splits, quiet, silent
from data.sources.files import column_texts, fingerprint, walk
from data.sources.lines import file_lines
from data.sources.remote import local_path

NAME = re.compile(r"(?P<repo>[^:@]+)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
BATCH = 64  # records taken at a time: few, since one may be 50 MB


class HfSource:
    """`data.source=hf`."""

    directory = None
    text_key = "text"

    def __init__(self, config: DataConfig, say: Say = silent):
        if importlib.util.find_spec("datasets") is None:
            raise DataError("data.source=hf needs the package datasets; pip install -e '.[hf]'")
        self.config = config
        self.splits = {"train": config.train_split, "validation": config.validation_split}
        self.path = local_path(config, say) if config.path else None
        if self.path is not None and not self.path.is_dir():
            raise DataError(
                f"data.path={self.path} is no folder; give what save_to_disk wrote, or a folder of data files"
            )

    def inputs(self) -> dict[str, Any]:
        """Local files count by content; a dataset of the hub by its name and the revision in it."""
        inputs: dict[str, Any] = {
            "source": "hf",
            "name": self.config.name,
            "text_key": self.config.text_key,
            "splits": base_splits(*self.splits.values()),
            "slices": [self.config.train_split, self.config.validation_split],
        }
        if self.path is not None:
            files = walk(self.path)
            inputs["files"] = fingerprint(self.path, files, self.config.workers)
        if self.config.on_bad_record == "skip":
            inputs["on_bad_record"] = "skip"
        return inputs

    def check(self) -> None:
        """Nothing: every record is read when it is written."""

    def freeze(self) -> None:
        """Nothing: what was built is held to its manifest."""

    def build(self, aside: Path) -> dict[str, int]:
        """Write each split in use into ArrayRecord, in order."""
        self._check_files()
        bad = BadRecords(self.config.on_bad_record)
        splits = base_splits(*self.splits.values())
        self._scratch = aside / "scratch"  # the library's locks, which it would leave in the home directory
        with quiet():  # not in the generators: whoever stops reading one would stay unheard
            write_prepared(aside, "hf", {split: self._records(split, bad) for split in splits})
        shutil.rmtree(self._scratch, ignore_errors=True)
        return dict(bad.counts)

    def _check_files(self) -> None:
        """Raise DataError for what the library would leave out unsaid: linked folders, the rest of a .zst."""
        if self.path is None or self._saved() is not None:
            return
        root = os.path.realpath(self.path)
        for path in walk(self.path):
            if os.path.realpath(path.parent) != os.path.normpath(root / path.parent.relative_to(self.path)):
                raise DataError(
                    f"data.path: {path} lies in a linked folder, which the library datasets passes over; put "
                    "the folder itself there, or use data.source=folder"
                )
            if path.suffix == ".zst":
                for _ in file_lines(path):
                    pass

    def _saved(self) -> str | None:
        """Return the file by which `save_to_disk` says what it wrote; None where it did not write this."""
        names = ("dataset_dict.json", "state.json")
        return next((name for name in names if self.path and (self.path / name).exists()), None)

    def _records(self, split: str, bad: BadRecords) -> Iterator[bytes]:
        where = self.config.name or str(self.path)
        number = 0
        with self._said_plainly():
            tables = self._open(split).with_format("arrow").iter(batch_size=BATCH)
            for table in tables:
                if self.config.text_key not in table.column_names:
                    raise DataError(
                        f"data.text_key={self.config.text_key} is not in {where}; its columns are "
                        f"{', '.join(table.column_names)}"
                    )
                column = table.column(self.config.text_key)
                for text in column_texts(column, self.config.text_key, f"{where}/{split}", bad, number):
                    yield text_record(text.encode())
                number += table.num_rows

    def _open(self, split: str) -> Any:
        """Return a split as the library opens it: mapped where it lies as Arrow, streamed otherwise."""
        import datasets

        saved = self._saved()
        if saved == "dataset_dict.json":
            found = datasets.load_from_disk(str(self.path))
            if split not in found:
                raise self._no_split(split, list(found))
            return found[split]
        if saved is not None:
            if split != "train":
                raise self._no_split(split, ["train"])
            return datasets.load_from_disk(str(self.path))
        found = self._streamed()
        if split not in found:
            raise self._no_split(split, list(found))
        return found[split]

    def _streamed(self) -> Any:
        import datasets

        options: dict[str, Any] = {"streaming": True, "cache_dir": str(self._scratch)}
        if self.config.name is None:
            return datasets.load_dataset(str(self.path), **options)
        if self.path is not None:
            return datasets.load_dataset(self.config.name, data_dir=str(self.path), **options)
        match = NAME.fullmatch(self.config.name)
        if match is None:
            raise DataError(f"data.name={self.config.name} is no ORG/REPO:CONFIG@REVISION of the hub")
        return datasets.load_dataset(match["repo"], match["config"], revision=match["revision"], **options)

    def _no_split(self, split: str, there: list[str]) -> DataError:
        return DataError(
            f"split {split} is not in {self.config.name or self.path}, which has {', '.join(there)}; "
            "parts of one can serve: data.train_split='train[5%:]' data.validation_split='train[:5%]'"
        )

    @contextlib.contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """Turn whatever the library and the hub raise into one line."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            key = f"data.name={self.config.name}" if self.config.name else f"data.path={self.path}"
            remedy = "check the name" if self.path is None else "fetch it again"
            if "offline" in f"{type(error).__name__} {error}".lower():
                remedy = "unset HF_HUB_OFFLINE, or give a local copy as data.path"
            raise DataError(f"{key} cannot be read ({reason(error)}); {remedy}") from None
