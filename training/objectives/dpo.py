"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import require
from training.objectives.base import PairObjective


@dataclass
class DPO(PairObjective):
    """-log sigmoid(beta (c - r)), c and r the better and the worse answer's log-ratios to the reference."""

    name: str = "dpo"
    beta: float = 0.1  # how dear it is to leave the reference
    label_smoothing: float = 0.0  # share of pairs that are thought to be the wrong way round (cDPO)

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        require(self.beta > 0, "objective.beta", self.beta, "above 0, such as 0.1")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "objective.label_smoothing", smoothing, "from 0 to below 0.5")

    def of_pairs(
        self, chosen: Float[Array, " P"], rejected: Float[Array, " P"]
    ) -> tuple[Float[Array, " P"], Float[Array, "2 P"]]:
        """The loss of each pair, and beta times both log-ratios."""
        gap, wrong = self.beta * (chosen - rejected), self.label_smoothing
        losses = -(1 - wrong) * jax.nn.log_sigmoid(gap) - wrong * jax.nn.log_sigmoid(-gap)
        return losses, self.beta * jnp.stack([chosen, rejected])
