"""Streaming: documents tokenized on the fly, with a small exact state.

Each row of the batch reads a document of its own (a lane); a lane that reaches its document's end takes the
next one from a queue that all lanes share. The queue is the documents in a seeded order, epoch after epoch,
so each is read exactly once an epoch. The state is the queue's position and, per lane, which document it
reads and from where. Every host tokenizes the whole global batch and keeps its rows: exact on any number of
hosts, at the price of that work.
"""

from typing import Any

import numpy as np

from data.errors import DataError
from data.packing import empty_batch, permutation
from data.sources import Documents
from data.stages import stage
from data.tokenizer import Tokenizer

AHEAD = 32  # documents tokenized together


class Stream:
    """Batches [B, T] in order; document k of the queue is entry k modulo n of epoch k // n."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, batch_size: int, seq_len: int, seed: int):
        self.documents, self.tokenizer, self.seed = documents, tokenizer, seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self.num_documents = len(documents)
        self._ready: dict[int, np.ndarray] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._set(step=0, queue=batch_size, lanes=[[k, 0] for k in range(batch_size)])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return the next batch; `step` must be the one that is due."""
        if step != self.step:
            raise DataError(
                f"data.mode=streaming is read in order: step {self.step} is due, not {step}; "
                "use data.mode=cached"
            )
        batch = empty_batch(self.batch_size, self.seq_len)
        for row in range(self.batch_size):
            self._fill_row({key: value[row] for key, value in batch.items()}, row)
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, json-able: two integers a lane."""
        lanes = [[int(k), int(at)] for k, at in zip(self.reading, self.at, strict=True)]
        return {"mode": "streaming", "step": self.step, "queue": self.queue, "lanes": lanes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a state. Raises DataError where it has another number of lanes."""
        if len(state["lanes"]) != self.batch_size:
            raise DataError(
                f"training.global_batch_size={self.batch_size} cannot go on from a stream of "
                f"{len(state['lanes'])} rows; keep the batch size, or start a new run with run.name="
            )
        self._set(step=state["step"], queue=state["queue"], lanes=state["lanes"])

    def _set(self, *, step: int, queue: int, lanes: list[list[int]]) -> None:
        self.step, self.queue = step, queue
        self.reading = [k for k, _ in lanes]
        self.at = [at for _, at in lanes]
        self._text: list[np.ndarray | None] = [
            None
        ] * self.batch_size  # each lane's document, read when needed

    def _fill_row(self, row: dict[str, np.ndarray], lane: int) -> None:
        filled, segment = 0, 0
        while filled < self.seq_len:
            ids, at = self._lane_document(lane)
            count = min(self.seq_len - filled, len(ids) - 1 - at)
            segment += 1
            there = slice(filled, filled + count)
            row["tokens"][there] = ids[at : at + count]
            row["targets"][there] = ids[at + 1 : at + count + 1]
            row["positions"][there] = np.arange(count)
            row["segment_ids"][there] = segment
            row["loss_weights"][there] = 1.0
            filled += count
            self.at[lane] += count

    def _lane_document(self, lane: int) -> tuple[np.ndarray, int]:
        ids = self._text[lane]
        if ids is None:
            ids = self._framed(self.reading[lane])
        if self.at[lane] == len(ids) - 1:  # read to its end: take the next of the queue
            self.reading[lane], self.at[lane] = self.queue, 0
            self.queue += 1
            ids = self._framed(self.reading[lane])
        self._text[lane] = ids
        return ids, self.at[lane]

    def _framed(self, k: int) -> np.ndarray:
        """Return [bos] t1 .. tn [eos] of the queue's document k, which no other lane will ask for."""
        if k not in self._ready:
            # Reading ahead starts at the queue's head only: what other lanes hold is not made again.
            wanted = range(k, k + (AHEAD if k + 1 >= self.queue else 1))
            with stage("plan"):
                entries = [self._index(j) for j in wanted]
            with stage("read"):
                texts = self.documents.read(entries)
            bos, eos = [self.tokenizer.bos_id], [self.tokenizer.eos_id]
            with stage("tokenize"):
                for j, ids in zip(wanted, self.tokenizer.encode_batch(texts), strict=True):
                    self._ready[j] = np.concatenate([bos, ids, eos]).astype(np.int32)
        return self._ready.pop(k)

    def _index(self, k: int) -> int:
        epoch, entry = divmod(k, self.num_documents)
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(self.num_documents, self.seed, epoch, 0)
        return int(self._orders[epoch][entry])
