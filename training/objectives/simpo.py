"""Simple preference optimization, without a reference (Meng et al. 2024, arXiv:2405.14734, equation 6)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import require
from training.objectives.base import PairObjective


@dataclass
class SimPO(PairObjective):
    """-log sigmoid(beta (c - r) - margin), c and r the mean log-probabilities of the answers' tokens."""

    name: str = "simpo"
    beta: float = 2.0
    margin: float = 1.0  # the paper's gamma

    mean: ClassVar[bool] = True
    reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        require(self.beta > 0, "objective.beta", self.beta, "above 0, such as 2")
        require(self.margin >= 0, "objective.margin", self.margin, "0 or more")

    def of_pairs(
        self, chosen: Float[Array, " P"], rejected: Float[Array, " P"]
    ) -> tuple[Float[Array, " P"], Float[Array, "2 P"]]:
        """The loss of each pair, and beta times both log-probabilities."""
        losses = -jax.nn.log_sigmoid(self.beta * (chosen - rejected) - self.margin)
        return losses, self.beta * jnp.stack([chosen, rejected])
