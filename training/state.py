"""The state of a run: born abstract, initialized sharded, never whole on one device."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from optim.muon import Matrix
from parallel.axes import Layout
from parallel.partition import join

WINDOW = 128  # updates that a new one is compared with
Watched = dict[str, Array]  # of `TrainState.guard`: last [2, WINDOW] losses and norms, counts [2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything the step carries. `ema` is a tree like `params`, or None where no average is kept.

    `local` is None unless replicas step alone (`training.local_sgd`). `guard`: see
    `training.safety.skip_updates`. `frozen` is None where every weight trains; else `params` has None for
    what lies in it (`parallel.partition`), and the model sees both joined.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: Any = None
    local: Any = None
    guard: Any = None
    frozen: Any = None

    @property
    def weights(self) -> Any:
        """What the model sees."""
        return join(self.params, self.frozen)

    @property
    def average(self) -> Any:
        """The same of the averaged weights, where an average is kept."""
        return join(self.ema, self.frozen)

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        return replace(self, **changes)


def nothing_seen() -> Watched:
    """The guard's part of the state at step 0: no update taken, none skipped."""
    return {"last": jnp.zeros((2, WINDOW), jnp.float32), "counts": jnp.zeros(2, jnp.int32)}


def is_info(leaf: Any) -> bool:
    """A parameter's birth certificate (`models.param.ParamInfo`), told by what it carries."""
    return hasattr(leaf, "axes") and hasattr(leaf, "reduction")


def split(info: Any, tree: Any) -> tuple[Any, Any]:
    """A parameter tree as (what trains, what is frozen); None for the second where all of it trains."""
    if all(leaf.trained for leaf in jax.tree.leaves(info, is_leaf=is_info)):
        return tree, None

    def pick(*, trained: bool) -> Any:
        return jax.tree.map(lambda i, x: x if i.trained == trained else None, info, tree, is_leaf=is_info)

    return pick(trained=True), pick(trained=False)


def decay_mask(info: Any) -> Any:
    """True where weight decay applies, a tree like the parameters."""
    return jax.tree.map(lambda i: i.decay, info, is_leaf=is_info)


def balance_mask(info: Any) -> Any:
    """True for the biases that balance a router's choices, a tree like the parameters."""
    return jax.tree.map(lambda i: i.role == "balance", info, is_leaf=is_info)


def matrix_dims(info: Any, layout: Layout | None = None) -> Any:
    """A `Matrix` of every hidden matrix, placed as the layout says; None of all else: what Muon asks for."""

    def dims(i: Any) -> Matrix | None:
        if i.role != "matrix":
            return None
        placed = tuple(layout.spec(i.axes, i.shape)) if layout else None
        return Matrix(i.reduction, i.output, placed)

    return jax.tree.map(dims, info, is_leaf=is_info)


def make_state(params: Any, tx: optax.GradientTransformation, ema: bool, frozen: Any = None) -> TrainState:
    """Step 0: fresh optimizer, and the average starting at the parameters."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, tx.init(params), average, guard=nothing_seen(), frozen=frozen)


def first_state(model: Any, tx: optax.GradientTransformation, key: Array, *, ema: bool) -> TrainState:
    """Step 0 of a model's initial weights, split as their certificates say."""
    params, frozen = split(model.info, model.init(key))
    return make_state(params, tx, ema, frozen)


def abstract_state(model: Any, tx: optax.GradientTransformation, layout: Layout, *, ema: bool) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; nothing is allocated.

    model: anything with `init(key)` and `info`, the parameters as they lie in memory. A moment is placed like
    the parameter whose path its own path ends with: left to itself, `jit(tx.init)` would replicate it.
    """
    shapes = jax.eval_shape(lambda key: first_state(model, tx, key, ema=ema), jax.random.key(0))
    return placed_like(shapes, layout.tree(model.info, is_info), layout)


def placed_like(shapes: TrainState, params: Any, layout: Layout) -> TrainState:
    """The abstract state with every array where its parameter is; `params`: the parameters' shardings."""
    by_path = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        owner = next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), None)
        alone = leaf.ndim == 0 or names[0] == "guard"
        assert owner is not None or alone, f"{names}: a state array that belongs to no parameter"
        sharding = owner if owner is not None and leaf.ndim else layout.replicated()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def shardings(tree: Any) -> Any:
    """Shardings of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_state(
    model: Any, tx: optax.GradientTransformation, abstract: TrainState, *, seed: int, ema: bool
) -> TrainState:
    """Initialize every leaf on the devices that own it; the same numbers on any mesh."""

    def init(key: Array) -> TrainState:
        return first_state(model, tx, key, ema=ema)

    return jax.jit(init, out_shardings=shardings(abstract))(jax.random.key(seed))
