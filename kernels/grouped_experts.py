"""Tokens to their experts and back: which place each choice takes, and the experts' feed-forward.

B rows, T position, n = B*T tokens, k choices of a token, D model, E experts, C the two of a fused pair,
F width inside an expert, R places in a buffer, W devices that experts are split over. A choice is a token and
one of its k.

`run_experts` is written for the part of a batch and of the experts that a device holds; a `ExpertMesh` says
how to reach the other parts. With the default one it is the whole computation on one device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.activations import activate

BLOCKS = (8, 1024)  # least and most rows of one matrix product
INT = jnp.int32


@dataclass(frozen=True)
class ExpertSpec:
    """Static options of a layer of experts.

    capacity: places of an expert for a row of the batch; None: nothing is dropped.
    """

    activation: str
    capacity: int | None = None


@runtime_checkable  # so that a test can hold calls to their annotations
class ExpertMesh(Protocol):
    """The other devices, as the part of a batch on this one sees them."""

    ways: int  # devices that the experts are split over

    def exchange(self, x: Array) -> Array:
        """[W, ...] to [W, ...]: entry w goes to device w and comes from it; its own inverse."""

    def first_expert(self, here: int) -> Any:
        """The number of this device's first expert, of `here` on each."""

    def whole_rows(self, x: Array) -> Array:
        """[B, T here, ...] to [B, T, ...], from the devices that hold the rest of these rows."""

    def rows_here(self, x: Array) -> Array:
        """[B, T, ...] to [B, T here, ...]: the inverse of `whole_rows`."""


class OneDevice:
    """The `ExpertMesh` of one device, which holds everything."""

    ways = 1

    def exchange(self, x: Array) -> Array:
        """`x` itself: there is nobody to exchange with."""
        return x

    def first_expert(self, here: int) -> Any:
        """Number 0: all experts are on this device."""
        return 0

    def whole_rows(self, x: Array) -> Array:
        """`x` itself: rows lie whole on this device."""
        return x

    def rows_here(self, x: Array) -> Array:
        """`x` itself: all positions are on this device."""
        return x


def capacity_of(length: int, per_token: int, experts: int, factor: float) -> int:
    """Places of an expert for a row of `length` tokens: ceil(length * k / E * factor), at most `length`."""
    # Less a hair: a product of floats just above a whole number is that number, not one place more.
    return min(length, math.ceil(length * per_token / experts * factor - 1e-9))


def run_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    gates: Float[Array, "B T k"],
    up: Float[Array, "E D *pair F"],
    down: Float[Array, "E F D"],
    *,
    real: Bool[Array, "B T"],
    order: Int[Array, "B T"] | None = None,
    spec: ExpertSpec,
    others: ExpertMesh | None = None,
    up_bias: Float[Array, "E *pair F"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
    """Sum over a token's choices of gate times expert(x), and the share of its choices that was dropped.

    experts: numbers among all experts, of which `up` and `down` hold this device's. real: False for padding,
    which gives zeros and takes no place. order: index of a position in its row's text; absent: as they
    lie, in rows that are whole here. up_bias: on what comes of `up`, where nothing is dropped.
    """
    others = others or OneDevice()
    if spec.capacity is None:
        out = dropless(x, experts, gates, up, down, real, spec, others, up_bias)
        return out, jnp.zeros(x.shape[:2], jnp.float32)
    assert up_bias is None  # `check_model` has refused it
    order = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=INT), x.shape[:2]) if order is None else order
    return with_capacity(x, experts, gates, up, down, real, order, spec, others)


def dropless(
    x: Array,
    experts: Array,
    gates: Array,
    up: Array,
    down: Array,
    real: Array,
    spec: ExpertSpec,
    others: ExpertMesh,
    up_bias: Array | None = None,
) -> Array:
    """The experts' output where every choice is computed, whatever the load.

    With W devices each token is sent to all of them once, however many of its experts they hold: [W, n, D]
    there and as much back, forward and backward. Static shapes leave no less: buffers that stay exact when
    all choices fall on one device need at least that, and min(k, E/W) times that if they hold choices.
    What comes back is added here, in float32. Only choices that a device's experts serve are computed.
    """
    shape, ways, here = x.shape, others.ways, up.shape[0]

    def send(a: Array) -> Array:
        rows = a.reshape(-1, a.shape[-1])
        return others.exchange(jnp.broadcast_to(rows, (ways, *rows.shape))).reshape(-1, rows.shape[-1])

    # Numbers travel with the gates: a float32 holds them exactly, and it is one exchange less.
    number = jnp.where(real[..., None], experts, here * ways).astype(jnp.float32)
    numbers, shares = jnp.split(send(jnp.concatenate([number, gates], axis=-1)), 2, axis=-1)
    # Numbers came as floats beside gates, so JAX would ask for their gradient.
    mine = jax.lax.stop_gradient(numbers).astype(INT) - others.first_expert(here)
    mine = jnp.where((mine >= 0) & (mine < here), mine, here)
    y = grouped_feed_forward(send(x), mine, shares, up, down, spec.activation, up_bias)
    # Sent back in the compute dtype, half the traffic; only the W partial sums are added in float32.
    back = others.exchange(y.astype(x.dtype).reshape(ways, -1, shape[-1]))
    return jnp.sum(back, axis=0, dtype=jnp.float32).astype(x.dtype).reshape(shape)


def with_capacity(
    x: Array,
    experts: Array,
    gates: Array,
    up: Array,
    down: Array,
    real: Array,
    order: Array,
    spec: ExpertSpec,
    others: ExpertMesh,
) -> tuple[Array, Array]:
    """An expert takes the first `capacity` tokens of each row that choose it, in the order of the text.

    Buffers are [E, B * places, D], there and back once. Where a row is split over devices, each computes
    those of its tokens that were taken: places are then min(capacity, T here), up to as many times too many
    as there are parts.
    """
    assert spec.capacity is not None
    (rows, length, size), per_token, here = x.shape, experts.shape[-1], up.shape[0]
    total, places = here * others.ways, min(spec.capacity, length)
    # Who is first in the text is known only with the whole row. Numbers alone are gathered, k a token, not
    # the tokens' vectors.
    row_experts, row_order, row_real = (others.whole_rows(a) for a in (experts, order, real))
    first = rank_in_row(row_experts, row_order, row_real, total) < spec.capacity
    taken = others.rows_here(first) & real[..., None]
    rank = rank_in_row(experts, order, taken, total)
    row = jnp.arange(rows, dtype=INT)[:, None, None]
    # One flat number for (expert, row, place); a choice without a place points past the end, where scatters
    # drop and gathers fill zeros: no branch, no mask on [.., D].
    place = jnp.where(taken, (experts * rows + row) * places + rank, total * rows * places).reshape(-1)
    choice = invert(place, total * rows * places)
    choices = jnp.broadcast_to(x[:, :, None], (*experts.shape, size)).reshape(-1, size)
    buffer = permute(choices, choice, place).reshape(others.ways, here, rows * places, size)
    hidden = activate(feed("WERD,ED{pair}F->WER{pair}F", others.exchange(buffer), up), spec.activation)
    out = others.exchange(feed("WERF,EFD->WERD", hidden, down)).reshape(-1, size)
    # The way back is the same map read in the other direction, zeros for what was dropped.
    served = permute(out, place, choice).reshape(*experts.shape, size)
    # A token's k parts are added in float32 and rounded once.
    y = jnp.sum(gates[..., None] * served, axis=2, dtype=jnp.float32)
    dropped = jnp.sum(~taken & real[..., None], axis=-1) / per_token
    return y.astype(x.dtype), dropped.astype(jnp.float32)


def feed(spec: str, x: Array, w: Array) -> Array:
    """One projection of all experts; `{pair}` stands for the fused dim where there is one."""
    pair = "C" if "{pair}" in spec and w.ndim == 4 else ""
    return jnp.einsum(spec.replace("{pair}", pair), x, w)


def rank_in_row(
    experts: Int[Array, "B T k"], order: Int[Array, "B T"], taking: Bool[Array, "..."], count: int
) -> Int[Array, "B T k"]:
    """How many tokens earlier in the text chose the same expert, of those that take a place.

    taking: [B, T] or [B, T, k]; the rank of a choice that takes none is past every capacity.
    """
    taking = jnp.broadcast_to(taking if taking.ndim == 3 else taking[..., None], experts.shape)

    def row(experts: Array, order: Array, taking: Array) -> Array:
        length = order.shape[0]
        # Position in the text may exceed this device's share of it: rank it first.
        turn = invert(jnp.argsort(order).astype(INT), length)
        # One sort by (expert, turn in the text) ranks all choices at once. Tokens that take no place sort
        # behind every expert.
        keys = jnp.where(taking, experts * length + turn[:, None], count * length).reshape(-1)
        by_key = jnp.argsort(keys).astype(INT)
        first = jnp.searchsorted(keys[by_key], jnp.arange(count, dtype=INT) * length).astype(INT)
        rank = invert(by_key, keys.shape[0]).reshape(experts.shape) - first[experts]
        return jnp.where(taking, rank, length)

    return jax.vmap(row)(experts, order, taking)


def invert(places: Int[Array, " S"], size: int) -> Int[Array, " R"]:
    """For each of `size` places who took it: an index into `places`, or their number for nobody."""
    number = places.shape[0]
    # A scatter of integers: each place is taken once, so no order of writes can change it.
    return jnp.full(size, number, INT).at[places].set(jnp.arange(number, dtype=INT), mode="drop")


@jax.custom_vjp
def permute(
    x: Float[Array, "S D"], source: Int[Array, " R"], target: Int[Array, " S"]
) -> Float[Array, "R D"]:
    """Row r is `x[source[r]]`, or zeros where that lies outside; `target` is the same map backwards.

    With both at hand the gradient is a gather as well, where JAX would add rows one by one.
    """
    return x.at[source].get(mode="fill", fill_value=0)


permute.defvjp(
    lambda x, source, target: (permute(x, source, target), (source, target)),
    lambda maps, dy: (permute(dy, maps[1], maps[0]), None, None),
)


# -- dropless: sorted choices in blocks of one expert ---------------------------------------------------


def grouped_feed_forward(
    x: Float[Array, "n D"],
    experts: Int[Array, "n k"],
    gates: Float[Array, "n k"],
    up: Float[Array, "E D *pair F"],
    down: Float[Array, "E F D"],
    activation: str,
    up_bias: Float[Array, "E *pair F"] | None = None,
) -> Float[Array, "n D"]:
    """Sum over a token's k choices of gate times expert(x), float32; expert number E gives zeros.

    Choices are sorted by expert and cut into blocks of one expert, the last of each partly empty; a loop over
    the blocks that there are gathers a block's tokens, multiplies, and adds to the tokens' sums. Nothing of
    n*k rows is ever held, and the backward loop makes a block's activations again: 8 products for 6.
    `lax.ragged_dot` multiplies every row with every expert where XLA has no kernel for it (CPU, CUDA): on two
    CPU cores, 8,192 choices of 32 experts (D = F = 256, float32), 1,457 ms forward and 4,512 ms gradient,
    against 52 and 225 ms of these loops, and 339 and 1,166 ms of all experts on all tokens.
    """
    size = block_size(experts.size, up.shape[0])
    return _grouped(x, experts, gates, up, down, () if up_bias is None else (up_bias,), activation, size)


def block_size(choices: int, experts: int) -> int:
    """Rows of one product: a power of two, about half of an expert's even share, so that few are empty."""
    # An expert's last block is half empty on average: with blocks of half its share that is a quarter more
    # work, with larger ones more, and smaller products are slower.
    share = max(choices // (2 * experts), 1)
    return max(BLOCKS[0], min(BLOCKS[1], 2 ** int(math.log2(share))))


Biases = tuple[Array, ...]  # none, or one


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _grouped(
    x: Array, experts: Array, gates: Array, up: Array, down: Array, bias: Biases, activation: str, size: int
) -> Array:
    return looped(_forward, activation, size)(x, experts, gates, up, down, *bias)


def _grouped_forward(
    x: Array, experts: Array, gates: Array, up: Array, down: Array, bias: Biases, activation: str, size: int
) -> Any:
    out = _grouped(x, experts, gates, up, down, bias, activation, size)
    return out, (x, experts, gates, up, down, bias)


def _grouped_backward(activation: str, size: int, saved: Any, dy: Array) -> Any:
    *arrays, bias = saved
    dx, dgates, dup, ddown, *dbias = looped(_backward, activation, size)(*arrays, dy, *bias)
    return dx, None, dgates, dup, ddown, tuple(dbias)


_grouped.defvjp(_grouped_forward, _grouped_backward)


@cache
def looped(function: Callable[..., Any], activation: str, size: int) -> Callable[..., Any]:
    """`function` with a batching rule of its own.

    JAX would make one loop of a batch of loops that end at different times, and copy all its sums in every
    round. Here a batch of one (a pipeline's stage, inside a shard_map) is the loop itself, others take turns.
    """
    body = partial(function, activation, size)
    single = jax.custom_batching.custom_vmap(body)

    @single.def_vmap
    def batched(count: int, is_batched: Any, *args: Array) -> Any:
        pairs = zip(args, is_batched, strict=True)
        stacked = tuple(a if b else jnp.broadcast_to(a, (count, *a.shape)) for a, b in pairs)
        if count == 1:
            out = jax.tree.map(lambda o: o[None], single(*(a[0] for a in stacked)))
        else:
            out = jax.lax.map(lambda a: single(*a), stacked)
        return out, jax.tree.map(lambda _: True, out)

    return single


@dataclass(frozen=True)
class Blocks:
    """Choices sorted by expert and cut into blocks of `size`; none holds choices of two experts."""

    size: int
    per_token: int
    tokens: int
    by_expert: Array  # [n*k] choices, those of expert 0 first
    starts: Array  # [E+1] where each expert's choices begin among them
    ends: Array  # [E] blocks up to and with each expert's last

    @staticmethod
    def of(experts: Int[Array, "n k"], count: int, size: int) -> "Blocks":
        """The blocks of a batch, from each token's experts; numbers from `count` on belong to none here."""
        flat = experts.reshape(-1)
        # Stable, so that an expert's tokens stay in the order of the text: sums come out the same in every
        # run.
        by_expert = jnp.argsort(flat).astype(INT)
        starts = jnp.searchsorted(flat[by_expert], jnp.arange(count + 1, dtype=flat.dtype)).astype(INT)
        ends = jnp.cumsum(-(-(starts[1:] - starts[:-1]) // size)).astype(INT)
        return Blocks(size, experts.shape[1], experts.shape[0], by_expert, starts, ends)

    def block(self, i: Array) -> tuple[Array, Array, Array]:
        """(expert, choices, tokens) of block i; both are out of bounds, and unique, where it is empty."""
        # Which expert a block belongs to depends on data; the loop's body does not, so there is one program
        # for any load.
        expert = jnp.searchsorted(self.ends, i, side="right").astype(INT)
        before = jnp.where(expert > 0, self.ends[expert - 1], 0)
        row = jnp.arange(self.size, dtype=INT)
        place = self.starts[expert] + (i - before) * self.size + row
        choice = self.by_expert.at[place].get(mode="clip")
        used = place < self.starts[expert + 1]
        choices = self.tokens * self.per_token
        token = jnp.where(used, choice // self.per_token, self.tokens + row)
        return expert, jnp.where(used, choice, choices + row), token


def take(x: Array, index: Array) -> Array:
    """Rows of x, zeros where the index is out of bounds."""
    return x.at[index].get(mode="fill", fill_value=0)


def product(spec: str, x: Array, w: Array) -> Array:
    """In float32, from operands of their own type; `{pair}` is the fused dim where there is one."""
    pair = "C" if "{pair}" in spec and max(x.ndim, w.ndim) == 3 else ""
    return jnp.einsum(spec.replace("{pair}", pair), x, w, preferred_element_type=jnp.float32)


def _forward(
    activation: str, size: int, x: Array, experts: Array, gates: Array, up: Array, down: Array, *bias: Array
) -> Array:
    blocks = Blocks.of(experts, up.shape[0], size)
    flat = gates.reshape(-1)

    def add(i: Array, y: Array) -> Array:
        expert, choice, token = blocks.block(i)
        pre = product("RD,D{pair}F->R{pair}F", take(x, token), up[expert])
        for part in bias:
            pre = pre + part[expert]
        pre = pre.astype(x.dtype)
        out = product("RF,FD->RD", activate(pre, activation), down[expert])
        return y.at[token].add(take(flat, choice)[:, None] * out, mode="drop", unique_indices=True)

    # As many rounds as there are blocks in this batch: a bound from data, which is why JAX cannot
    # differentiate the loop itself and backward is written out.
    return jax.lax.fori_loop(0, blocks.ends[-1], add, jnp.zeros(x.shape, jnp.float32))


def _backward(
    activation: str,
    size: int,
    x: Array,
    experts: Array,
    gates: Array,
    up: Array,
    down: Array,
    dy: Array,
    *bias: Array,
) -> tuple[Array, ...]:
    blocks = Blocks.of(experts, up.shape[0], size)
    flat = gates.reshape(-1)
    dy = dy.astype(x.dtype)

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        dx, dgates, dup, ddown, *dbias = sums
        expert, choice, token = blocks.block(i)
        rows, dout, gate = take(x, token), take(dy, token), take(flat, choice)[:, None]
        pre = product("RD,D{pair}F->R{pair}F", rows, up[expert])
        for part in bias:
            pre = pre + part[expert]
        pre = pre.astype(x.dtype)
        # Made again from the inputs: keeping hidden layers of all choices would take k times a dense layer's.
        hidden, pull = jax.vjp(lambda pre: activate(pre, activation), pre)
        # Used twice: for the gate's gradient and, times the gate, for the hidden layer's.
        through = product("RD,FD->RF", dout, down[expert])
        dgate = jnp.sum(hidden.astype(jnp.float32) * through, axis=-1)
        ddown = ddown.at[expert].add(product("RF,RD->FD", (gate * hidden).astype(x.dtype), dout))
        (dpre,) = pull((gate * through).astype(x.dtype))
        # Flat, since XLA's CPU products of bfloat16 into float32 know no third dim here.
        by_width = product("RD,RF->DF", rows, dpre.reshape(size, -1))
        dup = dup.at[expert].add(by_width.reshape(dup.shape[1:]))
        drows = product("R{pair}F,D{pair}F->RD", dpre, up[expert])
        dx = dx.at[token].add(drows, mode="drop", unique_indices=True)
        # A place that no token has is multiplied by a gate of zero: it adds nothing.
        dbias = [d.at[expert].add(jnp.sum(dpre.astype(jnp.float32), axis=0)) for d in dbias]
        dgates = dgates.at[choice].set(dgate, mode="drop", unique_indices=True)
        return dx, dgates, dup, ddown, *dbias

    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (x, flat, up, down, *bias)]
    dx, dgates, dup, ddown, *dbias = jax.lax.fori_loop(0, blocks.ends[-1], add, tuple(zeros))
    return (
        dx.astype(x.dtype),
        dgates.reshape(gates.shape).astype(gates.dtype),
        dup.astype(up.dtype),
        ddown.astype(down.dtype),
        *(d.astype(part.dtype) for d, part in zip(dbias, bias, strict=True)),
    )
