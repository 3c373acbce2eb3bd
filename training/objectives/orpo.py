"""Odds ratio preference optimization, with no reference (Hong et al. 2024, arXiv:2403.07691, equation 6)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import require
from training.objectives.base import Batch, Figures, PairObjective


@dataclass
class ORPO(PairObjective):
    """Cross-entropy of the better answers' tokens, and beta times -log sigmoid of the log odds ratio.

    An answer's odds are p / (1 - p) of the geometric mean p of its tokens' probabilities.
    """

    name: str = "orpo"
    beta: float = 0.1  # the paper's lambda

    mean: ClassVar[bool] = True
    reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        require(self.beta > 0, "objective.beta", self.beta, "above 0, such as 0.1")

    def of_pairs(
        self, chosen: Float[Array, " P"], rejected: Float[Array, " P"]
    ) -> tuple[Float[Array, " P"], Float[Array, "2 P"]]:
        """The odds ratio's part of each pair's loss, and beta times both log-probabilities."""
        log_odds = chosen - rejected - (log_not(chosen) - log_not(rejected))
        return -self.beta * jax.nn.log_sigmoid(log_odds), self.beta * jnp.stack([chosen, rejected])

    def value(self, logprobs: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], Figures]:
        """That part, and the mean over the better answers' tokens, reported as `nll`."""
        odds, figures = super().value(logprobs, batch)
        learnt = batch["loss_weights"] * (batch["labels"] > 0)
        nll = -jnp.sum(learnt * logprobs) / jnp.maximum(jnp.sum(learnt), 1.0)
        return nll + odds, {**figures, "nll": nll}


def log_not(logprob: Float[Array, " P"]) -> Float[Array, " P"]:
    """log(1 - exp(logprob)), exact near 0; a text of probability 1 counts as 1 - 1e-7."""
    return jnp.log(-jnp.expm1(jnp.minimum(logprob, -1e-7)))
