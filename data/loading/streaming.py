"""Streaming: documents tokenized on the fly, with a small exact state.

Each row of the batch reads a document of its own (a lane); a lane that reaches its document's end takes the
next one from a queue that all lanes share. The queue is the documents in a seeded order, epoch after epoch,
so each is read exactly once an epoch. The state is the queue's position and, per lane, which document it
reads and from where. Every host tokenizes the whole global batch and keeps its rows: exact on any number of
hosts, at the price of that work.

With V virtual shards there are V such streams: shard v has the documents v, v + V, v + 2V ... and the v-th of
V groups of rows, with a queue and epochs of its own. A host reads only the shards whose rows it is asked for,
so that tokenizing is shared out; it must be asked for whole groups.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.config import DataConfig, shards_problem
from data.errors import DataError
from data.loading.input_timing import stage
from data.loading.packing import empty_batch, permutation
from data.sources.documents import Documents
from data.tokens.tokenizer import Tokenizer

AHEAD = 128  # documents tokenized together: enough for the library's threads


class Stream:
    """Batches [B, T] in order; document k of the queue is entry k modulo n of epoch k // n.

    `shard`: (v, V) for the stream of shard v of V.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        batch_size: int,
        seq_len: int,
        seed: int,
        shard: tuple[int, int] | None = None,
    ):
        self.documents, self.tokenizer, self.seed = documents, tokenizer, seed
        self.batch_size, self.seq_len, self.shard = batch_size, seq_len, shard
        first, stride = shard or (0, 1)
        self.num_documents = len(range(first, len(documents), stride))
        self._ready: dict[int, np.ndarray] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._set(step=0, queue=batch_size, lanes=[[k, 0] for k in range(batch_size)])

    def batch(self, step: int, rows: slice | np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the next batch, or these rows of it; `step` must be the one that is due."""
        if step != self.step:
            raise DataError(
                f"data.mode=streaming is read in order: step {self.step} is due, not {step}; "
                "use data.mode=cached"
            )
        batch = empty_batch(self.batch_size, self.seq_len)
        for row in range(self.batch_size):
            self._fill_row({key: value[row] for key, value in batch.items()}, row)
        self.step += 1
        return batch if rows is None else {key: value[rows] for key, value in batch.items()}

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, json-able: two integers a lane."""
        lanes = [[int(k), int(at)] for k, at in zip(self.reading, self.at, strict=True)]
        return {"mode": "streaming", "step": self.step, "queue": self.queue, "lanes": lanes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a state. Raises DataError where it has another number of lanes, or of shards."""
        if state.get("virtual_shards", 0):
            raise DataError(
                f"data.virtual_shards=0 cannot go on from a stream of {state['virtual_shards']}; "
                "keep the number, or start a new run with run.name="
            )
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
            with stage("tokenize"):
                for j, ids in zip(wanted, self.tokenizer.encode_batch(texts), strict=True):
                    framed = np.empty(len(ids) + 2, np.int32)
                    framed[0], framed[1:-1], framed[-1] = self.tokenizer.bos_id, ids, self.tokenizer.eos_id
                    self._ready[j] = framed
        return self._ready.pop(k)

    def _index(self, k: int) -> int:
        epoch, entry = divmod(k, self.num_documents)
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(
                self.num_documents, self.seed, epoch, 0, *(self.shard or ())[:1]
            )
        first, stride = self.shard or (0, 1)
        return first + stride * int(self._orders[epoch][entry])


class Shards:
    """V streams side by side: shard v has the rows [v * B / V, (v + 1) * B / V) of each batch [B, T].

    A shard that no rows were asked of stands still, and is left out of `state`; the others are at one step.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        batch_size: int,
        seq_len: int,
        seed: int,
        shards: int,
    ):
        if reason := shards_problem(shards, batch_size):
            raise DataError(reason)
        if shards > len(documents):
            raise DataError(
                f"data.virtual_shards={shards} is more than the {len(documents)} documents of the train "
                f"split; use at most {len(documents)}"
            )
        self.batch_size, self.rows = batch_size, batch_size // shards
        self.seq_len, self.num_documents, self.step = seq_len, len(documents), 0
        self.streams = [
            Stream(documents, tokenizer, self.rows, seq_len, seed, (v, shards)) for v in range(shards)
        ]

    def batch(self, step: int, rows: slice | np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the next batch, or these rows of it. Raises DataError where they are not whole shards."""
        parts = [self.streams[v].batch(step) for v in self.of_rows(rows)]
        self.step = step + 1
        if not parts:
            return empty_batch(0, self.seq_len)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def of_rows(self, rows: slice | np.ndarray | None) -> list[int]:
        """Return the shards that these rows are. Raises DataError where they are not whole shards."""
        everything = np.arange(self.batch_size)
        wanted = everything if rows is None else everything[rows]
        counts = np.bincount(wanted // self.rows, minlength=len(self.streams))
        split = np.flatnonzero((counts > 0) & (counts < self.rows))
        if len(split):
            v, shards = int(split[0]), len(self.streams)
            hosts = ", ".join(str(n) for n in range(1, shards + 1) if shards % n == 0)
            raise DataError(
                f"data.virtual_shards={shards}: a host with {len(wanted)} of the {self.batch_size} rows of a "
                f"batch has {counts[v]} of the {self.rows} rows of shard {v}; use a number of hosts that "
                f"divides the shards ({hosts}), each with rows of its own, or data.virtual_shards=0"
            )
        return np.flatnonzero(counts).tolist()

    def state(self) -> dict[str, Any]:
        """Return where the shards that were read stand after the last batch, json-able."""
        here = {str(v): stream.state() for v, stream in enumerate(self.streams) if stream.step == self.step}
        shards = {v: {"queue": state["queue"], "lanes": state["lanes"]} for v, state in here.items()}
        return {
            "mode": "streaming",
            "step": self.step,
            "virtual_shards": len(self.streams),
            "shards": shards,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a whole state. Raises DataError where it has another number of shards, or lacks one."""
        there, mine = state.get("virtual_shards", 0), len(self.streams)
        if there != mine:
            raise DataError(
                f"data.virtual_shards={mine} cannot go on from a stream of {there}; "
                "keep the number, or start a new run with run.name="
            )
        _check_whole(state)
        for v, stream in enumerate(self.streams):
            stream.restore({"step": state["step"], **state["shards"][str(v)]})
        self.step = int(state["step"])


def open_stream(
    documents: Documents, tokenizer: Tokenizer, data: DataConfig, batch_size: int, seed: int
) -> Stream | Shards:
    """Return the stream that `data` asks for, at its beginning."""
    if data.virtual_shards:
        return Shards(documents, tokenizer, batch_size, data.seq_len, seed, data.virtual_shards)
    return Stream(documents, tokenizer, batch_size, data.seq_len, seed)


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one state of the states of all hosts of a job, after the same step.

    Hosts that read the same shard, or everything, have the same to say of it. Raises DataError where a shard
    is missing or two hosts stand at different steps.
    """
    if any((state["step"], state["mode"]) != (states[0]["step"], states[0]["mode"]) for state in states):
        raise DataError("the hosts of this job stand at different steps of the data; start the command again")
    if "shards" not in states[0]:
        return dict(states[0])
    shards = {v: at for state in states for v, at in state["shards"].items()}
    whole = {**states[0], "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}
    _check_whole(whole)
    return whole


def _check_whole(state: dict[str, Any]) -> None:
    missing = [str(v) for v in range(state["virtual_shards"]) if str(v) not in state["shards"]]
    if missing:
        raise DataError(
            f"data.virtual_shards={state['virtual_shards']}: the saved position lacks shard "
            f"{', '.join(missing)}; start a new run with run.name="
        )
