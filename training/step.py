"""One optimizer step as a pure function, compiled once, ahead of the first batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from data.batch import TEXT, Field
from parallel.axes import Layout
from training.config import GuardConfig
from training.objectives.base import Objective
from training.safety.signals import VOTE
from training.safety.skip_updates import Skipping, Updated, judge, unless_skipped
from training.state import TrainState, is_info, shardings

Batch = dict[str, Array]


def abstract_batch(
    layout: Layout, batch_size: int, seq_len: int, fields: Mapping[str, Field] = TEXT
) -> Batch:
    """Shapes and shardings of a batch: rows over the data axes, positions over `context`."""
    sizes = {"batch": batch_size, "length": seq_len}

    def abstract(field: Field) -> Any:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in field.dims)
        axes = tuple(dim if isinstance(dim, str) else None for dim in field.dims)
        # Whoever holds a row's tokens holds its targets and weights.
        placed = layout.sharding(axes, shape, "batch")
        return jax.ShapeDtypeStruct(shape, jnp.dtype(field.dtype), sharding=placed)

    return {name: abstract(field) for name, field in fields.items()}


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    strategy: Any,
    ops: Any,
    objective: Objective,
    *,
    learning_rate: Callable[[Array], Array],
    grad_clip: float | None,
    ema_decay: float | None,
    seed: int,
    guard: GuardConfig | None = None,
    skipping: Skipping = "branch",
    info: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The step `(state, batch) -> (state, metrics)`.

    Metrics are float32 scalars: what the objective reports (`loss` is always there), `grad_norm` before
    clipping, `learning_rate`, `tokens` (positions with weight), and those of the guard. Random keys are
    folded from (seed, step), so that neither mesh nor schedule changes them.

    guard: what updates are skipped; None: none. skipping: how, see
    `training.safety.skip_updates.unless_skipped`. info: certificates of what trains; None: the model's.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        # Not carried in the state: a resumed run has the key of its step whatever came before.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # Before the gradient what it is taken of: here an objective may ask for a forward pass of its own.
        batch, figures = objective.prepare(batch, lambda b: strategy.score(model, state.weights, b, ops))
        means, grads = strategy.value_and_grad(objective, model, state.params, batch, key, ops, state.frozen)
        means = {**means, **figures}
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(weights_only(model.info if info is None else info, grads))

        def update(kept: Updated) -> Updated:
            params, opt_state, ema = kept
            scaled = grads
            # Balance biases take their sign alone, so that scaling them does nothing.
            if grad_clip is not None:
                # The norm over all leaves and devices, once: a leaf's own would clip what is merely large.
                scale = jnp.minimum(1.0, grad_clip / (norm + 1e-6))
                scaled = jax.tree.map(lambda g: g * scale, grads)
            # The learning rate is within, by a counter that goes on where an update is skipped.
            updates, opt_state = tx.update(scaled, opt_state, params)
            params = optax.apply_updates(params, updates)
            if ema_decay is not None:
                # Of the new weights: after the first step the average is not the random start alone.
                ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
            return params, opt_state, ema

        # What a skipped update leaves as it is, to the bit: the three are chosen between together.
        kept = (state.params, state.opt_state, state.ema)
        watched, told = state.guard, dict[str, Array]()
        with jax.named_scope("optimizer"):
            if guard is None:
                params, opt_state, ema = update(kept)
            else:
                taken, watched, told = judge(
                    state.guard, objective.report(means)["loss"], norm, guard.skip_sigma
                )
                params, opt_state, ema = unless_skipped(taken, update, kept, how=skipping)
        # On the devices still: the host reads them one step late and never waits for this one.
        metrics = {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "tokens": jnp.sum(batch["loss_weights"] > 0).astype(jnp.float32),
            **told,
        }
        metrics |= objective.report(means)
        new = TrainState(state.step + 1, params, opt_state, ema, guard=watched, frozen=state.frozen)
        return new, metrics

    return train_step


def weights_only(info: Any, grads: Any) -> list[Array]:
    """The gradients that are gradients: the balance biases of routers carry a load instead."""
    # By role and not by path: the tree may hold layers by stages, in which paths differ.
    roles = [leaf.role for leaf in jax.tree.leaves(info, is_leaf=is_info)]
    return [g for role, g in zip(roles, jax.tree.leaves(grads), strict=True) if role != "balance"]


def make_eval_step(model: Any, strategy: Any, ops: Any) -> Callable[[Any, Batch], dict[str, Array]]:
    """The forward-only twin, `(params, batch) -> sums over the batch`."""

    # Weights alone, no state: the average of the weights is evaluated by the same program.
    def eval_step(params: Any, batch: Batch) -> dict[str, Array]:
        return strategy.evaluate(model, params, batch, ops)

    return eval_step


@dataclass(frozen=True)
class FlatStep:
    """The compiled step over the leaves of a state in a row.

    `(state, batch) -> (state, metrics)` like any step; a loop takes the state apart once (`leaves_of`) and
    calls `on_leaves`, which spares a walk through both trees at every step. The leaves given are donated.
    """

    executable: jax.stages.Compiled
    structure: Any  # of the state's tree

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One step on a whole state."""
        leaves, metrics = self.on_leaves(self.leaves_of(state), batch)
        return self.state_of(leaves), metrics

    def on_leaves(self, leaves: list[Array], batch: Batch) -> tuple[list[Array], dict[str, Array]]:
        """One step on the leaves of a state."""
        return self.executable(leaves, batch)

    def leaves_of(self, state: TrainState) -> list[Array]:
        """The leaves in order; raises ValueError where the state is of another structure."""
        return self.structure.flatten_up_to(state)

    def state_of(self, leaves: list[Array]) -> TrainState:
        """The inverse."""
        return self.structure.unflatten(leaves)

    def as_text(self) -> str | None:
        """The compiler's HLO."""
        return self.executable.as_text()

    def memory_analysis(self) -> Any:
        """Bytes of arguments, outputs and temporaries on a device, as the compiler counts them."""
        return self.executable.memory_analysis()

    def cost_analysis(self) -> Any:
        """What the compiler says of FLOPs and bytes."""
        return self.executable.cost_analysis()


def compile_train_step(
    step: Callable[..., Any],
    state: TrainState,
    batch: Batch,
    metrics: NamedSharding,
    options: Mapping[str, Any],
) -> FlatStep:
    """Lower from abstract arguments with pinned shardings and compile; the result takes no other layout.

    metrics: where every metric goes.
    """
    # Leaves in a row: a call with the tree itself walks it twice, a millisecond at 500 leaves.
    leaves: list[Any] = jax.tree.leaves(state)
    structure: Any = jax.tree.structure(state)

    def train_step(leaves: list[Array], batch: Batch) -> tuple[list[Array], dict[str, Array]]:
        rows = {name: array for name, array in batch.items() if name != VOTE}
        new, measured = step(structure.unflatten(leaves), rows)
        if VOTE in batch:  # one says stop, and all read it at this step
            measured = measured | {VOTE: jnp.max(batch[VOTE])}
        return structure.flatten_up_to(new), measured

    # Pinned on both sides, so that what a step gives is what the next one takes: one program, no copies.
    placed = shardings(leaves)
    jitted = jax.jit(
        train_step,
        in_shardings=(placed, shardings(batch)),
        out_shardings=(placed, metrics),
        donate_argnums=0,
    )
    return FlatStep(jitted.lower(leaves, batch).compile(dict(options)), structure)


def compile_eval_step(
    step: Callable[..., Any], params: Any, batch: Batch, layout: Layout, options: Mapping[str, Any]
) -> Any:
    """The same for `eval_step`; the weights stay where they are."""
    jitted = jax.jit(
        step, in_shardings=(shardings(params), shardings(batch)), out_shardings=layout.replicated()
    )
    return jitted.lower(params, batch).compile(dict(options))
