"""A corpus's tokens made shard by shard, so that a killed preparation loses only what was under way.

A shard is a run of documents. Whoever makes one writes its files, syncs them, and last its record, which has
their sha256: the records are the journal. A second start checks what they say and makes only what is missing.
Cut and content depend on the documents alone, so neither the number of workers, nor kills, nor the engine
shows in the bytes.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from common.files import file_digest
from data.cache import Stopped, digest_of
from data.sources.documents import Documents
from data.tokens.encoding import Encoded, Encoder, Encoding
from data.tokens.workers import as_worker

BLOCK_BYTES = 2 << 20  # text that a worker holds at a time
BLOCK_DOCUMENTS = 4096
LENGTH = np.dtype("<i8")  # entries of a document
JOURNAL = "shards"  # the directory, in a store that is being made
Record = dict[str, Any]  # number, documents, entries, num_bytes, files: {kind: {sha256, bytes}}


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to make any shard: picklable. `block` documents are read at a time."""

    directory: Path
    documents: Documents
    encoding: Encoding
    block: int


# Makes the given shards {number: documents}, yielding each one's record as it is finished, in any order.
Engine = Callable[[ShardTask, dict[int, range]], Iterator[Record]]


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of a token file's entries: two bytes where all ids fit."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def path_of(directory: Path, number: int, kind: str) -> Path:
    """Return a shard's file: its "tokens", "lengths", "weights", or its "json" record."""
    return directory / f"{number:05d}.{kind}"


def write_shard(work: ShardTask, encoder: Encoder, number: int, documents: range) -> Record:
    """Tokenize a run of documents into the shard's files; return its record, written last of all."""
    kinds = ("tokens", "lengths", "weights") if encoder.weighted else ("tokens", "lengths")
    files = {kind: _Durable(path_of(work.directory, number, kind)) for kind in kinds}
    record: Record = {"number": number, "documents": 0, "entries": 0, "num_bytes": 0}
    try:
        for first in range(documents.start, documents.stop, work.block):
            texts = work.documents.read(range(first, min(first + work.block, documents.stop)))
            encoded = encoder.encode_batch(texts)
            lengths = np.fromiter((len(one.ids) for one in encoded), LENGTH, len(encoded))
            files["tokens"].write(_row([one.ids for one in encoded], token_dtype(encoder.vocab_size)))
            files["lengths"].write(lengths)
            if encoder.weighted:
                files["weights"].write(_row(_weights(encoded), np.dtype(np.uint8)))
            record["documents"] += len(encoded)  # of a pair two
            record["entries"] += int(lengths.sum())
            record["num_bytes"] += sum(len(text.encode()) for text in texts)
        record["files"] = {kind: file.finish() for kind, file in files.items()}
    finally:
        for file in files.values():
            file.close()
    journal = _Durable(path_of(work.directory, number, "json"))
    journal.write(json.dumps(record, sort_keys=True).encode())
    journal.finish()
    return record


def _row(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype, casting="unsafe")


def _weights(encoded: list[Encoded]) -> list[np.ndarray]:
    for one in encoded:
        assert one.weights is not None and one.weights.shape == one.ids.shape
    return [one.weights for one in encoded if one.weights is not None]


class _Durable:
    """A file that has its name only once all of it is on the disk. Two makers of one shard do not collide."""

    def __init__(self, path: Path):
        self.path, self.aside = path, path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        self.file: BinaryIO = open(self.aside, "wb")
        self.hash, self.size = hashlib.sha256(), 0

    def write(self, values: np.ndarray | bytes) -> None:
        raw = values if isinstance(values, bytes) else values.tobytes()
        self.file.write(raw)
        self.hash.update(raw)
        self.size += len(raw)

    def finish(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.aside, self.path)
        return {"sha256": self.hash.hexdigest(), "bytes": self.size}

    def close(self) -> None:
        self.file.close()
        self.aside.unlink(missing_ok=True)


def make_shards(
    work: ShardTask,
    cut: list[range],
    inputs: dict[str, Any],
    engine: Engine,
    *,
    workers: int,
    advance: Callable[[int], None],
) -> list[Record]:
    """Return the record of every shard in order, all of them made by now; finished ones are only checked.

    `inputs` is everything that decides what a shard holds: work begun with others is thrown away.
    """
    job = digest_of({**inputs, "cut": [[part.start, part.stop] for part in cut]})
    records = _finished(work.directory, job, len(cut), workers)
    advance(sum(record["documents"] for record in records.values()))
    missing = {number: part for number, part in enumerate(cut) if number not in records}
    for record in engine(work, missing) if missing else ():
        records[record["number"]] = record
        advance(record["documents"])
    return [records[number] for number in range(len(cut))]


def _finished(directory: Path, job: str, count: int, workers: int) -> dict[int, Record]:
    """Return the records whose files are what they say."""
    named = directory / "job"
    if not named.exists() or named.read_text("utf-8") != job:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        named.write_text(job, "utf-8")
    for leftover in directory.glob(".*"):
        leftover.unlink()
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda number: _sound(directory, number), range(count))
        return {record["number"]: record for record in found if record is not None}


def record_of(directory: Path, number: int) -> Record | None:
    """Return a shard's record, None where it has none."""
    try:
        return json.loads(path_of(directory, number, "json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _sound(directory: Path, number: int) -> Record | None:
    record = record_of(directory, number)
    if record is None:
        return None
    try:
        for kind, entry in record["files"].items():
            path = path_of(directory, number, kind)
            if path.stat().st_size != entry["bytes"] or file_digest(path) != entry["sha256"]:
                return None
    except (OSError, KeyError):
        return None
    return record


def lengths_of(directory: Path, record: Record) -> Int[np.ndarray, " D"]:
    """Return the entries of each of a shard's documents."""
    return np.fromfile(path_of(directory, record["number"], "lengths"), LENGTH)


def local_engine(workers: int) -> Engine:
    """Return the engine that works on this machine: in this process, or in `workers` spawned ones."""

    def make(work: ShardTask, shards: dict[int, range]) -> Iterator[Record]:
        if workers == 1 or len(shards) == 1:
            encoder = work.encoding.open()
            for number, documents in shards.items():
                yield write_shard(work, encoder, number, documents)
            return
        yield from _spawned(work, shards, workers)

    return make


def _spawned(work: ShardTask, shards: dict[int, range], workers: int) -> Iterator[Record]:
    # Spawned, never forked: JAX and the tokenizer have threads by now, and a forked child would inherit their
    # locks. A spawned child imports the main script anew, so a script that gets here needs
    # `if __name__ == "__main__":`.
    pool = ProcessPoolExecutor(
        min(workers, len(shards)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(work,),
    )
    try:
        for future in as_completed([pool.submit(_run_job, *shard) for shard in shards.items()]):
            yield future.result()
    except BrokenProcessPool:
        raise Stopped(
            f"data.workers={workers}: a tokenizing process died (out of memory, or a main script without "
            '`if __name__ == "__main__":`); use fewer workers'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[ShardTask, Encoder]


def _start_worker(work: ShardTask) -> None:
    global _worker
    as_worker()
    # As many processes as there are to be used, so none needs the library's threads as well.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (work, work.encoding.open())


def _run_job(number: int, documents: range) -> Record:
    return write_shard(*_worker, number, documents)
