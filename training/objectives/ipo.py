"""Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, equation 17)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import require
from training.objectives.base import PairObjective


@dataclass
class IPO(PairObjective):
    """(c - r - 1 / (2 beta))², c and r the mean log-ratios to the reference of an answer's tokens.

    Means over tokens as in TRL, by whose authors' word the paper's sums were a slip.
    """

    name: str = "ipo"
    beta: float = 0.1  # the paper's tau

    mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        require(self.beta > 0, "objective.beta", self.beta, "above 0, such as 0.1")

    def of_pairs(
        self, chosen: Float[Array, " P"], rejected: Float[Array, " P"]
    ) -> tuple[Float[Array, " P"], Float[Array, "2 P"]]:
        """The loss of each pair, and beta times both log-ratios."""
        losses = jnp.square(chosen - rejected - 1 / (2 * self.beta))
        return losses, self.beta * jnp.stack([chosen, rejected])
