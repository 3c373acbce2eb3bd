"""An objective as a value, and how a name becomes one.

Schedules know of it only `weight` and `loss` (`parallel.schedules.accumulate.BatchLoss`), the step also
`prepare` and `report`. A new one is a file in this folder with a dataclass, and a YAML that names its values.

B rows, T position, D model; N token log-probabilities of the whole batch.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.checks import ConfigError, did_you_mean
from data.batch import LABELS, REFERENCE, TEXT, Field

Batch = dict[str, Array]
Figures = dict[str, Array]
Score = Callable[[Batch], Figures]  # the schedule's forward-only twin: {"logprobs": [B, T]} of a batch


@dataclass
class Objective:
    """What a run minimizes; its fields are the keys of `objective.*` and their defaults.

    A subclass has at least `loss` and `report`; values are checked in `__post_init__`.
    """

    name: str = "???"  # that of the subclass's file

    formats: ClassVar[tuple[str, ...]] = ()  # of data.format, one of which it needs; none: any
    draws: ClassVar[bool] = False  # texts are drawn by the run itself (`training.rollouts.draw`)

    @property
    def fields(self) -> Mapping[str, Field]:
        """What a batch must hold."""
        return TEXT

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What sums over the batch are divided by: its total loss weight, at least 1.

        Known before any forward pass, so that microbatches of unequal weight sum to the exact mean. Routers'
        losses and z-loss are divided by it too: they count by `loss_weights`, and stay means over tokens.
        """
        return jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)

    def prepare(self, batch: Batch, score: Score) -> tuple[Batch, Figures]:
        """The batch that is differentiated, and figures for `report`, from the batch that was loaded."""
        return batch, {}

    def loss(
        self, model: Any, params: Any, x: Float[Array, "B T D"], batch: Batch, ops: Any
    ) -> tuple[Float[Array, ""], Figures]:
        """A microbatch's share of what is minimized, not yet divided, and sums to report.

        model: its `head`, `cross_entropy` or `logprobs` read x, the stream behind the last layer.
        """
        raise NotImplementedError

    def report(self, means: Mapping[str, Array]) -> Figures:
        """Metrics by name, `loss` among them, from means over the batch's weight and what `prepare` gave.

        `loss` is what a guard compares from step to step and what a run's table shows.
        """
        raise NotImplementedError


@dataclass
class LogprobObjective(Objective):
    """Any function f of the log-probabilities of a batch's targets: preference, policy gradient, and so on.

    The gradient of f by the weights is that of a cross-entropy whose weights are -df/dlogp, sign included
    (the chain rule: f depends on the weights through logp alone). So a step is the schedule's `score`, the
    derivative of f, and the schedule's own `value_and_grad`: f may mix rows as it likes, on every mesh and
    schedule, at 4/3 of the FLOPs. A subclass has `value`.
    """

    def value(self, logprobs: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], Figures]:
        """The value of f for the whole batch, a mean in whatever sense it likes, and scalars to report."""
        raise NotImplementedError

    def prepare(self, batch: Batch, score: Score) -> tuple[Batch, Figures]:
        """The batch with `signed_weights` [B, T], and f's value."""
        logprobs = jax.lax.stop_gradient(score(batch)["logprobs"])
        (value, figures), slope = jax.value_and_grad(self.value, has_aux=True)(logprobs, batch)
        # Times the weight that the schedule divides by: f is a mean already.
        signed = -slope * self.weight(batch)
        return {**batch, "signed_weights": signed}, {"loss": value, **figures}

    def loss(
        self, model: Any, params: Any, x: Float[Array, "B T D"], batch: Batch, ops: Any
    ) -> tuple[Float[Array, ""], Figures]:
        """A sum whose gradient is f's; its value is no loss, and is not reported."""
        counts = batch["loss_weights"]
        value, sums = model.cross_entropy(params, x, batch["targets"], batch["signed_weights"], counts, ops)
        return value, {"z_loss": sums["z_loss"]}

    def report(self, means: Mapping[str, Array]) -> Figures:
        """The value and figures of f, as `prepare` gave them, and what routers say."""
        own = {name: x for name, x in means.items() if x.ndim == 0 and name not in ("objective", "z_loss")}
        return {**own, **router_metrics(means)}


@dataclass
class PairObjective(LogprobObjective):
    """Of two answers to one prompt, in rows behind each other, the first is the better (data.format=pairs).

    A subclass has `of_pairs`.
    """

    formats: ClassVar[tuple[str, ...]] = ("pairs",)
    mean: ClassVar[bool] = False  # an answer's figure is the mean over its tokens rather than the sum
    reference: ClassVar[bool] = True  # it is compared with that by the weights that the run began with

    @property
    def fields(self) -> Mapping[str, Field]:
        """Texts, and what an answer had by the reference."""
        return {**TEXT, **LABELS, **(REFERENCE if self.reference else {})}

    def of_pairs(
        self, chosen: Float[Array, " P"], rejected: Float[Array, " P"]
    ) -> tuple[Float[Array, " P"], Float[Array, "2 P"]]:
        """The loss of each pair and the rewards of both, of their log-probabilities above the reference's."""
        raise NotImplementedError

    def value(self, logprobs: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], Figures]:
        """The mean over pairs, and what is reported of them under TRL's names."""
        answers = answer_logprobs(logprobs, batch, mean=self.mean)
        if self.reference:
            answers -= answer_logprobs(batch["reference_logprobs"], batch, mean=self.mean)
        losses, rewards = self.of_pairs(answers[0::2], answers[1::2])
        return jnp.mean(losses), reward_figures(*rewards)


def answer_logprobs(logprobs: Float[Array, "B T"], batch: Batch, *, mean: bool) -> Float[Array, " B"]:
    """Of each row the sum over the targets that count, or their mean."""
    weights = batch["loss_weights"]
    sums = jnp.sum(weights * logprobs, axis=1)
    return sums / jnp.maximum(jnp.sum(weights, axis=1), 1.0) if mean else sums


def reward_figures(chosen: Float[Array, " P"], rejected: Float[Array, " P"]) -> Figures:
    """Means of the rewards and of their margin, and the share of pairs in the right order."""
    return {
        "rewards/chosen": jnp.mean(chosen),
        "rewards/rejected": jnp.mean(rejected),
        "rewards/margin": jnp.mean(chosen - rejected),
        "rewards/accuracy": jnp.mean(chosen > rejected),
    }


def router_metrics(means: Mapping[str, Array]) -> Figures:
    """What a model with experts or further tokens reports: `mtp_nll`, and `moe/...` as means over layers.

    `moe/load`, tokens of each expert over all layers, becomes `moe/max_load`: the largest over their mean.
    """
    # Routers' loss and z-loss have their part in the objective; what a person reads are rates and shares.
    names = [name for name in means if name == "mtp_nll" or name.startswith("moe/")]
    metrics = {name: means[name].astype(jnp.float32) for name in names if means[name].ndim == 0}
    if "moe/load" in means:
        load = means["moe/load"]
        # A batch of padding alone has routed nothing: no division by zero.
        metrics["moe/max_load"] = jnp.max(load) / jnp.maximum(jnp.mean(load), 1e-20)
    return metrics


def objectives() -> list[str]:
    """The names that `objective=` takes: files of this folder."""
    names = (module.name for module in pkgutil.iter_modules(import_module("training.objectives").__path__))
    return sorted(name for name in names if name != "base")


def build_objective(settings: Mapping[str, Any]) -> Objective:
    """The objective of a config's `objective.*`. ConfigError for a name or a key that it does not have."""
    name = str(settings.get("name"))
    if name not in objectives():
        raise ConfigError(f"there is no objective {name}; {did_you_mean(name, objectives())}")
    kinds = vars(import_module(f"training.objectives.{name}")).values()
    (kind,) = (k for k in kinds if isinstance(k, type) and issubclass(k, Objective) and k.name == name)
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(settings)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"objective={name}: {str(error).splitlines()[0]}") from error
    except ValueError as error:  # of its own checks, which name key and limit
        raise ConfigError(str(error)) from error
    assert isinstance(made, Objective)
    return made
