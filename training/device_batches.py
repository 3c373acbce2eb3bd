"""Which rows of a batch this process makes, and how they become arrays that span all processes.

Rows may be asked for by several processes (where a row's positions or a layer's heads lie on devices of
several), and a process may hold only some positions of a row: each makes every row that it holds a part of.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from data.loading.streaming import merged
from parallel import processes

Batch = Mapping[str, Any]


def rows_here(abstract: Batch) -> Int[np.ndarray, " R"]:
    """The rows, in increasing order, of which this process's devices hold a part.

    abstract: arrays [B, T] with one sharding, as `training.step.abstract_batch` makes them.
    """
    leaf = abstract["tokens"]
    held = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    rows = [np.arange(leaf.shape[0])[index[0]] for index in held]
    return np.unique(np.concatenate(rows))


def of_all_hosts(position: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The position in the data that goes into a checkpoint: of a job in which each process knows only a part.

    Virtual shards: a process has read those of its own rows, and any may have to go on with the others. It is
    gathered before the save, so that it is committed with the arrays or not at all. All processes call this
    after the same step.
    """
    if position is None or "shards" not in position:
        return position
    return merged(processes.exchange("the position in the data", position))


def placing(abstract: Batch, rows: Int[np.ndarray, " R"]) -> Callable[[Batch], dict[str, jax.Array]]:
    """A function from a batch of these `rows` [R, T], the same as `rows_here`, to global arrays [B, T]."""

    def place(batch: Batch) -> dict[str, jax.Array]:
        return {name: _global(leaf, batch[name], rows) for name, leaf in abstract.items()}

    return place


def arrived(place: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    """`place`, and wait until the devices have it: a thread's batches are to be there when asked for."""
    return lambda batch: jax.block_until_ready(place(batch))


def _global(leaf: jax.ShapeDtypeStruct, local: np.ndarray, rows: np.ndarray) -> jax.Array:
    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, end, _ = index[0].indices(leaf.shape[0])
        # A device's rows follow each other, and this process has all of them: so they do in `local`.
        at = int(np.searchsorted(rows, first))
        return local[(slice(at, at + end - first), *index[1:])]

    assert leaf.sharding is not None
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)
