"""Updates that are not taken: what is not finite, and what lies far above the last ones.

Inside the compiled step, so that nobody waits for a host: loss and gradient norm are compared with their mean
and deviation over the last WINDOW updates that were taken (the skip-step rule of OLMo-core,
https://github.com/allenai/OLMo-core). A skipped update leaves parameters, moments and averages as they were,
to the last bit. The step's number, the position in the data and the learning rate's schedule go on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common.errors import RunFault
from training.config import GuardConfig
from training.state import WINDOW, Watched

ENOUGH = WINDOW // 2  # of them, before anything counts as a spike
ROUNDING = 1e-6  # of the mean: what equal losses may differ by, where there is no deviation to speak of
REASONS = (
    "taken",
    "the loss is not finite",
    "the gradient is not finite",
    "the loss is a spike",
    "the gradient norm is a spike",
)
SKIPPED, IN_A_ROW = "skipped", "skips_in_a_row"  # a step's metrics: index into REASONS, and how many so far

# -- in the step -------------------------------------------------------------------------------------------

Updated = tuple[Any, Any, Any]  # parameters, the optimizer's state, the average of the weights (or None)
Skipping = Literal["branch", "choose", "apart"]


def judge(
    watched: Watched, loss: Float[Array, ""], norm: Float[Array, ""], sigma: float | None
) -> tuple[Bool[Array, ""], Watched, dict[str, Array]]:
    """Whether the update of this loss and norm is taken, what is remembered, and the metrics of it.

    Of skipped updates only how many follow each other is remembered: one spike would hide the next. Of a
    batch without any target, whose loss and gradient are exactly 0, nothing is: it says nothing about others.
    Where no `sigma` compares, the step counts it as taken; the host leaves it out (`through_empty_batches`).
    """
    now = jnp.stack([loss, norm]).astype(jnp.float32)
    taken_before, in_a_row = watched["counts"][0], watched["counts"][1]
    wrong = [~jnp.isfinite(now)]
    if sigma is not None:
        limit, number = limits(watched["last"], sigma)
        wrong.append((now > limit) & (number >= ENOUGH))
    faults = jnp.concatenate(wrong)
    reason = jnp.where(jnp.any(faults), 1 + jnp.argmax(faults), 0)
    taken = reason == 0
    last = watched["last"].at[:, taken_before % WINDOW].set(now)
    counts = jnp.where(taken, jnp.stack([taken_before + 1, 0]), jnp.stack([taken_before, in_a_row + 1]))
    after = {"last": jnp.where(taken, last, watched["last"]), "counts": counts}
    if sigma is not None:
        after = {name: jnp.where(jnp.any(now != 0), after[name], watched[name]) for name in after}
    told = {SKIPPED: reason.astype(jnp.float32), IN_A_ROW: after["counts"][1].astype(jnp.float32)}
    return taken, after, told


def limits(last: Float[Array, "2 W"], sigma: float) -> tuple[Float[Array, " 2"], Int[Array, ""]]:
    """Mean plus `sigma` deviations of the last losses and norms, and how many they are of.

    Both 0 is a place that is not filled yet, or a batch without a target.
    """
    known = jnp.any(last != 0, axis=0)
    number = jnp.maximum(jnp.sum(known), 1)
    mean = jnp.sum(jnp.where(known, last, 0.0), axis=1) / number
    spread = jnp.where(known, last - mean[:, None], 0.0)
    deviation = jnp.sqrt(jnp.sum(spread * spread, axis=1) / number)
    return mean + sigma * jnp.maximum(deviation, ROUNDING * jnp.abs(mean)), number


def unless_skipped(
    taken: Bool[Array, ""], update: Callable[[Updated], Updated], kept: Updated, *, how: Skipping
) -> Updated:
    """`update(kept)` where it is taken, else `kept`; but the schedule's counter, which counts steps, goes on.

    "branch": the update is not even computed, and one that is compiles to what it was without a guard. GPUs
    have the host look which branch is taken, and it would wait for every step. "choose" is for them: computed
    in any case, and old or new chosen where both are read and written anyway, without a copy. "apart": the
    same for replicas that step alone and have their counters, of the moments too, in common.
    """
    if how == "branch":
        params, opt_state, ema = jax.lax.cond(taken, update, skip, kept)
        return params, opt_state, ema
    new = update(kept)

    def choose(path: Any, after: Array, before: Array) -> Array:
        counts = before.ndim == 0 and (how == "apart" or is_schedule(path))
        return after if counts else jnp.where(taken, after, before)

    opt_state = jax.tree_util.tree_map_with_path(choose, new[1], kept[1])
    params, ema = (jax.tree.map(lambda a, b: jnp.where(taken, a, b), new[i], kept[i]) for i in (0, 2))
    return params, opt_state, ema


def skip(kept: Updated) -> Updated:
    """All as it was, one step further in the schedule."""
    params, opt_state, ema = kept

    def count(path: Any, leaf: Array) -> Array:
        return leaf + 1 if is_schedule(path) else leaf

    return params, jax.tree_util.tree_map_with_path(count, opt_state), ema


def is_schedule(path: Any) -> bool:
    """Whether a leaf of an optimizer's state counts the steps of the learning rate's schedule."""
    return jax.tree_util.keystr(path[:1], simple=True) == "schedule"


# -- on the host -------------------------------------------------------------------------------------------


class Trouble(RunFault):
    """So many updates in a row were skipped that the run cannot go on from here."""

    def __init__(self, step: int, skips: int, reason: str, figures: str):
        """step: of the last skipped update; skips: how many in a row; reason, figures: of the last."""
        super().__init__(f"{skips} updates in a row were skipped: {reason}, {figures} at step {step}")
        self.step, self.skips, self.reason, self.figures = step, skips, reason, figures

    def facts(self) -> tuple[int, int, str, str]:
        """What it was made of."""
        return self.step, self.skips, self.reason, self.figures

    @property
    def began(self) -> int:
        """The last step before it."""
        return self.step - self.skips


def through_empty_batches(metrics: Mapping[str, Any], before: int, carried: int) -> tuple[int, int]:
    """Updates skipped in a row, batches without a target left out; and how many of them lie before the last
    such batch, at which a step without `guard.skip_sigma` begins to count anew. before, carried: the same of
    the step before.
    """
    here = int(metrics.get(IN_A_ROW, 0))
    if metrics["loss"] == metrics["grad_norm"] == 0:
        carried = max(before - here, 0)
    elif reason_of(metrics) is None:
        carried = 0
    return here + carried, carried


def reason_of(metrics: Mapping[str, Any]) -> str | None:
    """Why the update of a step was skipped; None where it was taken."""
    code = int(metrics.get(SKIPPED, 0))
    return REASONS[code] if code else None


def trouble(config: GuardConfig, step: int, metrics: Mapping[str, Any], last: int) -> Trouble | None:
    """The trouble that a step's metrics tell of, None where they do not.

    last: the run's last step, which nobody waits beyond: two skipped in a row are trouble there.
    """
    in_a_row = int(metrics.get(IN_A_ROW, 0))
    reason = reason_of(metrics)
    most = min(config.max_skips, 2) if step == last else config.max_skips
    if not reason or in_a_row < most:
        return None
    name = "grad_norm" if "gradient" in reason else "loss"
    return Trouble(step, in_a_row, reason, f"{name}={float(metrics[name]):.6g}")


# -- after a rollback (`safety.rollback`) ------------------------------------------------------------------


def undone(checkpoint: int, known: int, rollbacks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint, made when the run had so many rollbacks, is of a step that a later one undid."""
    return any(checkpoint > entry["to_step"] for entry in rollbacks[known:])


def none_in_a_row(state: Any) -> Any:
    """The canonical `TrainState` of a run that was taken back: what was skipped before counts no more."""

    def reset(path: Any, leaf: Array) -> Array:
        counts = jax.tree_util.keystr(path[-1:], simple=True) == "counts"
        return leaf * jnp.array([1, 0], leaf.dtype) if counts else leaf

    local = state.local
    if local is not None and "guards" in local:
        local = {**local, "guards": jax.tree_util.tree_map_with_path(reset, local["guards"])}
    return state.replace(guard=jax.tree_util.tree_map_with_path(reset, state.guard), local=local)
