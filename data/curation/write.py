"""Documents → a TFDS directory of ArrayRecord shards, written without TensorFlow, in the order given."""

import contextlib
import os
from pathlib import Path
from typing import Any

from common.text import first_line
from data.curation.config import Compress, Shard
from data.errors import DataError
from data.sources.documents import quiet

NAME, VERSION = "optimized", "1.0.0"
LEVELS = {"zstd": 3, "brotli": 6}
MEGABYTES = 1000.0  # of records in a shard where no step `shard` says otherwise


def options_of(compress: Compress) -> str:
    """Return ArrayRecord's own words for a compression."""
    level = LEVELS.get(compress.codec, 0) if compress.level is None else compress.level
    codec = {"zstd": f"zstd:{level}", "brotli": f"brotli:{level}", "snappy": "snappy", "none": "uncompressed"}
    return f"group_size:{compress.group},{codec[compress.codec]}"


class CorpusWriter:
    """Both splits of a corpus; `finish` makes of the shards a directory that TFDS reads."""

    def __init__(self, directory: Path, compress: Compress, shard: Shard | None):
        from tensorflow_datasets import features

        directory.mkdir(parents=True)
        self.directory = directory
        self.features = features.FeaturesDict({"text": features.Text(), "path": features.Text()})
        self.splits = {
            split: _SplitWriter(directory, split, options_of(compress), shard)
            for split in ("train", "validation")
        }

    def write(self, split: str, text: str, path: str) -> None:
        """Add a document to a split."""
        example = self.features.encode_example({"text": text, "path": path})
        self.splits[split].write(self.features.serialize_example(example))

    def finish(self) -> dict[str, Any]:
        """Name the shards, write the metadata; return bytes of records and files, and documents a shard."""
        for split in self.splits.values():
            split.finish()
        with quiet():
            self._write_metadata()
        return {
            "record_bytes": sum(split.record_bytes for split in self.splits.values()),
            "file_bytes": file_bytes(self.directory),
            "shards": {name: split.lengths for name, split in self.splits.items()},
        }

    def abandon(self) -> None:
        """Close what is open: an error is under way, and the directory will be removed."""
        for split in self.splits.values():
            with contextlib.suppress(Exception):
                split.close()

    def _write_metadata(self) -> None:
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            data_dir=self.directory, dataset_name=NAME, filetype_suffix="array_record"
        )
        infos = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=split.lengths,
                num_bytes=split.record_bytes,
                filename_template=template.replace(split=name),
            )
            for name, split in self.splits.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=str(self.directory),
            features=self.features,
            split_infos=infos,
            version=VERSION,
            filename_template=template,
            check_data=False,
        )


def file_bytes(directory: Path) -> int:
    """Return the bytes of the shards in a TFDS directory."""
    return sum(p.stat().st_size for p in directory.iterdir() if p.is_file() and p.suffix != ".json")


class _SplitWriter:
    """The shards of one split; their names say how many there are, so they are named at the end."""

    def __init__(self, directory: Path, split: str, options: str, shard: Shard | None):
        self.directory, self.split, self.options = directory, split, options
        self.documents, self.megabytes = (shard.documents, shard.megabytes) if shard else (None, MEGABYTES)
        self.lengths: list[int] = []
        self.record_bytes = self._filled = 0
        self._writer: Any = None

    def write(self, record: bytes) -> None:
        if self._writer is None or self._full():
            self._next()
        try:
            self._writer.write(record)
        except Exception as error:
            raise self._failed(error) from None
        self.lengths[-1] += 1
        self._filled += len(record)
        self.record_bytes += len(record)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def finish(self) -> None:
        try:
            self.close()
        except Exception as error:
            raise self._failed(error) from None
        count = len(self.lengths)
        for number in range(count):
            name = f"{NAME}-{self.split}.array_record-{number:05d}-of-{count:05d}"
            os.replace(self._part(number), self.directory / name)

    def _full(self) -> bool:
        by_count = self.documents is not None and self.lengths[-1] >= self.documents
        return by_count or (self.megabytes is not None and self._filled >= self.megabytes * 1e6)

    def _next(self) -> None:
        from array_record.python import array_record_module

        self.close()
        self.lengths.append(0)
        self._filled = 0
        try:
            part = str(self._part(len(self.lengths) - 1))
            self._writer = array_record_module.ArrayRecordWriter(part, self.options)
        except Exception as error:
            raise self._failed(error) from None

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{self.split}-{number:05d}"

    def _failed(self, error: Exception) -> DataError:
        return DataError(
            f"data.cache_dir: {self.directory} cannot be written ({first_line(error)}); free space or choose "
            "another"
        )
