"""Which token comes one further in the text, wherever its position lies. B rows, T position."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Batch = dict[str, Array]


def next_targets(batch: Batch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """(target, loss weight) of the position after each in the text; weight 0 where the document ends.

    Positions lie as `batch["order"]` says, the index of each in its row's text; in order where it is absent.
    """
    same = batch["segment_ids"] == shifted(batch["segment_ids"], batch.get("order"), -1.0)
    weights = jnp.where(same, shifted(batch["loss_weights"], batch.get("order"), 0.0), 0.0)
    return shifted(batch["targets"], batch.get("order"), 0.0), weights


def shifted(x: Array, order: Int[Array, "B T"] | None, fill: float) -> Array:
    """For each position of [B, T] the value at the next one in the text; `fill` at a row's end."""
    length = x.shape[1]
    if order is None:
        return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)
    # In zigzag order the next token of the text may lie anywhere in the row, even on another device. Integers
    # travel, not the stream.
    where = jnp.argsort(order, axis=1)  # of each place in the text
    following = jnp.take_along_axis(where, jnp.minimum(order + 1, length - 1), axis=1)
    return jnp.where(order + 1 < length, jnp.take_along_axis(x, following, axis=1), fill).astype(x.dtype)
