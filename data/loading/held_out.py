"""Held-out batches: every target once, in one fixed order."""

from collections.abc import Iterator

import numpy as np

from data.batch import Batch, Rows
from data.config import DataConfig
from data.errors import DataError
from data.formats import GROUPS
from data.loading.packing import empty_batch, fill, make_plan, permutation
from data.prepared import Prepared, stores_of
from data.tokens.store import TokenStore


class EvalBatches:
    """Held-out batches in one fixed order, every target once; the last is padded with weight 0.

    Documents are concatenated whatever the training's packing, so that figures compare; conversations are
    packed whole, so that an answer keeps its question; of judged ones those that were wanted. Rows come
    shuffled by a fixed key: the first few batches are a fair sample, not one long document. `num_tokens` and
    `num_bytes` are what the batches cover of targets with weight: bits per byte = nll_sum / ln 2 / num_bytes.
    max_batches: -1 for all. Raises DataError where there is none.
    """

    def __init__(self, store: TokenStore, data: DataConfig, *, batch_size: int, max_batches: int = -1):
        self.store, self.batch_size, self.seq_len = store, batch_size, data.seq_len
        packing = "concat" if store.weights is None else "best_fit"
        wanted = store.wanted if data.format in GROUPS else slice(None)
        self.plan = make_plan(packing, store.starts[wanted], store.lengths[wanted], data.seq_len)
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
        # The bytes of a conversation are its JSON's: what is learnt of it is counted by its tokens alone.
        return tokens, num_bytes if self.store.weights is not None else self.store.text_bytes(num_bytes)


def held_out_batches(
    prepared: Prepared, data: DataConfig, *, batch_size: int, max_batches: int = -1
) -> dict[str, EvalBatches]:
    """Return the held-out batches of each component of a mixture by name; "" is a corpus alone."""
    stores = stores_of(prepared, "validation")
    return {
        name: EvalBatches(store, data, batch_size=batch_size, max_batches=max_batches)
        for name, store in stores.items()
    }
