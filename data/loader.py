"""Batches: by step from a token store (`cached`), or in order from documents (`streaming`).

A batch is a dict of [B, T] arrays: tokens, targets, positions, segment_ids (int32; 0 pads, 1.. number a row's
pieces) and loss_weights (float32).
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data.ahead import Ahead
from data.config import DataConfig
from data.errors import DataError
from data.packing import Plan, empty_batch, fill, make_plan, permutation
from data.pipeline import Prepared
from data.stages import Seconds, Stages, copying, stage
from data.store import TokenStore
from data.streaming import Stream

DOCUMENTS, ROWS = 0, 1  # what a permutation's key is for
NEAR = 8  # in the last 1/8 of an epoch the next one's plan is made
Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray | None  # of a global batch: a range, increasing row numbers, or all


class Loader:
    """Batches of `global_batch_size` rows, the same whatever the number of hosts: each asks for its own rows.

    Cached: `batch(step)` is a pure function of (seed, step); steps count from 0 and may come in any order.
    Every epoch visits documents and rows in another order, its last row padded, and a batch may span two
    epochs. Streaming: steps are asked for in order, and `restore(state())` goes on with exactly the next
    batch.
    """

    def __init__(
        self,
        source: Prepared | TokenStore,
        data: DataConfig,
        *,
        global_batch_size: int,
        seed: int,
        split: str = "train",
    ):
        self.data, self.batch_size, self.seed = data, global_batch_size, seed
        self._step = 0
        self._stream: Stream | None = None
        if isinstance(source, Prepared) and source.documents is not None and split == "train":
            self._stream = Stream(source.documents, source.tokenizer, global_batch_size, data.seq_len, seed)
            return
        store = getattr(source, split) if isinstance(source, Prepared) else source
        assert store is not None
        self._epochs = _Epochs(store, data, seed)
        self._store = store

    def batch(self, step: int, rows: Rows = None) -> Batch:
        """Return the batch of a 0-based step, or only the given rows of it: each array [B, T].

        `rows`: a slice or increasing row numbers; cached rows that are not asked for cost nothing.
        """
        if self._stream is not None:
            batch = self._stream.batch(step)
            self._step = step + 1
            return batch if rows is None else {key: value[rows] for key, value in batch.items()}
        self._step = step + 1
        wanted = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        wanted = wanted if rows is None else wanted[rows]
        batch = empty_batch(len(wanted), self.data.seq_len)
        while len(wanted):
            plan, order, first, end = self._epochs.containing(int(wanted[0]))
            here = wanted < end
            where = np.flatnonzero(here) + len(batch["tokens"]) - len(wanted)
            rows_here = order[wanted[here] - first]
            fill(batch, where, self._store.tokens, plan, rows_here, weights=self._store.weights)
            wanted = wanted[~here]
        return batch

    def state(self) -> dict[str, Any]:
        """Return where the loader stands, json-able: after the last batch asked for."""
        if self._stream is not None:
            return self._stream.state()
        return {"mode": "cached", "step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a state. Raises DataError where it was made with another mode or batch size."""
        if state.get("mode") != self.data.mode:
            raise DataError(
                f"data.mode={self.data.mode} cannot go on from a position saved in mode {state.get('mode')}; "
                "keep the mode, or start a new run with run.name="
            )
        if self._stream is not None:
            self._stream.restore(state)
        self._step = int(state["step"])

    def describe(self) -> str:
        """Say in one line what is read and how."""
        data = self.data
        if self._stream is not None:
            return f"streaming, concat: {self._stream.num_documents:,} documents in rows of {data.seq_len}"
        store, (plan, _, _, rows) = self._store, self._epochs.containing(0)
        full = store.num_tokens / (plan.num_rows * data.seq_len)
        learnt = ""
        if store.weights is not None:
            cut = int((store.lengths > data.seq_len).sum())
            learnt = f" ({np.count_nonzero(store.weights) / store.num_tokens:.1%} learnt)"
            learnt += f", {cut:,} longer than a row and cut," if cut and data.packing != "concat" else ""
        return (
            f"cached, {data.packing}: {store.num_documents:,} documents, {store.num_tokens:,} tokens{learnt} "
            f"in {rows:,} rows of {data.seq_len} ({full:.1%} full), "
            f"{rows / self.batch_size:,.1f} steps an epoch"
        )


class _Epochs:
    """Plans by epoch, the last two kept: a step at an epoch's edge needs both."""

    def __init__(self, store: TokenStore, data: DataConfig, seed: int):
        self.store, self.data, self.seed = store, data, seed
        self.kept: dict[int, tuple[Plan, np.ndarray]] = {}
        self.ends: list[int] = []  # global rows at each epoch's end, as far as known
        self.ahead = Ahead[tuple[Plan, np.ndarray]]()

    def containing(self, row: int) -> tuple[Plan, np.ndarray, int, int]:
        """Return (plan, order of its rows, first global row, end) of the epoch that holds a global row."""
        while not self.ends or self.ends[-1] <= row:
            self._extend(row)
        epoch = int(np.searchsorted(self.ends, row, side="right"))
        plan, order = self._plan(epoch)
        if self.ends[epoch] - row <= plan.num_rows // NEAR and epoch + 1 not in self.kept:
            self.ahead.start(epoch + 1, lambda: self._made(epoch + 1))  # no step waits at the epoch's edge
        return plan, order, self.ends[epoch] - plan.num_rows, self.ends[epoch]

    def _extend(self, row: int) -> None:
        first = self.ends[-1] if self.ends else 0
        if self.data.packing == "best_fit":  # its number of rows depends on the order: no closed form
            self.ends.append(first + self._plan(len(self.ends))[0].num_rows)
            return
        rows = self._plan(0)[0].num_rows
        more = (row - first) // rows + 1
        self.ends += [first + rows * (i + 1) for i in range(more)]

    def _plan(self, epoch: int) -> tuple[Plan, np.ndarray]:
        if epoch not in self.kept:
            with stage("plan"):
                made = self.ahead.take(epoch) or self._made(epoch)
            while len(self.kept) >= 2:
                del self.kept[next(iter(self.kept))]
            self.kept[epoch] = made
        return self.kept[epoch]

    def _made(self, epoch: int) -> tuple[Plan, np.ndarray]:
        order = permutation(self.store.num_documents, self.seed, epoch, DOCUMENTS)
        starts, lengths = self.store.starts[order], self.store.lengths[order]
        plan = make_plan(self.data.packing, starts, lengths, self.data.seq_len)
        return plan, permutation(plan.num_rows, self.seed, epoch, ROWS)


class EvalBatches:
    """Held-out batches in one fixed order, every target once; the last is padded with weight 0.

    Documents are concatenated whatever the training's packing, so that figures compare; conversations are
    packed whole, so that an answer keeps its question. Rows come shuffled by a fixed key: the first few
    batches are a fair sample, not one long document. `num_tokens` and `num_bytes` are what the batches cover
    of targets with weight: bits per byte = nll_sum / ln 2 / num_bytes. Raises DataError where there is none.
    """

    def __init__(self, store: TokenStore, data: DataConfig, *, batch_size: int, max_batches: int):
        self.store, self.batch_size, self.seq_len = store, batch_size, data.seq_len
        packing = "concat" if store.weights is None else "best_fit"
        self.plan = make_plan(packing, store.starts, store.lengths, data.seq_len)
        rows = permutation(self.plan.num_rows, 0)
        self.rows = rows if max_batches < 0 else rows[: max_batches * batch_size]
        if len(self.rows) == self.plan.num_rows and store.weights is None:
            self.num_tokens, self.num_bytes = store.num_tokens, store.num_bytes
        else:
            self.num_tokens, self.num_bytes = self._covered()
        if not self.num_bytes:
            raise DataError(
                f"eval.batches={max_batches} batches of {batch_size} rows hold nothing of an assistant; "
                "use more, or -1 for the whole split"
            )

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, rows: Rows = None) -> Iterator[Batch]:
        """All of them, or only the given rows of each."""
        return (self.batch(index, rows) for index in range(len(self)))

    def batch(self, index: int, rows: Rows = None) -> Batch:
        """Return one batch of [batch_size, seq_len] arrays, or only the given rows of it."""
        wanted = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        wanted = wanted if rows is None else wanted[rows]
        batch = empty_batch(len(wanted), self.seq_len)
        real = np.flatnonzero(wanted < len(self.rows))
        if len(real):  # a process may hold nothing but the last batch's padding
            here = self.rows[wanted[real]]
            fill(batch, real, self.store.tokens, self.plan, here, weights=self.store.weights)
        return batch

    def _covered(self) -> tuple[int, int]:
        tokens = num_bytes = 0
        for batch in self:
            real = batch["loss_weights"] > 0
            tokens += int(real.sum())
            num_bytes += int(self.store.token_bytes[batch["targets"][real]].sum())
        return tokens, num_bytes


def eval_batches(
    store: TokenStore, data: DataConfig, *, batch_size: int, max_batches: int = -1
) -> EvalBatches:
    """Return the held-out batches, all of them where `max_batches` is -1. They can be gone through again."""
    return EvalBatches(store, data, batch_size=batch_size, max_batches=max_batches)


class Prefetcher:
    """A thread that makes batches ahead, from step `start` on, `depth` at most waiting.

    `place` (such as a copy to devices) is applied in the thread. What the thread raises, `next` raises.
    `stages`: the seconds that the thread spent on the batch of the last `next`, by stage.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        start: int,
        depth: int = 2,
        rows: Rows = None,
        place: Callable[[Batch], Any] = lambda batch: batch,
    ):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self.stages: Seconds = {}
        self._thread = threading.Thread(target=self._work, args=(loader, start, rows, place), daemon=True)
        self._thread.start()

    def _work(self, loader: Loader, step: int, rows: Rows, place: Callable[[Batch], Any]) -> None:
        stages = Stages()
        try:
            while not self._closed.is_set():
                with stages.watching():
                    with copying(stages):
                        batch = loader.batch(step, rows)
                    with stage("place"):
                        placed = place(batch)
                self._put((placed, loader.state(), stages.take()))
                step += 1
        except (
            BaseException
        ) as error:  # whatever it is, the consumer must hear of it rather than wait for ever
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def next(self) -> tuple[Any, float, dict[str, Any]]:
        """Return (batch, seconds waited for it, the loader's state after it)."""
        began = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # a second call must not wait for ever either
            raise item
        batch, state, self.stages = item
        return batch, time.perf_counter() - began, state

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join()
