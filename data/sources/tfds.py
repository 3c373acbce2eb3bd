"""TFDS datasets that somebody prepared, or that TFDS prepares here; ArrayRecord is read where it lies.

What is stored as TFRecord, and what has records to leave out, becomes an ArrayRecord copy in the cache: the
same records in the same order, byte for byte.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.buckets import is_remote
from common.text import first_line
from data.cache import digest_of
from data.config import DataConfig
from data.errors import DataError
from data.sources.array_record import copy_prepared, read_records
from data.sources.bad_records import BadRecords
from data.sources.documents import (
    Documents,
    Say,
    base_splits,
    broken,
    open_builder,
    quiet,
    silent,
)
from data.sources.remote import local_path, mirrored_digest
from data.sources.shard_hashes import ShardRecord
from data.sources.tfrecord import TFRecordReader, need_tensorflow


class TfdsSource:
    """`data.source=tfds`: a version directory by path, or a builder's name under the TFDS root."""

    def __init__(self, config: DataConfig, say: Say = silent):
        self.config, self.say = config, say
        self.prepared, self.mirror = _directory(config, say)
        self.info = json.loads((self.prepared / "dataset_info.json").read_text("utf-8"))
        named = any(".tfrecord" in path.name for path in self.prepared.iterdir())
        self.format = self.info.get("fileFormat") or ("tfrecord" if named else "unknown")
        copied = self.format == "tfrecord" or config.on_bad_record == "skip"
        self.directory = None if copied else self.prepared
        self.splits = {"train": config.train_split, "validation": config.validation_split}
        self.text_key = config.text_key
        if self.format == "tfrecord":
            need_tensorflow(self.prepared)

    def inputs(self) -> dict[str, Any]:
        """Names and sizes stand for the shards, which can be terabytes; their sha256 is kept beside."""
        shards = sorted(path for path in self.prepared.iterdir() if path.is_file() and path.suffix != ".json")
        inputs = {
            "source": "tfds",
            "text_key": self.config.text_key,
            "splits": [self.config.train_split, self.config.validation_split],
            "info": self.info,
            "shards": [[path.name, path.stat().st_size] for path in shards],
        }
        if self.mirror is not None:
            inputs["contents"] = mirrored_digest(self.mirror)
        if self.config.on_bad_record == "skip":
            inputs["on_bad_record"] = "skip"
        known = Path(self.config.cache_dir) / "shards" / f"{digest_of(inputs)[:32]}.json"
        self.shards = ShardRecord(self.prepared, [path.name for path in shards], known)
        self.shards.check(self.config.workers, self.say)
        return inputs

    def check(self) -> None:
        """Where records are read while training, read them all once before: none of them may stop it then."""
        if self.config.mode != "streaming" or self.directory is None:
            return  # in cached mode, and where they are copied, every record is read before the first batch
        what = f"{self.config.train_split}/{self.config.text_key}"
        if not self.shards.is_verified(what):
            documents = Documents(self.prepared, self.config.train_split, self.config.text_key)
            self.say(
                f"reading the {len(documents)} documents of {self.config.train_split} through, this once"
            )
            for first in range(0, len(documents), 64):
                documents.read(range(first, min(first + 64, len(documents))))
            self.shards.mark_verified(what)

    def freeze(self) -> None:
        """Hold the shards to what they are now."""
        self.shards.freeze()

    def build(self, aside: Path) -> dict[str, int]:
        """Copy the splits in use, record by record, as ArrayRecord."""
        info = open_builder(self.prepared).info
        for split in self.splits.values():
            Documents(self.prepared, split, self.text_key).check_names(info)
        wanted = base_splits(*self.splits.values())
        shards = {
            name: [(Path(p), n) for p, n in zip(split.filepaths, split.shard_lengths, strict=True)]
            for name, split in info.splits.items()
            if name in wanted
        }
        bad = BadRecords(self.config.on_bad_record)
        target = aside / "copy" / "1.0.0"
        try:
            if self.format == "tfrecord":
                with TFRecordReader() as reader:
                    copy_prepared(self.prepared, target, shards, reader.read, self._keep(info, bad))
            else:
                copy_prepared(self.prepared, target, shards, read_records, self._keep(info, bad))
        except (DataError, OSError):
            raise
        except Exception as error:
            raise broken(self.prepared, error) from None
        return dict(bad.counts)

    def _keep(self, info: Any, bad: BadRecords) -> Callable[[bytes], bool]:
        number = 0

        def keep(record: bytes) -> bool:
            nonlocal number
            number += 1
            value = info.features.deserialize_example_np(record).get(self.text_key)
            where = f"data.path: {self.prepared}: record {number}"
            if not isinstance(value, bytes):
                bad.found("no_text", f"data.text_key={self.text_key} holds no text in {where}")
                return False
            try:
                value.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.found("utf8", f"{where} is not UTF-8 at byte {error.start}; prepare it again")
                return False
            return True

        return keep


def _directory(config: DataConfig, say: Say) -> tuple[Path, Path | None]:
    """Return the version directory, made first where `data.download` asks for it, and the mirror it is in."""
    if is_remote(config.path):
        # Only what is named, not the whole root; ArrayRecord's and TFRecord's own checksums guard contents.
        mirror = local_path(config, say, (config.name or "").replace(":", "/"), contents=False)
        return _sound(_newest(mirror) if config.name else mirror, config), mirror
    root = Path(config.path) if config.path else Path.home() / "tensorflow_datasets"
    directory = _newest(root.joinpath(*config.name.replace(":", "/").split("/"))) if config.name else root
    if not directory.is_dir() and config.name and config.download:
        say(f"downloading and preparing {config.name} into {root}")
        download(config.name, root)
        directory = _newest(root.joinpath(*config.name.replace(":", "/").split("/")))
    return _sound(directory, config), None


def _newest(directory: Path) -> Path:
    """Return the newest version below a dataset's directory, or the directory where it is one itself."""
    if (directory / "dataset_info.json").exists():
        return directory
    versions = sorted(directory.glob("*/dataset_info.json"), key=_version) if directory.is_dir() else []
    return versions[-1].parent if versions else directory


def _sound(directory: Path, config: DataConfig) -> Path:
    if not directory.is_dir():
        key = f"data.name={config.name}" if config.name else f"data.path={config.path}"
        how = "; give a directory that tfds prepared"
        if config.name:
            how += f", or let TFDS download and prepare it: data.name={config.name} data.download=true"
        raise DataError(f"{key}: {directory} does not exist{how}")
    try:
        json.loads((directory / "dataset_info.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"data.path: {directory} has no readable dataset_info.json, so it is no prepared TFDS dataset; "
            "point data.path at the version directory (as in wiki40b/en/1.3.0)"
        ) from None
    return directory


def download(name: str, root: Path) -> None:
    """Let TFDS's own builder fetch and prepare a dataset under `root`, as ArrayRecord.

    Raises DataError with TFDS's reason where there is no such builder, no network or no space.
    """
    from data.sources.shuffling import bounded_shuffle

    try:
        with quiet(), bounded_shuffle():
            import tensorflow_datasets as tfds
            import tensorflow_datasets.text  # old builders (c4, wiki40b) are known once it is imported

            builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:
        raise DataError(
            f"data.name={name} cannot be downloaded and prepared in {root} ({first_line(error)}); prepare it "
            f"elsewhere with tfds.builder('{name}', file_format='array_record').download_and_prepare() and "
            "give its directory as data.path"
        ) from None


def _version(info: Path) -> tuple[int, ...]:
    parts = info.parent.name.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
