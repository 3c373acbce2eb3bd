"""Pipelines: stages of layers on different devices, as a value of the interface of all schedules.

The largest segment is split into stages. Embedding, other segments and head belong to all stages together:
the rules for `vocab` split their tables over mesh.pipeline, so that none holds or computes more than others.
What a step does is in `parallel.schedules.stage_program`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from parallel.schedules.accumulate import (
    Batch,
    BatchLoss,
    LayeredModel,
    Params,
    Scored,
    Sums,
)
from parallel.schedules.stage_program import StageProgram
from parallel.schedules.stages import StagePlan, join_rows


@dataclass(frozen=True)
class Pipeline(StagePlan):
    """A pipeline as a value of the interface that `parallel.schedules.accumulate` describes."""

    def value_and_grad(
        self,
        loss: BatchLoss,
        model: LayeredModel,
        params: Params,
        batch: Batch,
        key: Array,
        ops: Any,
        frozen: Params = None,
    ) -> tuple[Sums, Params]:
        """Means over the batch's total weight, and gradients of `objective` among them by `params`."""

        def end(params: Params, x: Array, micro: Batch) -> tuple[Array, Sums]:
            return loss.loss(model, params, x, micro, ops)

        program = StageProgram(self, end, model, params, batch, key, ops, loss.weight, frozen)
        state = program.run(self.schedule.runs, program.start())
        return program.finish(state)

    def evaluate(self, model: LayeredModel, params: Params, batch: Batch, ops: Any) -> Sums:
        """Sums over the batch, nothing divided: `nll` in nats and `weight` in tokens."""

        def end(params: Params, x: Array, micro: Batch) -> tuple[Array, Sums]:
            return model.head(params, x, micro, ops)

        program = StageProgram(self, end, model, params, batch, jax.random.key(0), ops)
        state = program.run(self.schedule.forward_runs, program.start(gradients=False))
        return {"nll": state["sums"]["nll"], "weight": jnp.sum(batch["loss_weights"])}

    def score(self, model: LayeredModel, params: Params, batch: Batch, ops: Any) -> Scored:
        """`logprobs` [B, T]: the log-probability of each target, in nats; a forward pass without gradient."""

        def end(params: Params, x: Array, micro: Batch) -> tuple[Array, Sums]:
            return jnp.zeros((), jnp.float32), {"logprobs": model.logprobs(params, x, micro, ops)}

        program = StageProgram(self, end, model, params, batch, jax.random.key(0), ops)
        state = program.run(self.schedule.forward_runs, program.start(gradients=False, scored=True))
        return {name: join_rows(x) for name, x in state["scores"].items()}
