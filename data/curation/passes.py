"""Steps in passes over a corpus: nothing is written until the last, and memory holds no document for long.

Steps that decide on a document alone run together, in worker processes. One that must see all ends a pass:
the workers send signatures, the parent decides, and the next pass reads what was kept. Text changes only in
`mask_pii`, so a later pass masks again instead of having stored the result.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from data.curation.base import SPLITS, DocumentTable, GlobalStep, LocalStep, Verdict
from data.curation.length import EDGES as LENGTHS
from data.curation.tally import EXAMPLES, Tally, rank_of, shortened
from data.errors import DataError
from data.sources.documents import Documents
from data.tokens.workers import as_worker

JOB_BYTES = 1 << 20  # text that a worker takes at a time
PARALLEL_BYTES = 16 << 20  # a smaller corpus is done before a worker has started
BEFORE_MASK = 100  # characters that an example shows before what was masked
WHOLE = -1  # the tally of the corpus as a whole


@dataclass(frozen=True)
class BothSplits:
    """Both splits as one row of documents, validation first. Picklable."""

    splits: dict[str, Documents]

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    @property
    def offset(self) -> int:
        """The number of the first train document."""
        return len(self.splits["validation"])

    def place(self, number: int) -> tuple[str, int]:
        """Return (split, index in it) of a document."""
        return ("validation", number) if number < self.offset else ("train", number - self.offset)

    def read(self, split: str, numbers: Int[np.ndarray, " N"]) -> list[dict[str, Any]]:
        """Return the records of documents of one split, the text of each under `""`."""
        first = 0 if split == "validation" else self.offset
        documents = self.splits[split]
        return documents.records([int(number) - first for number in numbers])


@dataclass
class Pass:
    """One reading of the corpus: masks applied before, steps by number, and what ends it."""

    masks: list[LocalStep] = field(default_factory=list)
    steps: list[tuple[int, LocalStep]] = field(default_factory=list)
    last: tuple[int, GlobalStep] | None = None  # None: the documents are what comes out
    first: bool = False  # counts the corpus before all steps
    hide: list[LocalStep] = field(default_factory=list)  # masks for what the report shows


@dataclass
class Done:
    """What comes of a job: numbers of the documents that are left, and signatures or (text, path) of each."""

    numbers: Int[np.ndarray, " N"]
    signatures: UInt64[np.ndarray, "N K"] | None
    documents: list[tuple[str, str]]
    tallies: dict[int, Tally]
    names: dict[int, str] = field(default_factory=dict)  # of strata, by their hash


def text_of(value: Any) -> str:
    """Return a record's field as text."""
    return (
        value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    )


def path_of(record: dict[str, Any], split: str, index: int) -> str:
    """Return where a document came from: its `path`, or else its number in the source."""
    return text_of(record.get("path")) or f"{split}:{index}"


def run_job(source: BothSplits, what: Pass, split: str, numbers: Int[np.ndarray, " N"]) -> Done:
    """Read the documents of those numbers and put them through the steps of a pass."""
    records = source.read(split, numbers)
    texts = [record[""] for record in records]
    tallies: dict[int, Tally] = {}
    whole = tallies[WHOLE] = Tally()
    if what.first:
        _count_whole(whole, split, texts, 0)
    for mask in what.masks:
        texts = [mask.apply(text).text for text in texts]
    rows = np.arange(len(texts))
    for number, step in what.steps:
        kept, texts, tallies[number] = _one_step(step, what.hide, split, numbers[rows], texts)
        rows = rows[kept]
    signatures = None
    names: dict[int, str] = {}
    documents: list[tuple[str, str]] = []
    if what.last is not None:
        field_ = what.last[1].field
        values = [_field(records[row], field_, source.splits[split]) for row in rows] if field_ else []
        signatures = what.last[1].sign(texts, values or [""] * len(texts))
        names = what.last[1].names
        sizes = np.array([len(text.encode()) for text in texts], np.uint64).reshape(-1, 1)
        signatures = np.concatenate([sizes, signatures.reshape(len(texts), -1)], axis=1)
    else:
        first = 0 if split == "validation" else source.offset
        paths = [path_of(records[row], split, int(numbers[row]) - first) for row in rows]
        documents = list(zip(texts, paths, strict=True))
        _count_whole(whole, split, texts, 1)
    return Done(numbers[rows], signatures, documents, tallies, names)


def _count_whole(tally: Tally, split: str, texts: list[str], side: int) -> None:
    """Count the corpus before all steps (side 0) or after them (side 1)."""
    tally.documents[split][side] += len(texts)
    tally.bytes[split][side] += sum(len(text.encode()) for text in texts)
    lengths = np.clip([len(text) for text in texts], LENGTHS[0], LENGTHS[-1])
    histogram = tally.histograms.setdefault("characters", np.zeros((2, len(LENGTHS) - 1), np.int64))
    histogram[side] += np.histogram(lengths, LENGTHS)[0]


def _field(record: dict[str, Any], name: str, documents: Documents) -> str:
    if name not in record:
        keys = ", ".join(sorted(key for key in record if key))
        raise DataError(f"data.steps: sample by={name} is no field of {documents.directory}; it has {keys}")
    return text_of(record[name])


def _one_step(
    step: LocalStep, hide: list[LocalStep], split: str, numbers: Int[np.ndarray, " N"], texts: list[str]
) -> tuple[Bool[np.ndarray, " N"], list[str], Tally]:
    tally = Tally()
    outcomes = [step.apply(text) for text in texts]
    kept = np.array([outcome.reason is None for outcome in outcomes], bool)
    for number, text, outcome in zip(numbers, texts, outcomes, strict=True):
        dropped = outcome.reason is not None
        after = None if dropped else len(outcome.text.encode())
        tally.count(split, len(text.encode()), after, outcome.reason)
        tally.counts.update(outcome.counts)
        if dropped or outcome.text != text:
            rank = rank_of(int(number))
            if len(tally.examples) < EXAMPLES or rank < tally.examples[-1][0]:
                # Of a masked document, the place that was masked first.
                start = (
                    0 if dropped else max(0, len(os.path.commonprefix([text, outcome.text])) - BEFORE_MASK)
                )
                shown = {"split": split, "number": int(number), "reason": outcome.reason or "masked"}
                tally.show(rank, shown | {"text": shortened(hidden(outcome.text, hide)[start:]), "note": ""})
    for name, edges in step.edges.items():
        tally.measure(name, edges, [outcome.values[name] for outcome in outcomes], kept)
    return kept, [o.text for o, k in zip(outcomes, kept, strict=True) if k], tally


def hidden(text: str, masks: list[LocalStep]) -> str:
    """Return the text with what the corpus masks masked: a report must not give away what a corpus hides."""
    for mask in masks:
        text = mask.apply(text).text
    return text


def decide(
    what: Pass, source: BothSplits, numbers: Int[np.ndarray, " N"], signatures: UInt64[np.ndarray, "N K"]
) -> tuple[Int[np.ndarray, " M"], Tally, dict[str, Any]]:
    """Let the step that ends a pass decide; return what is left, what it counted, and its details."""
    assert what.last is not None
    is_train = numbers >= source.offset

    def read(row: int) -> str:
        number = int(numbers[row])
        text = source.read(source.place(number)[0], np.array([number]))[0][""]
        for mask in [*what.masks, *(step for _, step in what.steps)]:
            text = mask.apply(text).text
        return text

    sizes = signatures[:, 0].astype(np.int64)
    decision = what.last[1].decide(DocumentTable(signatures[:, 1:], is_train, read))
    return (
        numbers[decision.keep],
        _of_decision(decision, numbers, is_train, sizes, read, what),
        decision.details,
    )


def _of_decision(
    decision: Verdict,
    numbers: Int[np.ndarray, " N"],
    is_train: Bool[np.ndarray, " N"],
    sizes: Int[np.ndarray, " N"],
    read: Callable[[int], str],
    what: Pass,
) -> Tally:
    tally = Tally()
    for split in SPLITS:
        mine = is_train == (split == "train")
        tally.documents[split] = [int(mine.sum()), int((mine & decision.keep).sum())]
        tally.bytes[split] = [int(sizes[mine].sum()), int(sizes[mine & decision.keep].sum())]
        for number, reason in enumerate(decision.reasons):
            count = int((mine & ~decision.keep & (decision.reason == number)).sum())
            if count:
                tally.reasons[split][reason] = count
    for name, values in decision.values.items():
        tally.measure(name, decision.edges[name], values, decision.keep)
    dropped = sorted((rank_of(int(numbers[row])), int(row)) for row in np.flatnonzero(~decision.keep))
    for rank, row in dropped[:EXAMPLES]:
        split = "train" if is_train[row] else "validation"
        about = {
            "split": split,
            "number": int(numbers[row]),
            "reason": decision.reasons[decision.reason[row]],
        }
        tally.show(
            rank, about | {"text": shortened(hidden(read(row), what.hide)), "note": decision.note(row)}
        )
    return tally


def jobs_of(source: BothSplits, numbers: Int[np.ndarray, " N"]) -> list[tuple[str, np.ndarray]]:
    """Cut documents into runs of one split and about JOB_BYTES: by their numbers alone, not by workers."""
    total = sum(documents.num_bytes for documents in source.splits.values())
    size = max(1, min(1024, len(source) * JOB_BYTES // max(total, 1)))
    jobs = []
    for split in SPLITS:
        mine = numbers[(numbers >= source.offset) == (split == "train")]
        jobs += [(split, mine[first : first + size]) for first in range(0, len(mine), size)]
    return jobs


def run_pass(
    source: BothSplits, what: Pass, numbers: Int[np.ndarray, " N"], workers: int
) -> Iterator[tuple[str, Done]]:
    """Yield (split, what came of it) of each job, in the order of the corpus, a few jobs ahead at most."""
    jobs = jobs_of(source, numbers)
    sizes = [documents.num_bytes for documents in source.splits.values()]  # 0 where nobody has counted
    small = 0 not in sizes and sum(sizes) < PARALLEL_BYTES
    if workers == 1 or len(jobs) == 1 or small:
        yield from ((split, run_job(source, what, split, mine)) for split, mine in jobs)
        return
    # Spawned, never forked, as in data.tokens.store: a forked child would inherit locks that threads hold.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(source, what),
    )
    pending: deque[tuple[str, Future]] = deque()
    try:
        for split, mine in jobs:
            pending.append((split, pool.submit(_work, split, mine)))
            if len(pending) > 2 * workers:
                ready, future = pending.popleft()
                yield ready, future.result()
        for ready, future in pending:
            yield ready, future.result()
    except BrokenProcessPool:
        raise DataError(
            f"data.workers={workers}: a process of data.steps died (out of memory, or a main script without "
            '`if __name__ == "__main__":`); use fewer workers'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[BothSplits, Pass]


def _start_worker(source: BothSplits, what: Pass) -> None:
    global _worker
    as_worker()
    _worker = (source, what)


def _work(split: str, numbers: np.ndarray) -> Done:
    return run_job(*_worker, split, numbers)
