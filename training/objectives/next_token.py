"""The next token of every text: what pretraining and fine-tuning on texts minimize."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from training.objectives.base import Batch, Figures, Objective, router_metrics


@dataclass
class NextToken(Objective):
    """Mean cross-entropy of the next token over positions, each by its `loss_weights`, in nats.

    With it whatever the model itself adds: z-loss, further tokens (`model.mtp`), its routers' losses.
    """

    name: str = "next_token"

    def loss(
        self, model: Any, params: Any, x: Float[Array, "B T D"], batch: Batch, ops: Any
    ) -> tuple[Float[Array, ""], Figures]:
        """The model's own head, which has one fused pass for loss and gradient."""
        return model.head(params, x, batch, ops)

    def report(self, means: Mapping[str, Array]) -> Figures:
        """`loss` in nats a token, without z-loss, so that runs with and without one compare."""
        return {"loss": means["nll"], **router_metrics(means)}
