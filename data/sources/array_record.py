"""Prepared TFDS directories written in order, without TFDS: records as they come, in shards, random access.

A record is a serialized `tf.train.Example`. What is written here, `tfds.builder_from_directory` opens.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHARD_BYTES = 256 << 20  # of records, uncompressed
# As TFDS writes it: each record is a chunk by itself, so that one is read alone; both have checksums.
COMPRESSED, PLAIN = "group_size:1", "group_size:1,uncompressed"
BLOCK = 64  # records read at a time
TEXT_FEATURES = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "text": {
                "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
                "text": {},
            }
        }
    },
}


def text_record(text: bytes) -> bytes:
    """Return the serialized `tf.train.Example` of {"text": text}.

    By hand, since it is six nested fields and a hundredth of what the general serializer takes.
    """
    feature = _field(1, _field(1, text))  # Feature.bytes_list.value
    entry = _field(1, b"text") + _field(2, feature)  # an entry of the map Features.feature
    return _field(1, _field(1, entry))


def _field(number: int, value: bytes) -> bytes:
    length, size = bytearray(), len(value)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + value


def write_prepared(
    aside: Path, name: str, splits: Mapping[str, Iterable[bytes]], options: str = COMPRESSED
) -> None:
    """Write `aside`/`name`/1.0.0 with the text records of each split in their order, one split after the
    other.
    """
    directory = aside / name / "1.0.0"
    directory.mkdir(parents=True)
    infos = [_write_split(directory, name, split, records, options) for split, records in splits.items()]
    write_info(directory, {"name": name, "version": "1.0.0", "splits": infos}, TEXT_FEATURES)


def write_info(directory: Path, info: dict[str, Any], features: dict[str, Any]) -> None:
    """Write the two JSON files that make a directory of ArrayRecord files a prepared dataset."""
    info = {**info, "fileFormat": "array_record"}
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=2, sort_keys=True), "utf-8")
    (directory / "features.json").write_text(json.dumps(features, indent=4, sort_keys=True), "utf-8")


def _write_split(
    directory: Path, name: str, split: str, records: Iterable[bytes], options: str
) -> dict[str, Any]:
    lengths: list[int] = []
    total, source = 0, iter(records)
    first = next(source, None)
    while first is not None or not lengths:  # an empty split has one empty shard
        with shard_writer(directory / f"{split}-{len(lengths)}.part", options) as writer:
            count, size = 0, 0
            while first is not None and size < SHARD_BYTES:
                writer.write(first)
                count, size = count + 1, size + len(first)
                first = next(source, None)
        lengths.append(count)
        total += size
    for shard in range(len(lengths)):  # only now is it known of how many
        final = f"{name}-{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
        (directory / f"{split}-{shard}.part").rename(directory / final)
    return split_info(split, lengths, total)


def split_info(split: str, lengths: list[int], num_bytes: int) -> dict[str, Any]:
    """Return a split as `dataset_info.json` lists it; 64-bit numbers are strings in protobuf's JSON."""
    return {
        "name": split,
        "numBytes": str(num_bytes),
        "shardLengths": [str(length) for length in lengths],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }


class shard_writer:
    """`with shard_writer(path) as writer: writer.write(record)`; closed also where an error comes through."""

    def __init__(self, path: Path, options: str = COMPRESSED):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._writer = ArrayRecordWriter(str(path), options)

    def __enter__(self) -> Any:
        return self._writer

    def __exit__(self, *error: object) -> None:
        self._writer.close()


def read_records(path: Path) -> Iterator[bytes]:
    """Yield a shard's serialized records in order. Raises what the reader raises where a checksum fails."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource([str(path)]) as source:
        for first in range(0, len(source), BLOCK):
            yield from source.__getitems__(list(range(first, min(first + BLOCK, len(source)))))


def copy_prepared(
    source: Path,
    target: Path,
    shards: dict[str, list[tuple[Path, int]]],
    read: Callable[[Path], Iterator[bytes]],
    keep: Callable[[bytes], bool] = lambda record: True,
) -> None:
    """Write the prepared directory `source` to `target` as ArrayRecord: shard by shard, record by record,
    each record's bytes as they are; records that `keep` refuses are left out.

    shards: each split's files, and how many records each should hold. Raises ValueError where it holds more
    or fewer.
    """
    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text("utf-8"))
    splits = []
    for split, listed in shards.items():
        lengths, total = [], 0
        for shard, (path, told) in enumerate(listed):
            name = f"{info['name']}-{split}.array_record-{shard:05d}-of-{len(listed):05d}"
            found, kept = 0, 0
            with shard_writer(target / name) as writer:
                for record in read(path):
                    found += 1
                    if keep(record):
                        writer.write(record)
                        kept, total = kept + 1, total + len(record)
            if found != told:
                raise ValueError(f"{path.name} holds {found} records, dataset_info.json says {told}")
            lengths.append(kept)
        splits.append(split_info(split, lengths, total))
    write_info(target, info | {"splits": splits}, json.loads((source / "features.json").read_text("utf-8")))
