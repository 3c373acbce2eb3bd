"""The token store: a corpus split tokenized once, memory-mapped ever after.

`tokens.bin` holds each document as [bos] t1 .. tn [eos] (uint16, or uint32 past 65536 ids), `offsets.npy`
where each begins. The inputs of a document are its first n+1 entries and its targets the last n+1, so the
target at an address is simply the next entry: packing never has to ask where a document ends. Where the
encoding gives weights, `weights.bin` holds one uint8 an entry: what it counts in the loss as a target.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt8

from data.cache import verify
from data.encoding import Encoded, Encoder, Encoding
from data.errors import DataError
from data.sources import Documents

JOB_BYTES = 2 << 20  # text that a worker tokenizes at a time


@dataclass(frozen=True)
class TokenStore:
    """Tokenized documents of one split, in TFDS's order.

    `num_tokens` counts targets: every document's tokens and one separator. `num_bytes` counts the text's
    UTF-8 bytes.
    """

    path: Path
    tokens: Integer[np.ndarray, " N"]
    offsets: Int[np.ndarray, " D1"]  # num_documents + 1
    token_bytes: Int[np.ndarray, " V"]
    num_bytes: int
    bos_id: int
    eos_id: int
    weights: UInt8[np.ndarray, " N"] | None = None  # of each entry as a target; None: all count

    @classmethod
    def open(cls, path: str | Path, *, contents: bool = True) -> "TokenStore":
        """Map a store, every file's sha256 checked. Raises DataError when one is missing or corrupt.

        Without `contents` only sizes are checked: where another process has just read it all.
        """
        path = Path(path)
        about = verify(path, contents=contents)
        weights = path / "weights.bin"
        return cls(
            path=path,
            tokens=np.memmap(path / "tokens.bin", dtype=about["dtype"], mode="r"),
            offsets=np.load(path / "offsets.npy"),
            token_bytes=np.load(path / "token_bytes.npy"),
            num_bytes=about["num_bytes"],
            bos_id=about["bos_id"],
            eos_id=about["eos_id"],
            weights=np.memmap(weights, dtype=np.uint8, mode="r") if weights.exists() else None,
        )

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """How many targets an epoch has: tokens, and one separator a document."""
        return int(self.offsets[-1]) - self.num_documents

    def framed_weights(self) -> Iterator[UInt8[np.ndarray, " T"]] | None:
        """Yield the weights of each document's entries, as `framed` its entries; None where all count."""
        if self.weights is None:
            return None
        weights, ends = self.weights, self.starts + self.lengths + 1
        return (weights[start:end] for start, end in zip(self.starts, ends, strict=True))

    @property
    def learnt_bytes(self) -> int:
        """UTF-8 bytes of the targets that count."""
        if self.weights is None:
            return self.num_bytes
        return int(self.token_bytes[self.tokens[np.flatnonzero(self.weights)]].sum())

    @property
    def starts(self) -> Int[np.ndarray, " D"]:
        """Address of each document's bos."""
        return self.offsets[:-1]

    @property
    def lengths(self) -> Int[np.ndarray, " D"]:
        """Inputs (equally, targets) of each document."""
        return np.diff(self.offsets) - 1

    def document(self, index: int) -> Int[np.ndarray, " T"]:
        """Return [bos] + tokens of a document, int32."""
        return np.asarray(self.tokens[self.offsets[index] : self.offsets[index + 1] - 1], dtype=np.int32)

    def framed(self) -> Iterator[Integer[np.ndarray, " T"]]:
        """Yield each document as stored: [bos] + tokens + [eos]."""
        for index in range(self.num_documents):
            yield self.tokens[self.offsets[index] : self.offsets[index + 1]]


def write_store(
    directory: Path,
    documents: Documents,
    encoding: Encoding,
    *,
    workers: int,
    about: dict[str, Any],
    advance: Callable[[int], None] = lambda documents: None,
) -> None:
    """Tokenize a split into `directory` and add to `about` what `TokenStore.open` reads from the manifest.

    The bytes written do not depend on `workers`: jobs are cut by document number and written in that order.
    """
    encoder = encoding.open()
    dtype = _dtype(encoder)
    lengths, num_bytes = [], 0
    with contextlib.ExitStack() as files:
        file = files.enter_context(open(directory / "tokens.bin", "wb"))
        weighing = open(directory / "weights.bin", "wb") if encoder.weighted else None
        weights_file = files.enter_context(weighing) if weighing else None
        for tokens, weights, counts, text_bytes in _tokenized(documents, encoding, workers):
            file.write(tokens.tobytes())
            if weights_file is not None:
                weights_file.write(weights.tobytes())
            lengths.append(counts)
            num_bytes += text_bytes
            advance(len(counts))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    np.save(directory / "offsets.npy", offsets)
    np.save(directory / "token_bytes.npy", encoder.token_bytes())
    about |= {
        "dtype": dtype.str,
        "num_bytes": num_bytes,
        "bos_id": encoder.bos_id,
        "eos_id": encoder.eos_id,
    }


def _dtype(encoder: Encoder) -> np.dtype:
    return np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")


def _tokenized(documents: Documents, encoding: Encoding, workers: int) -> Iterator[tuple]:
    jobs = _jobs(documents)
    if workers == 1 or len(jobs) == 1:
        encoder = encoding.open()
        yield from (_tokenize(documents, encoder, job) for job in jobs)
        return
    # Spawned, never forked: JAX and the tokenizer have threads by now, and a forked child would inherit their
    # locks. A spawned child imports the main script anew, so a script that gets here needs
    # `if __name__ == "__main__":`.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(documents, encoding),
    )
    try:
        yield from _in_order(pool, jobs, ahead=2 * workers)
    except BrokenProcessPool:
        raise DataError(
            f"data.workers={workers}: a tokenizing process died (out of memory, or a main script without "
            '`if __name__ == "__main__":`); use fewer workers'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _jobs(documents: Documents) -> list[range]:
    """Cut the split into runs of documents of about JOB_BYTES each."""
    count = len(documents)
    size = max(1, min(4096, count * JOB_BYTES // max(documents.num_bytes, 1)))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _in_order(pool: ProcessPoolExecutor, jobs: list[range], ahead: int) -> Iterator[tuple]:
    """Yield results in the order of jobs with only a few in flight: memory stays bounded however large the
    corpus.
    """
    pending: deque[Future] = deque()
    for job in jobs:
        pending.append(pool.submit(_run_job, job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker: tuple[Documents, Encoder]


def _start_worker(documents: Documents, encoding: Encoding) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (documents, encoding.open())


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when it is gone, killed too
        os._exit(1)


def _run_job(job: range) -> tuple:
    return _tokenize(*_worker, job)


def _tokenize(documents: Documents, encoder: Encoder, job: range) -> tuple:
    """Return (entries of all documents in a row, their weights or None, entries of each, bytes of text)."""
    texts = documents.read(job)
    encoded = encoder.encode_batch(texts)
    counts = np.array([len(one.ids) for one in encoded], dtype=np.int64)
    # Narrow before the trip through the pipe: it is most of what a worker sends.
    tokens = np.concatenate([one.ids for one in encoded]).astype(_dtype(encoder))
    weights = _weights(encoded) if encoder.weighted else None
    return tokens, weights, counts, sum(len(text.encode()) for text in texts)


def _weights(encoded: list[Encoded]) -> np.ndarray:
    for one in encoded:
        assert one.weights is not None and one.weights.shape == one.ids.shape
    return np.concatenate([np.asarray(one.weights, np.uint8) for one in encoded])
