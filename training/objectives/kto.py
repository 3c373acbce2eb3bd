"""Kahneman-Tversky optimization of judged answers (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import require
from data.batch import LABELS, REFERENCE, TEXT, Field
from training.objectives.base import Batch, Figures, LogprobObjective, answer_logprobs


@dataclass
class KTO(LogprobObjective):
    """weight * (1 - sigmoid(beta (l - z))) of a wanted answer, with z - l of an unwanted one.

    l is the log-ratio to the reference. z, to which no gradient goes, is that of answers to other prompts
    (data.format=labels gives each row a neighbour with one), their mean and at least 0: how far the model has
    moved where nothing is asked.
    """

    name: str = "kto"
    beta: float = 0.1
    wanted_weight: float = 1.0
    unwanted_weight: float = 1.0

    formats: ClassVar[tuple[str, ...]] = ("labels",)

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        require(self.beta > 0, "objective.beta", self.beta, "above 0, such as 0.1")
        for key in ("wanted_weight", "unwanted_weight"):
            require(getattr(self, key) >= 0, f"objective.{key}", getattr(self, key), "0 or more")

    @property
    def fields(self) -> Mapping[str, Field]:
        """Texts, how they were judged, and what they had by the reference."""
        return {**TEXT, **LABELS, **REFERENCE}

    def value(self, logprobs: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], Figures]:
        """The mean over judged answers, and what is reported of them."""
        ratios = answer_logprobs(logprobs - batch["reference_logprobs"], batch, mean=False)
        labels = jnp.sign(jnp.sum(batch["labels"], axis=1))[0::2]
        judged, mismatched = ratios[0::2], ratios[1::2]
        moved = jax.lax.stop_gradient(jnp.maximum(jnp.mean(mismatched), 0.0))
        losses = 1 - jax.nn.sigmoid(self.beta * labels * (judged - moved))
        weights = jnp.where(labels > 0, self.wanted_weight, self.unwanted_weight)
        rewards = self.beta * judged
        figures = {"kl": moved, "rewards/chosen": mean_of(rewards, labels > 0)}
        return jnp.mean(weights * losses), {**figures, "rewards/rejected": mean_of(rewards, labels < 0)}


def mean_of(values: Float[Array, " N"], which: Array) -> Float[Array, ""]:
    """The mean of those that are true, 0 where none is."""
    return jnp.sum(jnp.where(which, values, 0.0)) / jnp.maximum(jnp.sum(which), 1)
