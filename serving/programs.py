"""The programs of an engine, each of one shape: a row never knows what its neighbours are.

S slots, V vocabulary, M pages of a slot, C tokens of a chunk, D model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels.attention_paged import paged_attention
from models.ops import Ops
from models.transformer import Model, Tree
from parallel.axes import Layout
from serving.drawing import REALS, draw
from serving.generator import decoding_ops, masters_of
from serving.request import TOP, Request
from serving.sampling import keys_at
from serving.speculate import draft, guess

STOPS = 16  # ids that end a text
HEAD = 128  # positions whose logits exist at once while a text is scored
INTEGERS = ("token", "lengths", "ends", "least", "top_k", "guesses")  # of each slot, int32


class Programs:
    """What runs on the devices: five executables, compiled by `warm`, and the state that they hand on.

    Nothing is allocated before, so that `planner.serving` compiles them for devices that are not here.

    model, ops, layout: as `Generator` takes them; rows are not split, heads may be. slots, max_len, page,
    chunk, pages, guesses, packed, cache_bits: as in `ServeConfig`. further: the model's first layer for
    further tokens guesses, and not the text; then a chunk is given with the token behind it. device: where
    weights lie that no layout spreads. vocab_size: rows of the vocabulary that are a token's (None: all), so
    an alternative's.
    """

    def __init__(
        self, model: Model, ops: Ops, layout: Layout | None, *, slots: int, max_len: int, page: int,
        chunk: int, pages: int, guesses: int = 0, packed: bool = False, cache_bits: int | None = None,
        further: bool = False, device: Any = None, vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        if layout is not None:
            whole = dict.fromkeys(("length", "act_length", "batch"), ())
            layout = replace(layout, rules={**layout.rules, **whole})
        self.model, self.slots, self.max_len, self._layout = model, slots, max_len, layout
        self._page, self._pages, self._chunk = page, pages, chunk
        self._device, self.guesses, self.further = device, guesses, further
        self._ops = ops = decoding_ops(ops, layout, cache_bits)
        jit = partial(jax.jit, compiler_options=layout.compiler_options if layout else None)
        self._unstack = jit(
            partial(model.unstack, ops=ops, masters=masters_of(ops), packed=packed, further=further)
        )
        # Where it lies it stays: what a compiler chose for itself would be another program the next time.
        to = self._to = None if layout is None else jax.tree.map(lambda x: x.sharding, self.abstract())
        rest = None if layout is None else NamedSharding(layout.mesh, PartitionSpec())
        self.prefill = jit(partial(_prefill, self), donate_argnums=1, out_shardings=to)
        self.decode = jit(partial(_decode, self), donate_argnums=1, out_shardings=to and (to, rest))
        # Functions of its own, so that its programs are counted.
        self.place = jit(partial(_place), donate_argnums=0, out_shardings=to)
        size = model.config.vocab_size if vocab_size is None else vocab_size
        self.top = jit(partial(_top, size))
        self.score = jit(partial(_score, model, ops, size))

    @property
    def compiled(self) -> int:
        """Executables that there are, `ready` aside."""
        functions: tuple[Any, ...] = (self.prefill, self.decode, self.place, self.top, self.score)
        return sum(function._cache_size() for function in functions)

    def row(self, pages: Sequence[int] = ()) -> Int[np.ndarray, " M"]:
        """The pages of a slot and, for as many as it could have, the number of none, where nothing goes."""
        row = np.full(-(-self.max_len // self._page), self._pages, np.int32)
        row[: len(pages)] = pages
        return row

    def empty(self) -> Tree:
        """The state of an engine in which nobody writes."""
        slots, ops, vocabulary = self.slots, self._ops, self.model.config.vocab_size

        def made(array: Any) -> Array:
            rows = self._pages if "length" in array.axes else slots
            return array.grown(None, rows=rows, ops=ops)

        drafts = {
            "drafts": jnp.zeros((slots, self.guesses), jnp.int32),
            "drafted": jnp.zeros(slots, jnp.int32),
        }
        return {
            **(drafts if self.further else {}),
            **{name: jnp.zeros(slots, jnp.int32) for name in INTEGERS},
            **{name: jnp.zeros(slots, jnp.float32) for name in REALS},
            "active": jnp.zeros(slots, bool),
            "key": jnp.zeros((slots, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32),
            "stops": jnp.full((slots, STOPS), -1, jnp.int32),
            "pages": jnp.tile(self.row(), (slots, 1)),
            "text": jnp.zeros((slots, self.max_len), jnp.int32),
            "written": jnp.zeros((slots, vocabulary), jnp.int32),
            **jax.tree.map(made, self.arrays()),
        }

    def arrays(self) -> Tree:
        """What is kept of texts by pages: of the model's layers and, where that guesses, of one more."""
        size = self._page, self._ops.cache_bits
        arrays = {"segments": self.model.cache_arrays(*size)}
        return arrays | ({"further": self.model.further_arrays(*size)} if self.further else {})

    def abstract(self) -> Tree:
        """The shapes of `empty`, each with the devices that it lies on where there is a layout."""
        state, layout = jax.eval_shape(self.empty), self._layout
        if layout is None:
            return state

        def placed(x: Any, axes: Sequence[str | None]) -> Any:
            return x.update(sharding=layout.sharding(axes, x.shape))

        whole = jax.tree.map(lambda x: placed(x, (None,) * x.ndim), state)
        arrays, ops = self.arrays(), replace(self._ops, constrain=placed)
        kept = {name: state[name] for name in arrays}
        return {**whole, **jax.tree.map(lambda array, x: array.placed(x, ops), arrays, kept)}

    def values(self, request: Request | None, pages: Sequence[int]) -> Tree:
        """What `place` puts into a slot: of a request whose prompt is read up to its last token, or of none.

        Numbers of one type each, so that no request is another program.
        """
        integers = dict.fromkeys(INTEGERS, 0) | {"seed": 0, "choice": 0}
        reals, stops = dict.fromkeys(REALS, 0.0), np.full(STOPS, -1, np.int32)
        row, text = self.row(pages), np.zeros(self.max_len, np.int32)
        if request is not None:
            size, how = len(request.prompt), request.draw
            integers = {
                "token": request.prompt[-1],
                "lengths": size - 1,
                "ends": size + request.max_tokens,
                "least": size + request.min_tokens,
                "top_k": min(how.top_k, self.model.config.vocab_size),
                # What a grammar allows behind a guess nobody knows yet.
                "guesses": self.guesses if request.grammar is None else 0,
                "seed": request.seed,
                "choice": request.choice,
            }
            reals = {name: getattr(how, name) for name in REALS}
            stops[: len(request.stop_ids)] = sorted(request.stop_ids)
            text[:size] = request.prompt
        return {
            **({"drafted": np.int32(0)} if self.further else {}),
            **{
                name: np.uint32(value) if name == "seed" else np.int32(value)
                for name, value in integers.items()
            },
            **{name: np.float32(value) for name, value in reals.items()},
            "active": np.bool_(request is not None),
            "stops": stops,
            "pages": row,
            "text": text,
        }

    def ready(self, params: Tree) -> Tree:
        """Weights as the programs take them, of parameters as a checkpoint has them."""
        return self._unstack(params if self._layout is not None else self._there(params))

    def _there(self, tree: Any) -> Any:
        """Arrays where they stay: one that lay elsewhere, or nowhere in particular, is another program."""
        if self._layout is None:
            return jax.device_put(tree, self._device)
        whole = NamedSharding(self._layout.mesh, PartitionSpec())
        return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, whole), tree)

    def put_bias(self, bias: Float[np.ndarray, "S V"]) -> Array:
        """It on the devices, where `decode` reads it."""
        return self._there(jnp.asarray(bias))

    def prefill_of_none(self) -> tuple[Any, ...]:
        """What `prefill` takes behind weights and state, of a chunk without a token."""
        row, tokens = self.row(), np.zeros(self._chunk + self.further, np.int32)
        return np.int32(0), row, tokens, np.int32(0), np.int32(0)

    def decode_of_none(self) -> tuple[np.ndarray, np.ndarray]:
        """What `decode` takes behind weights and state, of a step without a text; the first by `put_bias`."""
        bias = np.zeros((self.slots, self.model.config.vocab_size), np.float32)
        return bias, np.zeros(self.slots, bool)

    def warm(self, weights: Tree) -> Tree:
        """An empty state, with every program compiled for weights that are `ready`, and run once."""
        state = self._there(self.empty()) if self._to is None else jax.device_put(self.empty(), self._to)
        state = self.place(state, np.int32(0), self.values(None, []))
        state = self.prefill(weights, state, *self.prefill_of_none())
        bias, mine = self.decode_of_none()
        state, out = self.decode(weights, state, self.put_bias(bias), mine)
        jax.block_until_ready(self.top(out["logits"], out["total"]))
        text = np.zeros((1, self.max_len), np.int32)
        jax.block_until_ready(self.score(weights, text, np.int32(0)))
        return state


def _place(state: Tree, slot: Int[Array, ""], values: Mapping[str, Array]) -> Tree:
    """The state with these values in a slot, in which nothing has been written."""
    values = dict(values)
    # As `serving.sampling.sample_keys` makes it.
    key = jax.random.fold_in(jax.random.key(values.pop("seed")), values.pop("choice"))
    values["key"] = jax.random.key_data(key)
    placed = {name: state[name].at[slot].set(value) for name, value in values.items()}
    return {**state, **placed, "written": state["written"].at[slot].set(0)}


def _prefill(
    self: Programs,
    weights: Tree,
    state: Tree,
    slot: Int[Array, ""],
    pages: Int[Array, " M"],
    tokens: Int[Array, " C"],
    begin: Int[Array, ""],
    count: Int[Array, ""],
) -> Tree:
    """The state with `count` tokens of a prompt, from `begin` on, in the pages of a slot.

    tokens: with the one behind the chunk where the layer for further tokens reads it, else the chunk alone.
    """
    arrays = self.arrays()

    def own(array: Any, x: Array) -> Array:
        return x if "length" in array.axes else jax.lax.dynamic_slice_in_dim(x, slot, 1)

    def put(array: Any, x: Array, new: Array) -> Array:
        return new if "length" in array.axes else jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0)

    kept = {name: state[name] for name in arrays}
    cache = _cache(self, begin[None], pages[None], jax.tree.map(own, arrays, kept))
    ops = replace(self._ops, attention=partial(paged_attention, pages=pages[None]))
    read = tokens[: self._chunk] if self.further else tokens
    x, filled = self.model.extend(weights, read[None], cache, ops, count[None])  # nothing is drawn
    if self.further:
        x = self.model.further_input(weights, x)
        further = self.model.further(weights, x, tokens[None, 1:], cache, ops, count[None])[-1]
        filled["further"] = further["further"]
    filled = {name: filled[name] for name in arrays}
    return {**state, **jax.tree.map(put, arrays, kept, filled)}


def _decode(
    self: Programs, weights: Tree, state: Tree, bias: Float[Array, "S V"], mine: Bool[Array, " S"]
) -> tuple[Tree, dict[str, Array]]:
    """The state with a token more, or some, in every active slot that is `mine`, and what came of it.

    W: one, and the guesses that are read with it. Of each slot and place [S, W]: the token, its
    log-probability, and whether it was written; for `top` the logits and the logarithm of the sum of their
    exponentials.
    """
    ops = replace(self._ops, attention=partial(paged_attention, pages=state["pages"]))
    runs, slots, length = state["active"] & mine, jnp.arange(self.slots), state["lengths"]
    text = state["text"].at[slots, length].set(state["token"])
    # None is read at or behind the last place that the text may have: there it has no page.
    most = jnp.clip(state["ends"] - length - 2, 0, state["guesses"])
    if self.further:
        guesses, known = state["drafts"], jnp.minimum(most, state["drafted"])
    else:
        guesses, known = guess(text, length + 1, most, self.guesses)
    cache = _cache(self, length, state["pages"], {name: state[name] for name in self.arrays()})
    tokens = jnp.concatenate([state["token"][:, None], guesses], axis=1)
    counts = jnp.where(runs, 1 + known, 0)
    x, filled = self.model.extend(weights, tokens, cache, ops, counts)
    logits = ops.constrain(self.model.logits(weights, x, ops), (None, None, None))
    total = jax.nn.logsumexp(logits, axis=-1)
    keys, stops, written = jax.random.wrap_key_data(state["key"]), state["stops"], state["written"]
    drawn, wrote, ended = [], [], jnp.zeros(self.slots, bool)
    token = state["token"]
    for place in range(1 + self.guesses):
        if place:  # it was read behind what has been drawn
            runs = runs & ~ended & (place <= known) & (guesses[:, place - 1] == token)
        position = length + place + 1
        # Too early to end.
        early = jnp.where((position < state["least"])[:, None] & (stops >= 0), stops, logits.shape[-1])
        here = bias.at[slots[:, None], early].set(-jnp.inf, mode="drop")
        # What a text gets at a position is drawn with its own key for it.
        new = draw(logits[:, place], written, here, state, keys_at(keys, position))
        token = jnp.where(runs, new, token)
        written = written.at[slots, new].add(runs.astype(jnp.int32))
        text = text.at[slots, jnp.where(runs, position, text.shape[1])].set(new, mode="drop")
        ended |= runs & (jnp.any(new[:, None] == stops, axis=1) | (position + 1 >= state["ends"]))
        drawn.append(new)
        wrote.append(runs)
    token_, ran = jnp.stack(drawn, axis=1), jnp.stack(wrote, axis=1)
    logprob = jnp.take_along_axis(logits, token_[..., None], axis=-1)[..., 0] - total
    state = {
        **state,
        "segments": filled["segments"],
        "lengths": length + jnp.sum(ran, axis=1),
        "token": token,
        "text": text,
        "active": state["active"] & ~ended,
        "written": written,
    }
    if self.further:
        moved = jnp.sum(ran, axis=1)
        state |= draft(self.model, weights, state, cache, x, token_, moved, bias, ops, count=self.guesses)
    out = {"token": token_, "logprob": logprob, "ran": ran, "logits": logits, "total": total}
    return state, {**out, "guessed": jnp.maximum(counts - 1, 0)}


def _cache(self: Programs, lengths: Array, pages: Array, arrays: Tree) -> Tree:
    """The cache as `Model.decode` takes it: of rows whose pages are these, with `arrays` by name."""
    places = jnp.arange(pages.shape[1] * self._page, dtype=jnp.int32)
    return {"lengths": lengths, "places": places, "pages": pages, **arrays}


def _top(size: int, logits: Float[Array, "*S V"], total: Float[Array, "*S"]) -> tuple[Array, Array]:
    """(log-probabilities, tokens) of the likeliest of each row, [..., TOP] in descending order.

    Among the first `size`: the rest of a padded vocabulary is never written, and so no alternative.
    """
    owned = jnp.arange(logits.shape[-1]) < size
    values, tokens = jax.lax.top_k(jnp.where(owned, logits, -jnp.inf), min(TOP, size))
    return values - total[..., None], tokens


def _score(
    model: Model, ops: Ops, size: int, weights: Tree, text: Int[Array, "1 L"], count: Int[Array, ""]
) -> tuple[Array, Array, Array]:
    """Of a text of `count` tokens, at each but the first: its log-probability, and those of the likeliest."""
    length = text.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    batch = {"tokens": text, "positions": positions, "segment_ids": (positions < count).astype(jnp.int32)}
    stream = model.hidden(weights, batch, ops)
    targets = jnp.roll(text, -1, axis=1)

    def some(block: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        x, target = block
        logits = model.logits(weights, x[None], ops)[0]
        total = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0] - total
        return own, *_top(size, logits, total)

    more = -length % HEAD
    stream, targets = jnp.pad(stream[0], ((0, more), (0, 0))), jnp.pad(targets[0], (0, more))
    blocks = stream.reshape(-1, HEAD, stream.shape[-1]), targets.reshape(-1, HEAD)
    own, values, tokens = jax.lax.map(some, blocks)
    return own.ravel(), values.reshape(-1, values.shape[-1]), tokens.reshape(-1, tokens.shape[-1])
