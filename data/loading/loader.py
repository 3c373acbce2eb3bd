"""Batches of training: by step from a token store (`cached`), or in order from documents (`streaming`).

A batch is a dict of [B, T] arrays: tokens, targets, positions, segment_ids (int32; 0 pads, 1.. number a row's
pieces) and loss_weights (float32).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool

from data.batch import Batch, Rows
from data.config import DataConfig, components
from data.errors import DataError
from data.formats import GROUPS, UNWANTED, WANTED
from data.loading.ahead import Ahead
from data.loading.curriculum import cut_pieces, longest_piece
from data.loading.input_timing import stage
from data.loading.mixture import Interleaving
from data.loading.packing import FITS, PackingPlan, empty_batch, fill, make_plan, permutation, pieces_of
from data.loading.plan_cache import kept_plan
from data.loading.streaming import Shards, Stream, open_stream
from data.prepared import Prepared, stores_of
from data.tokens.store import TokenStore

DOCUMENTS, ROWS = 0, 1  # what a permutation's key is for
NEAR = 8  # in the last 1/8 of an epoch the next one's plan is made
ALWAYS = [(0, 1.0)]  # the weight of a corpus alone


class Loader:
    """Batches of `global_batch_size` rows, the same whatever the number of hosts: each asks for its own rows.

    Cached: `batch(step)` is a pure function of (seed, step); steps count from 0 and may come in any order.
    Every epoch visits documents and rows in another order, its last row padded, and a batch may span two
    epochs. Of a mixture each component has epochs of its own. Streaming: steps are asked for in order, and
    `restore(state())` goes on with exactly the next batch.
    """

    def __init__(
        self,
        source: Prepared | TokenStore | Mapping[str, TokenStore],
        data: DataConfig,
        *,
        global_batch_size: int,
        seed: int,
        split: str = "train",
        num_steps: int = 0,
    ):
        """`source`: what was prepared, a store, or the stores of a mixture's components by name.

        Raises DataError where a component would be read more often than its `epochs` in `num_steps`, or
        `data.virtual_shards` cannot share the batch.
        """
        self.data, self.batch_size, self.seed = data, global_batch_size, seed
        self._step, self.num_steps = 0, num_steps
        self._leaps: list[tuple[int, int]] = []  # from which step on how many batches are left out
        self._stream: Stream | Shards | None = None
        if isinstance(source, Prepared) and source.documents is not None and split == "train":
            self._stream = open_stream(source.documents, source.tokenizer, data, global_batch_size, seed)
            return
        self._stores = stores_of(source, split)
        self._epochs = [Epochs(store, data, seed) for store in self._stores.values()]
        self._parts = components(data) if data.mixture else {}
        assert not self._parts or list(self._parts) == list(self._stores), "stores are those of the mixture"
        self._order = Interleaving(
            [part.weight for part in self._parts.values()] or [ALWAYS], self.batch_size
        )
        for number, (name, part) in enumerate(self._parts.items()):
            if part.epochs is not None:
                self._check_epochs(number, name, part.epochs)

    def batch(self, step: int, rows: Rows = None) -> Batch:
        """Return the batch of a 0-based step, or only the given rows of it: each array [B, T].

        `rows`: a slice or increasing row numbers; cached rows that are not asked for cost nothing.
        """
        number = step + self.left_out(step)
        batch = self._cached(number, rows) if self._stream is None else self._streamed(number, rows)
        self._step = step + 1
        longest = longest_piece(self.data.curriculum, step, self.data.seq_len)
        if longest < self.data.seq_len:
            cut_pieces(batch, longest)
        return batch

    def leave_out(self, step: int, batches: int) -> None:
        """From a step on, leave out so many batches more: it gets the one that step + batches would have had.

        Raises DataError where a mixture's component would be read too often.
        """
        left_out = self.left_out(step) + batches
        self._leaps = [leap for leap in self._leaps if leap[0] < step] + [(step, left_out)]
        for number, (name, part) in enumerate(self._parts.items() if self._stream is None else ()):
            if part.epochs is not None:
                self._check_epochs(number, name, part.epochs)

    def left_out(self, step: int) -> int:
        """Return how many batches before that of a step are left out."""
        return next((count for first, count in reversed(self._leaps) if first <= step), 0)

    def _streamed(self, number: int, rows: Rows) -> Batch:
        assert self._stream is not None
        while self._stream.step < number and self._leaps:
            self._stream.batch(self._stream.step, rows)
        return self._stream.batch(number, rows)

    def _cached(self, step: int, rows: Rows) -> Batch:
        everything = slice(None) if rows is None else rows
        first = step * self.batch_size
        if not self._parts:
            wanted = np.arange(first, first + self.batch_size)[everything]
            batch = empty_batch(len(wanted), self.data.seq_len)
            self._fill(batch, 0, np.arange(len(wanted)), wanted)
            return batch
        component, row = (x[everything] for x in self._order.rows(first, self.batch_size))
        batch = empty_batch(len(row), self.data.seq_len)
        for number in range(len(self._epochs)):
            where = np.flatnonzero(component == number)
            self._fill(batch, number, where, row[where])
        return batch

    def _fill(self, batch: Batch, number: int, where: np.ndarray, wanted: np.ndarray) -> None:
        """Fill the batch's rows `where` with the increasing rows `wanted` of a component."""
        store, epochs = self._epochs[number].store, self._epochs[number]
        while len(wanted):
            plan, order, first, end = epochs.containing(int(wanted[0]))
            here = int(np.searchsorted(wanted, end))
            rows = order[wanted[:here] - first]
            fill(batch, where[:here], store.tokens, plan, rows, weights=store.weights)
            if self.data.format in GROUPS:
                _judge(batch, where[:here])
            _copy_figures(batch, where[:here], store, plan, rows)
            where, wanted = where[here:], wanted[here:]

    def _check_epochs(self, number: int, name: str, limit: float) -> None:
        epochs = self._epochs[number]
        batches = self.num_steps + self.left_out(self.num_steps)
        needed = int(self._order.taken(batches * self.batch_size)[number])
        if needed <= limit * epochs.least_rows:  # so that no plan is made only to find that there is enough
            return
        allowed = epochs.rows_of(limit)
        if needed > allowed:
            read, key = epochs.epochs_of(needed), f"data.mixture.{name}"
            raise DataError(
                f"{key}.epochs={limit:g}: training.num_steps={self.num_steps} reads {needed:,} "
                f"rows of it, {read:.2f} epochs; use at most {self._order.last_step(number, allowed):,} "
                f"steps, a lower {key}.weight, or {key}.epochs={_rounded_up(read):g}"
            )

    def state(self) -> dict[str, Any]:
        """Return where the loader stands, json-able: after the last batch asked for.

        With `data.virtual_shards`, of those shards whose rows were asked for: `merged` makes them whole.
        """
        if self._stream is not None:
            return self._stream.state()
        return {"mode": "cached", "step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a state. Raises DataError where it was made with another mode, batch size or shards."""
        if state.get("mode") != self.data.mode:
            raise DataError(
                f"data.mode={self.data.mode} cannot go on from a position saved in mode {state.get('mode')}; "
                "keep the mode, or start a new run with run.name="
            )
        if self._stream is not None:
            self._stream.restore(state)
        self._step = int(state["step"])

    def check_rows(self, rows: Rows) -> None:
        """Raise DataError where a host that asks for these rows of each batch would split a virtual shard."""
        if isinstance(self._stream, Shards):
            self._stream.of_rows(rows)

    def targets_of(self, steps: int) -> Bool[np.ndarray, " N"]:
        """Return which entries of the store are targets of the first so many steps; of a corpus alone."""
        (epochs,) = self._epochs
        edges = np.zeros(epochs.store.num_addresses + 1, np.int64)
        first, last = 0, (steps + self.left_out(steps)) * self.batch_size
        while first < last:
            plan, order, begin, end = epochs.containing(first)
            rows = order[first - begin : last - begin]
            pieces = pieces_of(plan, rows)
            np.add.at(edges, plan.starts[pieces] + 1, 1)
            np.add.at(edges, plan.starts[pieces] + plan.lengths[pieces] + 1, -1)
            if len(rows) == len(order):
                break  # a whole epoch has them all
            first = end
        return np.cumsum(edges[:-1]) > 0

    def shares(self, step: int) -> dict[str, float]:
        """Return each component's share of all rows before a step; nothing without a mixture."""
        if self._stream is not None or not self._parts or step == 0:
            return {}
        taken = np.zeros(len(self._parts))
        for first, end in pairwise([0, *(leap for leap, _ in self._leaps if 0 < leap < step), step]):
            before, after = ((x + self.left_out(first)) * self.batch_size for x in (first, end))
            taken += self._order.taken(after) - self._order.taken(before)
        return dict(zip(self._parts, (taken / taken.sum()).tolist(), strict=True))

    def fill_rate(self) -> float | None:
        """Return the share of positions that hold tokens, in each first epoch; None for a stream."""
        if self._stream is not None:
            return None
        tokens = sum(store.num_tokens for store in self._stores.values())
        return tokens / (sum(epochs.rows_of(1.0) for epochs in self._epochs) * self.data.seq_len)

    def describe(self) -> str:
        """Say in one line what is read and how."""
        data, grows = self.data, ""
        if data.curriculum:
            grows = ", pieces of " + ", ".join(f"{n} from step {first}" for first, n in data.curriculum)
        if self._stream is not None:
            shards = f", {data.virtual_shards} virtual shards" if data.virtual_shards else ""
            return (
                f"streaming, concat: {self._stream.num_documents:,} documents in rows of {data.seq_len}"
                f"{shards}{grows}"
            )
        said = [self._said(number, name) for number, name in enumerate(self._stores)]
        return f"cached, {data.packing}: {'; '.join(said)}{grows}"

    def _said(self, number: int, name: str) -> str:
        store, epochs = self._epochs[number].store, self._epochs[number]
        rows = epochs.rows_of(1.0)
        full = store.num_tokens / (rows * self.data.seq_len)
        learnt = ""
        if store.weights is not None:
            cut = int((store.lengths > self.data.seq_len).sum())
            learnt = f" ({np.count_nonzero(store.weights) / store.num_tokens:.1%} learnt)"
            learnt += f", {cut:,} longer than a row and cut," if cut and self.data.packing != "concat" else ""
        line = (
            f"{store.num_documents:,} documents, {store.num_tokens:,} tokens{learnt} in "
            f"{rows:,} rows of {self.data.seq_len} ({full:.1%} full)"
        )
        if not self._parts:
            return f"{line}, {rows / self.batch_size:,.1f} steps an epoch"
        if self.num_steps:
            taken = int(self._order.taken(self.num_steps * self.batch_size)[number])
            share = taken / (self.num_steps * self.batch_size)
            return f"{name} {share:.2%} of rows, {taken / rows:.2f} epochs of {line}"
        return f"{name}: {line}"


def _judge(batch: Batch, where: np.ndarray) -> None:
    """Make labels of the marks of judged texts, all of whose answers count alike."""
    marks = batch["loss_weights"][where]
    batch.setdefault("labels", np.zeros_like(batch["loss_weights"]))
    batch["labels"][where] = (marks == WANTED).astype(np.float32) - (marks == UNWANTED)
    batch["loss_weights"][where] = marks > 0


def _copy_figures(
    batch: Batch, where: np.ndarray, store: TokenStore, plan: PackingPlan, rows: np.ndarray
) -> None:
    """Fill what other weights say of the targets."""
    there = np.arange(len(where))
    for name, values in store.figures.items():
        shape = (*batch["tokens"].shape, *values.shape[:-1])
        batch.setdefault(name, np.zeros(shape, values.dtype))
        for number, column in enumerate(values.reshape(-1, values.shape[-1])):
            copied = empty_batch(len(where), shape[1])
            fill(copied, there, store.tokens, plan, rows, weights=column)
            batch[name].reshape(*shape[:2], -1)[where, :, number] = copied["loss_weights"]


def _rounded_up(epochs: float) -> float:
    return float(np.ceil(epochs * 100) / 100)


class Epochs:
    """Plans by epoch, the last two kept: a step at an epoch's edge needs both."""

    def __init__(self, store: TokenStore, data: DataConfig, seed: int):
        self.store, self.data, self.seed = store, data, seed
        self.kept: dict[int, tuple[PackingPlan, np.ndarray]] = {}
        self.ends: list[int] = []  # global rows at each epoch's end, as far as known
        self.ahead = Ahead[tuple[PackingPlan, np.ndarray]]()
        self.least_rows = -(-store.num_tokens // data.seq_len)  # of any epoch, however it is packed

    def containing(self, row: int) -> tuple[PackingPlan, np.ndarray, int, int]:
        """Return (plan, order of its rows, first global row, end) of the epoch that holds a global row."""
        while not self.ends or self.ends[-1] <= row:
            self._extend(row)
        epoch = int(np.searchsorted(self.ends, row, side="right"))
        plan, order = self._plan(epoch)
        if self.ends[epoch] - row <= plan.num_rows // NEAR and epoch + 1 not in self.kept:
            self.ahead.start(epoch + 1, lambda: self._made(epoch + 1))  # no step waits at the epoch's edge
        return plan, order, self.ends[epoch] - plan.num_rows, self.ends[epoch]

    def rows_of(self, epochs: float | int) -> int:
        """Return how many rows so many epochs have, the first ones, rounded down."""
        whole = int(epochs)
        while len(self.ends) < epochs:
            self._extend(self.ends[-1] if self.ends else 0)
        before = self.ends[whole - 1] if whole else 0
        return before if whole == epochs else before + int((epochs - whole) * (self.ends[whole] - before))

    def epochs_of(self, rows: int) -> float:
        """Return how many epochs the first so many rows are."""
        _, _, first, end = self.containing(rows)
        return int(np.searchsorted(self.ends, rows, side="right")) + (rows - first) / (end - first)

    def _extend(self, row: int) -> None:
        first = self.ends[-1] if self.ends else 0
        if self.data.packing in FITS:  # its number of rows depends on the order: no closed form
            self.ends.append(first + self._plan(len(self.ends))[0].num_rows)
            return
        rows = self._plan(0)[0].num_rows
        more = (row - first) // rows + 1
        self.ends += [first + rows * (i + 1) for i in range(more)]

    def _plan(self, epoch: int) -> tuple[PackingPlan, np.ndarray]:
        if epoch not in self.kept:
            with stage("plan"):
                made = self.ahead.take(epoch) or self._made(epoch)
            while len(self.kept) >= 2:
                del self.kept[next(iter(self.kept))]
            self.kept[epoch] = made
        return self.kept[epoch]

    def _made(self, epoch: int) -> tuple[PackingPlan, np.ndarray]:
        key = (self.seed, epoch, self.data.packing, self.data.seq_len)
        plan = kept_plan(self.store, self.data.cache_dir, key, lambda: self._packed(epoch))
        if (group := GROUPS.get(self.data.format, 1)) == 1:
            return plan, permutation(plan.num_rows, self.seed, epoch, ROWS)
        # Rows that belong together move together.
        order = permutation(plan.num_rows // group, self.seed, epoch, ROWS)
        return plan, (order[:, None] * group + np.arange(group)).ravel()

    def _packed(self, epoch: int) -> PackingPlan:
        if self.data.format in GROUPS:  # in the store's order: rows are shuffled
            self.store.refuse_longer(self.data.seq_len)
            return make_plan("none", self.store.starts, self.store.lengths, self.data.seq_len)
        order = permutation(self.store.num_documents, self.seed, epoch, DOCUMENTS)
        starts, lengths = self.store.starts[order], self.store.lengths[order]
        return make_plan(self.data.packing, starts, lengths, self.data.seq_len)
