"""What one device of ring attention does: its queries stay, blocks of keys and values pass by.

B batch, T query position, S key position, N query heads, K key/value heads, G query heads to each of them,
H query and key head size, W value head size. Inside, heads come first: queries [B, K, G, T, H], keys
[B, K, S, H].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import Masks, Scores

AXIS = "context"
ATTENTION_OUTPUT = "ring_attention"  # checkpoint name of what ring's backward needs: a policy may keep it
TILE = 512  # queries whose scores exist at once
HIDDEN = -1e30  # finite: the score of a key that a query does not see, before its weight is set to zero

KeyBlock = tuple[Array, Array, Array, Array]  # keys, values, their positions and segments: what travels


@dataclass(frozen=True)
class Ring:
    """Attention by blocks (arXiv:2310.01889), merged by log-sum-exp in float32; `size` devices.

    Positions are one part of the row (text order) or two (zigzag order: an early and a late chunk); a tile is
    some queries of one part against the keys of one part. Runs inside a `shard_map` that is manual over AXIS.
    """

    size: int
    zigzag: bool
    scores: Scores

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K W"],
        masks: Masks,
    ) -> tuple[Float[Array, "B T N W"], Float[Array, "B K G T"]]:
        """Output and log-sum-exp of this device's queries over all keys; zeros for a padding query."""
        dtype, queries = q.dtype, (masks.q_positions, masks.q_segments)
        q, k, v = _queries_first(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
        length = q.shape[3]
        tile = self._tile(length)

        def visit(state: Any, block: KeyBlock, step: Any) -> Any:
            # Tiles, so that scores of a block never exist at once; by a scan, so that they are one program.
            def body(state: Any, index: Array) -> tuple[Any, None]:
                start = index[0] * tile
                keys, values, mask = self._meet(queries, block, index, tile)
                old = [_cut(x, start, tile, 3) for x in state]
                new = self._merge(old, _cut(q, start, tile, 3), keys, values, mask)
                return tuple(_put(x, y, start, 3) for x, y in zip(state, new, strict=True)), None

            return jax.lax.scan(body, state, self._tiles(step, length // tile))[0]

        rows = q.shape[:-1]
        # Float32 throughout: the running sums are rescaled at every block, and each time would round.
        empty = (jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, HIDDEN), jnp.zeros(rows))
        total, top, weight = self._walk(visit, empty, (k, v, masks.kv_positions, masks.kv_segments), length)
        weight = jnp.where(weight > 0, weight, 1.0)  # a padding query saw nothing: its total is 0
        return _heads_last(total / weight[..., None]).astype(dtype), top + jnp.log(weight)

    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K W"],
        masks: Masks,
        out: Float[Array, "B T N W"],
        lse: Float[Array, "B K G T"],
        dout: Float[Array, "B T N W"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K W"]]:
        """Gradients of q, k and v from the output and log-sum-exp of whole rows.

        A block's dk and dv travel one step behind it, in float32, and then go home.
        """
        dtypes, kv_heads = (q.dtype, k.dtype, v.dtype), k.shape[2]
        queries = masks.q_positions, masks.q_segments
        q, out, dout = (_queries_first(x, kv_heads) for x in (q, out, dout))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        length = q.shape[3]
        tile = self._tile(length)
        # What every score of a query loses because its weights sum to one.
        shared = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

        def visit(state: Any, block: KeyBlock, step: Any) -> Any:
            dq, travelling = state
            if travelling is not None:
                # Waits for nothing that follows, so that the transfer hides behind the tiles.
                travelling = self._shift(travelling, 1)

            def body(grads: Any, index: Array) -> tuple[Any, None]:
                start = index[0] * tile
                keys, values, mask = self._meet(queries, block, index, tile)
                mine = [_cut(x, start, tile, 3) for x in (q, dout, lse, shared)]
                new = self._pull(mine, keys, values, mask)
                part = index[1] * keys.shape[2]
                places = ((start, 3), (part, 2), (part, 2))
                return tuple(_add(x, y, *at) for x, y, at in zip(grads, new, places, strict=True)), None

            grads = (dq, *(jnp.zeros(x.shape) for x in block[:2]))
            (dq, *added), _ = jax.lax.scan(body, grads, self._tiles(step, length // tile))
            return dq, added if travelling is None else jax.tree.map(jnp.add, travelling, added)

        start = (jnp.zeros(q.shape), None)
        # The same walk: a block's gradients follow it around and collect what every device adds.
        dq, travelling = self._walk(visit, start, (k, v, masks.kv_positions, masks.kv_segments), length)
        # The last block that was here came from steps - 1 devices before this one: its gradients go as far
        # back.
        dk, dv = self._shift(travelling, 1 - self._steps(length))
        dq, dk, dv = _heads_last(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
        return dq.astype(dtypes[0]), dk.astype(dtypes[1]), dv.astype(dtypes[2])

    def _walk(self, visit: Callable[..., Any], state: Any, block: KeyBlock, length: int) -> Any:
        """Visit the own block and then those of earlier devices, each sent on before it is worked on."""
        steps = self._steps(length)
        # A window that reaches into no other device: nothing is sent at all.
        if steps == 1:
            return visit(state, block, 0)
        ahead = self._shift(block, 1)
        state = visit(state, block, 0)

        def turn(carry: Any, step: Array) -> tuple[Any, None]:
            state, block = carry
            ahead = self._shift(block, 1)
            return (visit(state, block, step), ahead), None

        # First and last visit stand outside: the own block needs other tiles in zigzag order, and the last is
        # not sent on.
        (state, block), _ = jax.lax.scan(turn, (state, ahead), jnp.arange(1, steps - 1))
        return visit(state, block, steps - 1)

    def _steps(self, length: int) -> int:
        """Blocks worth a visit: in text order a window reaches only so far back, on every device alike."""
        window = self.scores.window
        if window is None or self.zigzag:
            return self.size
        # Not in zigzag order, where neighbours in the text may lie on any two devices.
        return min(self.size, 1 + -(-(window - 1) // length))

    def _shift(self, tree: Any, by: int) -> Any:
        """Every device's arrays to the device `by` further on."""
        # A rotation: each device sends as much as it receives, and none waits for a root.
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree) if by else tree

    def _tile(self, length: int) -> int:
        part = length // 2 if self.zigzag else length
        return next(n for n in range(min(part, TILE), 0, -1) if part % n == 0)

    def _tiles(self, step: Any, count: int) -> Int[Array, "n 2"]:
        """(tile of queries, part of keys) to work on at a step; count: tiles of a device.

        In zigzag order the early part of the queries sees no late part of other keys, and the late part sees
        every early one. Of the other two pairs one is seen and one is not, by who is first in the text: two
        of four pairs on every device, picked by index and not by a branch.
        """
        if not self.zigzag:
            return jnp.asarray([(t, 0) for t in range(count)])
        if isinstance(step, int) and step == 0:
            pairs: list[tuple[Any, Any]] = [(0, 0), (1, 0), (1, 1)]
        else:
            # Known by rank alone: the block that arrives at step s comes from the device s before this one,
            # or, around the end of the ring, from a later one.
            owner_is_later = jnp.where(jax.lax.axis_index(AXIS) < step, 1, 0)
            pairs = [(1, 0), (owner_is_later, owner_is_later)]
        tiles = jnp.arange(count // 2)
        rows = [jnp.stack([q * len(tiles) + tiles, jnp.full_like(tiles, kv)], axis=1) for q, kv in pairs]
        return jnp.concatenate(rows)

    def _meet(
        self, queries: tuple[Array, Array], block: KeyBlock, index: Array, tile: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S W"], Bool[Array, "B 1 1 T S"]]:
        """The keys and values of a tile, and which of its queries see which of them."""
        keys, values, kv_positions, kv_segments = block
        length = keys.shape[2] // (2 if self.zigzag else 1)
        part = index[1] * length
        q_positions, q_segments = (_cut(x, index[0] * tile, tile, 1)[:, :, None] for x in queries)
        kv_positions, kv_segments = (
            _cut(x, part, length, 1)[:, None, :] for x in (kv_positions, kv_segments)
        )
        behind = q_positions - kv_positions
        mask = (q_segments == kv_segments) & (q_segments > 0) & (behind >= 0)
        if self.scores.window is not None:
            mask &= behind < self.scores.window
        return _cut(keys, part, length, 2), _cut(values, part, length, 2), mask[:, None, None]

    def _scores(self, q: Array, keys: Array) -> Float[Array, "B K G T S"]:
        return self.scores.bounded(self.scores.scale * _dot("BKGTH,BKSH->BKGTS", q, keys))

    def _merge(self, old: Sequence[Array], q: Array, keys: Array, values: Array, mask: Array) -> list[Array]:
        """Add a tile to (sum of weighted values, top score, sum of weights), weights relative to the top."""
        total, top, weight = old
        scores = jnp.where(mask, self._scores(q, keys), HIDDEN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # Masked again: in a tile that a query sees nothing of, score and top are both HIDDEN, and exp(0) is
        # one.
        weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
        # What was added relative to the old maximum, relative to the new one.
        fade = jnp.exp(top - new_top)
        total = total * fade[..., None] + _dot("BKGTS,BKSW->BKGTW", weights.astype(values.dtype), values)
        return [total, new_top, weight * fade + jnp.sum(weights, axis=-1)]

    def _pull(self, mine: Sequence[Array], keys: Array, values: Array, mask: Array) -> list[Array]:
        """What a tile adds to dq, dk and dv; with the row's own log-sum-exp no merge is differentiated."""
        q, dout, lse, shared = mine
        scores = self._scores(q, keys)
        weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
        dscores = weights * (_dot("BKGTW,BKSW->BKGTS", dout, values) - shared[..., None])
        if self.scores.softcap is not None:
            dscores *= self.scores.slope(scores)
        # Rounded once, for both products that it goes into.
        dscores = (self.scores.scale * dscores).astype(keys.dtype)
        return [
            _dot("BKGTS,BKSH->BKGTH", dscores, keys),
            _dot("BKGTS,BKGTH->BKSH", dscores, q),
            _dot("BKGTS,BKGTW->BKSW", weights.astype(dout.dtype), dout),
        ]


def _queries_first(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    batch, length, heads, size = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)


def _heads_last(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    batch, kv_heads, groups, length, size = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, size)


def _dot(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _cut(x: Array, start: Any, size: int, dim: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, dim)


def _put(x: Array, part: Array, start: Any, dim: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, dim)


def _add(x: Array, part: Array, start: Any, dim: int) -> Array:
    return _put(x, _cut(x, start, part.shape[dim], dim) + part, start, dim)
