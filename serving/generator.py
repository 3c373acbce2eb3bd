"""Token ids in, token ids and log-probabilities out: what samples, evaluations and a server share.

Neither a tokenizer nor a file. B rows, T positions, L room for the longest text, P tokens with a score.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from common.checks import within
from kernels.attention import chunked_attention
from kernels.attention_tree import tree_attention
from kernels.einsum import Projector
from kernels.grouped_experts import run_experts
from kernels.names import PROJECTIONS
from models.mixer import mixer
from models.ops import Ops, identity_constrain
from models.transformer import Model, Tree
from parallel.axes import Layout
from parallel.experts import expert_dispatch
from serving.passes import Texts, row_passes, tree_passes
from serving.sampling import Sampling, first_largest, keys_at, sample
from serving.settings import check_cache_bits

SHORT = 16  # a prompt up to so long is fed token by token: a program less to compile
LENGTH_STEP = 32  # longer ones, and texts, are padded to multiples: few shapes, so few compilations
LEAST_CAPACITY = 160  # of a cache that grows: below, a program more costs what it saves
TARGETS = 256  # whose scores are made at once from those of a pass: the head is the dearest projection
Place = tuple[int, int, int]  # a row of a pass, a position in it, and the token that is scored there


class Generator:
    """A model whose weights are ready to decode, on the mesh where they lie.

    model, ops: as in training; params: stacked as in a checkpoint, sharded over the mesh of `layout` (None:
    on one device). What is written for a prompt depends on the weights, the prompt, `sampling` and its key
    alone: in float32 neither the batch around it nor the mesh changes a token. Over several processes all
    call alike, and all get the whole answer. Programs are compiled once for a shape and live as long as the
    generator. packed: quantized weights stay so, and each product dequantizes its own. cache_bits: as in
    `serving.settings.ServeConfig`; scores need no cache.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        ops: Ops,
        layout: Layout | None = None,
        *,
        packed: bool = False,
        cache_bits: int | None = None,
    ) -> None:
        if layout is not None:
            # A token decoded has one position, which no axis can split; devices of `context` work alike.
            layout = replace(layout, rules={**layout.rules, "length": (), "act_length": ()})
        self.model = model
        self._ways = 1 if layout is None else layout.ways("batch")
        ops = decoding_ops(ops, layout, cache_bits)
        jit = partial(jax.jit, compiler_options=layout.compiler_options if layout else None)
        self._unstack = jit(partial(model.unstack, ops=ops, masters=masters_of(ops), packed=packed))
        self._prefill = jit(partial(_prefill, model, ops), static_argnames="capacity")
        self._advance = jit(partial(_advance, model, ops), static_argnames=("capacity", "sampling"))
        self._hidden = jit(partial(_hidden, model, ops))
        self._score = jit(partial(_score, model, ops))
        self._learned = model.config.position == "learned"
        mixers = {spec.mixer for segment in model.segments for spec in segment.period}
        if any(mixer(name).whole_rows for name in mixers):
            most = model.config.max_seq_len if self._learned else None
            self._passes = partial(row_passes, ways=self._ways, most=most)
        else:
            self._passes = partial(tree_passes, ways=self._ways)
        self.update(params)

    def update(self, params: Tree) -> None:
        """Go on with other weights of the same shapes and shardings; nothing is compiled again."""
        # Once, and not at every token: cast and cut into layers. A copy, where the caller keeps its own.
        self._weights = self._unstack(params)

    def forget(self) -> None:
        """Let go of the weights, so that nothing holds their memory until `update` gives others."""
        self._weights = None

    def complete(
        self,
        prompts: Texts,
        sampling: Sampling,
        keys: Key[Array, " B"],
        *,
        max_new_tokens: int,
        stop_id: int | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the prompt and without the closing `stop_id`.

        keys: one a prompt (`serving.sampling.sample_keys`); a token's is folded from it by its position. A
        list is shorter than max_new_tokens exactly where `stop_id` ended it. Raises ValueError for an empty
        prompt, an id outside the vocabulary, a count below 1, or a text longer than a learned position table.
        """
        if not prompts:
            return []
        within("max_new_tokens", max_new_tokens, 1)
        self._check(prompts, max_new_tokens)
        count = len(prompts)
        longest = max(map(len, prompts))
        room = self._room(longest + max_new_tokens)
        # Rows that only fill the devices hold one token, are at their end, and borrow the first key.
        rows = [*prompts, *[[0]] * (-count % self._ways)]
        tokens, lengths = _at_the_left(rows, room)
        done = np.arange(len(rows)) >= count
        keys_data = np.asarray(jax.random.key_data(keys))[np.where(done, 0, np.arange(len(rows)))]
        stop = np.int32(-1 if stop_id is None else stop_id)
        given = (lengths, lengths + np.int32(max_new_tokens), keys_data, stop)

        cache, sizes = None, _capacities(longest, room)
        if longest > SHORT:
            # All but the last token of each, from which the first new one is drawn.
            head = tokens[:, : min(_rounded(longest - 1), room)]
            cache = self._prefill(self._weights, head, lengths - 1, capacity=sizes[0])
        for size in sizes:
            cache, tokens, done = self._advance(
                self._weights, cache, tokens, done, *given, capacity=size, sampling=sampling
            )
            if np.all(done):
                break
        written = zip(np.asarray(tokens)[:count], lengths[:count], strict=True)
        return [_until(row[n : n + max_new_tokens], stop) for row, n in written]

    def score(self, texts: Texts, starts: Sequence[int] | None = None) -> list[Float[np.ndarray, " P"]]:
        """Natural log-probabilities, float32, of the tokens of each text from its start (1 by default) on.

        Each by those before it. On one device and in float32 a text's figures are bitwise the same whatever
        is scored with it: its own length alone says which program computes it. What several texts begin with
        is read once. Raises ValueError as `complete` does.
        """
        return [scores for scores, _ in self.score_greedy(texts, starts)]

    def score_greedy(
        self, texts: Texts, starts: Sequence[int] | None = None
    ) -> list[tuple[Float[np.ndarray, " P"], bool]]:
        """The same, and whether each of these tokens is the likeliest, the first of equals."""
        if not texts:
            return []
        self._check(texts, 0)
        starts = [1] * len(texts) if starts is None else starts
        found: list[Any] = [None] * len(texts)
        for part in self._passes([tuple(text[:-1]) for text in texts]):
            wanted = [
                (row, int(place), token)
                for number, row, places in part.texts
                for place, token in zip(
                    places[starts[number] - 1 :], texts[number][starts[number] :], strict=True
                )
            ]
            figures, at = self._figures(part.batch, wanted), 0
            for number, *_ in part.texts:
                own = figures[:, at : at + len(texts[number]) - starts[number]]
                found[number] = own[0], bool(np.all(own[1]))
                at += own.shape[1]
        return found

    def _figures(self, batch: dict[str, Any], wanted: Sequence[Place]) -> Float[np.ndarray, "2 P"]:
        """Log-probabilities of these tokens, and 1 where one is the likeliest: the head in equal blocks."""
        if not wanted:
            return np.zeros((2, 0), np.float32)
        stream = self._hidden(self._weights, batch)
        size = TARGETS + -TARGETS % self._ways
        places = np.zeros((len(wanted) + -len(wanted) % size, 3), np.int32)
        places[: len(wanted)] = wanted
        blocks = places.reshape(-1, self._ways, size // self._ways, 3)
        # All on their way, then read.
        found = [self._score(self._weights, stream, block) for block in blocks]
        return np.concatenate([np.asarray(x).reshape(2, -1) for x in found], axis=1)[:, : len(wanted)]

    def _check(self, texts: Texts, max_new_tokens: int) -> None:
        """Raise ValueError for what the model can neither read nor go on from."""
        config, longest = self.model.config, max(map(len, texts))
        if not all(texts):
            raise ValueError(
                "a prompt of 0 tokens has nothing to go on from; begin it with the tokenizer's bos"
            )
        if min(map(min, texts)) < 0 or max(map(max, texts)) >= config.vocab_size:
            raise ValueError(
                f"a prompt holds a token outside 0..{config.vocab_size - 1}, the model's vocabulary; "
                f"use the tokenizer that the model was trained with"
            )
        if self._learned and longest + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds "
                f"model.max_seq_len={config.max_seq_len} learned positions; "
                f"use at most {config.max_seq_len - longest}"
            )

    def _room(self, needed: int) -> int:
        """Places for a text of so many tokens, rounded up as far as there are positions."""
        room = _rounded(needed, LENGTH_STEP)
        return min(room, self.model.config.max_seq_len) if self._learned else room


def masters_of(ops: Ops) -> set[str]:
    """Projections whose weights stay in float32: what rounds them does so straight from the masters."""
    product = ops.project
    eight_bit = isinstance(product, Projector) and (product.quantized or product.rounded) is not None
    return {*PROJECTIONS} - {*getattr(product, "keep", ())} if eight_bit else set()


def decoding_ops(ops: Ops, layout: Layout | None, cache_bits: int | None = None) -> Ops:
    """Training's operations for queries beside a cache: what its kernels are not made for is replaced.

    Raises ValueError for bits that no cache has.
    """
    check_cache_bits(cache_bits)
    dispatch = run_experts if layout is None else expert_dispatch(layout, run_experts)

    def experts(*arrays: Array, spec: Any, **rest: Any) -> Any:
        # Capacity is counted in a row of training's length, so what it drops would hang on the shape here.
        return dispatch(*arrays, spec=replace(spec, capacity=None), **rest)

    constrain = identity_constrain if layout is None else layout.constrain
    parts = (1, 1) if layout is None else (layout.ways("batch"), 1)
    return replace(
        ops,
        attention=chunked_attention,
        experts=experts,
        constrain=constrain,
        parts=parts,
        cache_bits=cache_bits,
    )


# -- on the devices ----------------------------------------------------------------------------------------


def _prefill(
    model: Model,
    ops: Ops,
    params: Tree,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    *,
    capacity: int,
) -> Tree:
    """A cache of that capacity with the first `counts` tokens of each row."""
    cache = model.init_cache(tokens.shape[0], capacity, ops)
    return model.decode(params, tokens, cache, ops, counts)[1]  # nothing is drawn: no logits are made


def _advance(
    model: Model,
    ops: Ops,
    params: Tree,
    cache: Tree | None,
    tokens: Int[Array, "B L"],
    done: Array,
    lengths: Int[Array, " B"],
    ends: Int[Array, " B"],
    keys: Array,
    stop: Int[Array, ""],
    *,
    capacity: int,
    sampling: Sampling,
) -> tuple[Tree, Int[Array, "B L"], Array]:
    """(cache, tokens, done) when all rows are, or one has come to `capacity`; texts are completed in place.

    A row feeds the token at its own length: its prompt's, as far as that goes, then what it drew. What
    follows a row's end or `stop` in `tokens` is what was there.
    """
    rows = jnp.arange(tokens.shape[0])
    keys = jax.random.wrap_key_data(keys)
    grown = model.init_cache(len(rows), capacity, ops) if cache is None else model.grow(cache, capacity, ops)

    def unfinished(carry: tuple[Tree, Array, Array]) -> Array:
        cache, _, done = carry
        return jnp.any(~done) & (jnp.max(cache["lengths"]) < capacity)

    def advance(carry: tuple[Tree, Array, Array]) -> tuple[Tree, Array, Array]:
        cache, tokens, done = carry
        current = tokens[rows, cache["lengths"]]
        # A row that is done gives nothing more to its cache, and stays where it is.
        logits, cache = model.decode(params, current[:, None], cache, ops, (~done).astype(jnp.int32))
        position = cache["lengths"]
        # Whole rows of logits: what is split by vocabulary is drawn from as on one device.
        drawn = sample(ops.constrain(logits, ("batch", None)), keys_at(keys, position), sampling)
        is_new = ~done & (position >= lengths)
        at = jnp.where(is_new, position, tokens.shape[1])
        tokens = tokens.at[rows, at].set(drawn, mode="drop")
        return cache, tokens, done | (is_new & (drawn == stop)) | (position + 1 >= ends)

    cache, tokens, done = jax.lax.while_loop(unfinished, advance, (grown, tokens, done))
    # Read by every process.
    return cache, ops.constrain(tokens, (None, None)), ops.constrain(done, (None,))


def _hidden(model: Model, ops: Ops, params: Tree, batch: dict[str, Any]) -> Float[Array, "B T D"]:
    """What the last layer gives for each of the batch's tokens."""
    batch = jax.tree.map(lambda x: ops.constrain(x, ("batch", *[None] * (x.ndim - 1))), batch)
    if "paths" in batch:
        ops = replace(ops, attention=partial(tree_attention, paths=batch.pop("paths")))
    return model.hidden(params, batch, ops)


def _score(
    model: Model, ops: Ops, params: Tree, stream: Float[Array, "B T D"], places: Int[Array, "R P 3"]
) -> Float[Array, "2 R P"]:
    """Of each place (row, position, token): the token's log-probability, and 1 where it is the likeliest."""
    row, position, token = (ops.constrain(places[..., i], ("batch", None)) for i in range(3))
    x = ops.constrain(stream[row, position], ("batch", None, None))
    logits = model.logits(params, x, ops)
    # A sum and no gather: the vocabulary may be split over devices.
    hit = jnp.arange(logits.shape[-1]) == token[..., None]
    own = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    likeliest = first_largest(logits) == token
    return ops.constrain(jnp.stack([own, likeliest.astype(own.dtype)]), (None, None, None))


# -- on the host -------------------------------------------------------------------------------------------


def _rounded(count: int, step: int | None = None) -> int:
    """`count` up to a multiple of `step`: by default a small one where it is small."""
    step = step or (SHORT if count <= 2 * LENGTH_STEP else 2 * LENGTH_STEP)
    return -(-count // step) * step


def _capacities(longest: int, room: int) -> list[int]:
    """Sizes that a cache has one after another, up to `room`.

    A step reads the whole cache, filled or not: half the size is enough for half of a text. Each size is a
    program of its own, so there are few.
    """
    sizes = [room]
    while (half := _rounded(-(-sizes[0] // 2), LENGTH_STEP)) >= max(LEAST_CAPACITY, longest + LENGTH_STEP):
        if half == sizes[0]:
            break
        sizes.insert(0, half)
    return sizes


def _at_the_left(texts: Texts, room: int) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """The texts at the left of rows, zeros behind them, and their lengths."""
    tokens = np.zeros((len(texts), room), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, np.array([len(text) for text in texts], np.int32)


def _until(row: np.ndarray, stop: np.int32) -> list[int]:
    ends = np.flatnonzero(row == stop)
    return row[: ends[0] if len(ends) else len(row)].tolist()
