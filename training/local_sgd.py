"""Local SGD and DiLoCo: replicas step alone, and every few steps they exchange what they have learnt.

Stich 2018 (arXiv:1805.09767); Douillard et al. 2023 (arXiv:2311.08105). R replicas, B batch, T position.

An inner step is the ordinary train step over one replica's rows, batched by `jax.vmap` over a leading dim R
that is split over mesh.replica. The layout that it sees leaves `replica` out, so that nothing in it crosses
that link, metrics included: they come out as [R]. The outer step stands beside it in the same executable.

    TrainState   in memory                              in a checkpoint
    params       outer parameters                       the same
    opt_state    of each replica [R, ...]; counters []  mean over replicas
    local        params [R, ...], momentum              replicas: opt_state [R, ...], momentum
    guard        of each replica [R, ...]               the first replica's; guards: all [R, ...]

Whatever evaluates, samples or starts from `params` has the outer ones and need not know. A checkpoint falls
on an outer step, where every replica's parameters are the outer ones; another R, or a run without local SGD,
goes on from the mean of the optimizers' states.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from parallel.axes import Layout
from parallel.schedules.stage_layout import without_axis
from training.config import LocalSGDConfig, inner_steps
from training.safety.skip_updates import IN_A_ROW, SKIPPED
from training.state import TrainState, shardings

AXIS = "replica"
LEVELS = 127  # of int8 to either side of zero
StepFunction = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


def steps_alone(config: LocalSGDConfig | None, mesh: Mesh) -> bool:
    """Whether replicas differ between exchanges; else they are synchronous data parallelism."""
    return inner_steps(config) > 1 and mesh.shape[AXIS] > 1


def one_replica(layout: Layout) -> Layout:
    """The layout as one replica sees it: no rule names mesh.replica.

    Raises ValueError where the rows of a batch are not split over replicas first, so that giving each its own
    would take communication.
    """
    rows = list(layout.rules.get("batch", ()))
    if rows[:1] != [AXIS]:
        others = [axis for axis in rows if axis != AXIS]
        raise ValueError(
            f"mesh.rules.batch={rows} does not split rows over {AXIS} first, as replicas that step alone "
            f"(local_sgd.inner_steps above 1) need; use mesh.rules.batch=[{', '.join([AXIS, *others])}]"
        )
    rules = {name: [axis for axis in axes if axis != AXIS] for name, axes in layout.rules.items()}
    return replace(layout, rules=rules)


@dataclass(frozen=True)
class Replicas:
    """R copies of a training state that step alone, and how they meet.

    alone: the abstract state of one replica as it lies in memory; stored: as checkpoints have it. chunks: of
    layers a pipeline's stage; above 1 they lie on other stages in a checkpoint.
    """

    config: LocalSGDConfig
    layout: Layout  # of one replica
    alone: TrainState
    stored: TrainState
    chunks: int = 1

    @property
    def count(self) -> int:
        """R."""
        return self.layout.mesh.shape[AXIS]

    @property
    def metrics(self) -> NamedSharding:
        """Of every metric, [R]."""
        return NamedSharding(self.layout.mesh, PartitionSpec(AXIS))

    @property
    def state(self) -> TrainState:
        """The abstract state in memory."""
        local = {"params": self.each(self.alone.params), "momentum": self.alone.params}
        return self.alone.replace(
            opt_state=self.each(self.alone.opt_state), local=local, guard=self.each(self.alone.guard)
        )

    @property
    def canonical(self) -> TrainState:
        """The abstract state in a checkpoint."""
        return self._merged(self.stored)

    def _merged(self, one: TrainState) -> TrainState:
        return one.replace(
            local={
                "replicas": self.each(one.opt_state),
                "momentum": one.params,
                "guards": self.each(one.guard),
            }
        )

    def each(self, tree: Any) -> Any:
        """A tree of abstract arrays, one of each for every replica; counters are the same in all."""

        def widen(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if leaf.ndim == 0:
                return leaf
            shape = (self.count, *leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=widened(leaf.sharding))

        return jax.tree.map(widen, tree)

    def copies(self, tree: Any) -> Any:
        """A tree of arrays, the same for every replica; to be traced."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *x.shape)) if x.ndim else x, tree)

    def begin(self, fresh: TrainState) -> TrainState:
        """All replicas at one replica's state, nothing learnt; to be traced."""
        momentum = jax.tree.map(jnp.zeros_like, fresh.params)
        local = {"params": self.copies(fresh.params), "momentum": momentum}
        return fresh.replace(
            opt_state=self.copies(fresh.opt_state), local=local, guard=self.copies(fresh.guard)
        )

    # -- steps -----------------------------------------------------------------------------------------

    def train_step(self, inner: StepFunction, *, ema_decay: float | None, seed: int) -> StepFunction:
        """`inner`, the step of one replica, by all; and the outer step after every `inner_steps` of them.

        The batch is [B, T], metrics are [R]. An average of the weights moves with the outer steps, as far as
        it would in `inner_steps` steps.
        """
        average = None if ema_decay is None else ema_decay**self.config.inner_steps

        def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
            params, opt_state, guard, metrics = self.step_alone(inner, state, batch)
            step = state.step + 1
            key = jax.random.fold_in(jax.random.key(seed), step)
            outer, momentum, ema, params = jax.lax.cond(
                step % self.config.inner_steps == 0,
                lambda kept: self.meet(kept, key, average),
                lambda kept: kept,
                (state.params, state.local["momentum"], state.ema, params),
            )
            local = {"params": params, "momentum": momentum}
            return TrainState(step, outer, opt_state, ema, local, guard, state.frozen), metrics

        return train_step

    def step_alone(
        self, inner: StepFunction, state: TrainState, batch: dict[str, Array]
    ) -> tuple[Any, Any, Any, Any]:
        """Parameters, optimizer states, guards and metrics of all replicas after one step of each."""

        def step(params: Any, opt_state: Any, guard: Any, rows: Any) -> tuple[Any, Any, Any, Any]:
            # What does not train is the same for all replicas, and not batched.
            mine = TrainState(state.step, params, opt_state, guard=guard, frozen=state.frozen)
            new, metrics = inner(mine, rows)
            return new.params, new.opt_state, new.guard, metrics

        counters = jax.tree.map(lambda x: 0 if x.ndim else None, state.opt_state)
        run = jax.vmap(step, (0, counters, 0, 0), (0, counters, 0, 0), spmd_axis_name=AXIS)
        return run(state.local["params"], state.opt_state, state.guard, jax.tree.map(self.rows, batch))

    def rows(self, x: Array) -> Array:
        """[B, T] to [R, B/R, T]; each replica's rows are on its devices already."""
        x = x.reshape(self.count, -1, *x.shape[1:])
        spec = self.layout.spec(("batch", "length"), x.shape[1:], "batch")
        return jax.lax.with_sharding_constraint(x, widened(NamedSharding(self.layout.mesh, spec)))

    def meet(self, kept: Any, key: Array, average: float | None) -> tuple[Any, Any, Any, Any]:
        """The outer step: what replicas have learnt, averaged, is the gradient of SGD with momentum.

        kept, and what comes back: outer parameters, momentum, average of the weights, parameters [R, ...].
        """
        outer, momentum, ema, params = kept
        config = self.config
        leaves, treedef = jax.tree.flatten(outer)
        keys = jax.tree.unflatten(treedef, [jax.random.fold_in(key, i) for i in range(len(leaves))])
        gradient = jax.tree.map(self.mean_difference, outer, params, shardings(self.alone.params), keys)
        momentum = jax.tree.map(lambda m, g: config.outer_momentum * m + g, momentum, gradient)
        step = momentum
        if config.nesterov:
            step = jax.tree.map(lambda m, g: g + config.outer_momentum * m, momentum, gradient)
        outer = jax.tree.map(lambda p, s: p - config.outer_learning_rate * s, outer, step)
        if average is not None:
            ema = optax.incremental_update(outer, ema, 1.0 - average)
        return outer, momentum, ema, self.copies(outer)

    def mean_difference(self, outer: Array, mine: Array, placed: NamedSharding, key: Array) -> Array:
        """Mean over replicas of outer - mine [R, ...], sent as `local_sgd.exchange` says, added in float32.

        Small numbers are gathered, R - 1 times a device's part, each of them rounded once; an all-reduce of
        float32 moves 8 (R - 1) / R bytes a parameter. So bfloat16 pays below 4 replicas and int8 below 8.
        """
        difference = jax.lax.with_sharding_constraint(outer[None] - mine, widened(placed))
        kind = self.config.exchange
        if kind == "float32":
            mean = jnp.mean(difference, axis=0)
        else:
            sent = [send(x, placed) for x in encode(kind, difference, key)]
            # One by one: a product summed over one of seven dims is what XLA:CPU gets wrong (jax#40412).
            each = [decode(kind, [x[r] for x in sent]) for r in range(self.count)]
            mean = functools.reduce(jnp.add, each) / self.count
        return jax.lax.with_sharding_constraint(mean, placed)

    # -- checkpoints -----------------------------------------------------------------------------------

    def to_canonical(self, state: TrainState) -> TrainState:
        """The state as checkpoints have it."""
        assert int(state.step) % self.config.inner_steps == 0, "replicas differ between outer steps"
        mean = jax.tree.map(_mean, state.opt_state, shardings(self.alone.opt_state))
        local = {"replicas": state.opt_state, "momentum": state.local["momentum"], "guards": state.guard}
        first = jax.tree.map(_first, state.guard, shardings(self.alone.guard))
        return self._move(state.replace(opt_state=mean, local=local, guard=first), self.canonical)

    def from_canonical(self, stored: TrainState) -> TrainState:
        """The inverse. Where `stored.local` lacks them, replicas start at the mean and momentum at zero."""
        found = stored.local or {}
        like = self._merged(self.alone)
        stored = self._move(
            stored.replace(local=found), like.replace(local={name: like.local[name] for name in found})
        )
        opt_state, momentum = stored.local.get("replicas"), stored.local.get("momentum")
        guard = stored.local.get("guards")
        if guard is None:
            guard = self._placed_copies(stored.guard)
        if opt_state is None:
            opt_state = self._placed_copies(stored.opt_state)
        if momentum is None:
            momentum = jax.tree.map(jnp.zeros_like, stored.params)
        local = {"params": self._placed_copies(stored.params), "momentum": momentum}
        return stored.replace(opt_state=opt_state, local=local, guard=guard)

    def with_params(self, state: TrainState, params: Any) -> TrainState:
        """The state with every replica at other parameters."""
        return state.replace(params=params, local={**state.local, "params": self._placed_copies(params)})

    def _placed_copies(self, tree: Any) -> Any:
        return jax.jit(self.copies, out_shardings=jax.tree.map(_widened_but_counters, tree))(tree)

    def _move(self, state: TrainState, like: TrainState) -> TrainState:
        def move(leaf: Array, to: jax.ShapeDtypeStruct) -> Array:
            if leaf.shape == to.shape and leaf.sharding == to.sharding:
                return leaf
            assert isinstance(leaf.sharding, NamedSharding)
            whole = without_axis(leaf.sharding, "pipeline") if self.chunks > 1 else None
            return _reshaper(to.shape, whole, to.sharding)(leaf)

        return jax.tree.map(move, state, like)


def widened(sharding: Any) -> NamedSharding:
    """Of [R, ...], a replica's part placed as `sharding` says."""
    return NamedSharding(sharding.mesh, PartitionSpec(AXIS, *sharding.spec))


def _widened_but_counters(x: Array) -> Any:
    return widened(x.sharding) if x.ndim else x.sharding


# -- what crosses the link ---------------------------------------------------------------------------------


def encode(kind: str, x: Array, key: Array) -> list[Array]:
    """What is sent of x [R, ..., n] float32.

    bfloat16: rounded to the nearest, 2 bytes a number. int8: 1 byte, and a float32 scale for every row of n,
    rounded up or down at random with the right mean: what is far smaller than the row's largest is not
    lost but rarely sent.
    """
    if kind == "bfloat16":  # as integers, or a compiler may send float32 and round afterwards
        return [jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)]
    assert kind == "int8", kind
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LEVELS
    levels = x / jnp.where(scale == 0, 1.0, scale)
    levels = jnp.floor(levels + jax.random.uniform(key, x.shape))
    return [jnp.clip(levels, -LEVELS, LEVELS).astype(jnp.int8), scale]


def decode(kind: str, sent: list[Array]) -> Array:
    """One replica's numbers [..., n] in float32, from what it sent."""
    if kind == "bfloat16":
        return jax.lax.bitcast_convert_type(sent[0], jnp.bfloat16).astype(jnp.float32)
    levels, scale = sent
    return levels.astype(jnp.float32) * scale


def send(x: Array, placed: NamedSharding) -> Array:
    """[R, ...], one replica's part on its own devices, to all of it on every replica's."""
    entries = (*placed.spec, *(None,) * (x.ndim - 1 - len(placed.spec)))
    spec = [entry if size > 1 else None for entry, size in zip(entries, x.shape[1:], strict=True)]
    here = NamedSharding(placed.mesh, PartitionSpec(AXIS, *spec))
    everywhere = NamedSharding(placed.mesh, PartitionSpec(None, *spec))
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, here), everywhere)


# -- placed arrays -----------------------------------------------------------------------------------------


def _first(x: Array, placed: NamedSharding) -> Array:
    return _taker(placed)(x)


@functools.cache
def _taker(placed: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x[0], out_shardings=placed)


def _mean(x: Array, placed: NamedSharding) -> Array:
    return _averager(placed)(x) if x.ndim else x


@functools.cache
def _averager(placed: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: jnp.mean(x, axis=0), out_shardings=placed)


@functools.cache
def _reshaper(
    shape: tuple[int, ...], whole: NamedSharding | None, placed: NamedSharding
) -> Callable[[Array], Array]:
    def move(x: Array) -> Array:
        if whole is not None:  # said outright, or the partitioner finds it out and warns
            x = jax.lax.with_sharding_constraint(x, whole)
        return x.reshape(shape)

    return jax.jit(move, out_shardings=placed)


def host_scalars(metrics: Mapping[str, Array]) -> dict[str, Any]:
    """A step's metrics as host scalars; of metrics [R], what the replicas on this process's devices say.

    Means are weighted by tokens, but of skipped updates the worst counts; `tokens` is scaled to all replicas,
    exact where one process holds them all.
    """
    if np.ndim(metrics["tokens"]) == 0:  # every step: `device_get` takes six times as long
        return {name: np.asarray(x) for name, x in metrics.items()}
    read: Any = jax.device_get({name: _here(x) for name, x in metrics.items()})
    seen = {name: np.concatenate(parts).astype(np.float64) for name, parts in read.items()}
    tokens, replicas = seen.pop("tokens"), metrics["tokens"].shape[0]
    weights = np.maximum(tokens, 1e-9)
    means = {name: float(np.average(values, weights=weights)) for name, values in seen.items()}
    worst = {name: float(seen[name].max()) for name in (SKIPPED, IN_A_ROW) if name in seen}
    return {**means, **worst, "tokens": float(tokens.sum() * replicas / len(tokens))}


def _here(x: Array) -> list[Array]:
    """The parts of [R] that this process can read, each once."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return [shards[start] for start in sorted(shards)]
