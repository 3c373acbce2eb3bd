"""From a config to the program that runs: model, layout, optimizer and the step, all of it still abstract.

`fit` compiles what stands here, and so will anything that only wants to look at it: nothing is allocated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from models.attention import chunked_attention, reference_attention
from models.ops import Ops
from models.transformer import Model, build_model
from optim.optimizers import make_optimizer
from optim.schedules import make_schedule
from parallel.axes import Layout, kv_repeats
from parallel.plain import Plain
from training.state import TrainState, abstract_state, decay_mask, matrix_dims
from training.step import (
    Batch,
    abstract_batch,
    compile_eval_step,
    compile_train_step,
    make_eval_step,
    make_train_step,
)

ATTENTION = {"reference": reference_attention, "chunked": chunked_attention}
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Program:
    """Everything that the loop composes, before a single array exists."""

    model: Model
    layout: Layout
    ops: Ops
    strategy: Plain
    tx: optax.GradientTransformation
    state: TrainState
    batch: Batch
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    compiler_options: Mapping[str, Any]

    def compile_train(self) -> Any:
        """The one executable of the run: `(state, batch) -> (state, metrics)`, the state donated."""
        return compile_train_step(self.train_step, self.state, self.batch, self.layout, self.compiler_options)

    def compile_eval(self) -> Any:
        """`(params, batch) -> sums`, batches shaped like those of training."""
        step = make_eval_step(self.model, self.strategy, self.ops)
        return compile_eval_step(step, self.state.params, self.batch, self.layout, self.compiler_options)


def padded_vocab(size: int) -> int:
    """The next multiple of 128, so that tables split over devices and fill matrix units."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def compute_dtype(precision: str, platform: str) -> Any:
    """`auto` is bfloat16 where the hardware is built for it, float32 on CPU; masters are always float32."""
    if precision == "auto":
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def compiler_options(deterministic: bool, platform: str) -> dict[str, Any]:
    """What XLA is asked for beyond its defaults.

    On a GPU, atomic adds and kernels chosen by timing make two runs differ in the last bits; deterministic
    operations cost some speed. CPU and TPU repeat themselves as they are.
    """
    return {"xla_gpu_deterministic_ops": True} if deterministic and platform in ("gpu", "cuda") else {}


def build_ops(config: Any, layout: Layout) -> Ops:
    """What is injected into the model: kernels, precision, and the placement of activations."""
    platform = layout.mesh.devices.flat[0].platform
    return Ops(
        attention=ATTENTION[config.training.attention],
        constrain=layout.constrain,
        compute_dtype=compute_dtype(config.training.precision, platform),
        loss_chunk=config.training.loss_chunk,
        z_loss=config.training.z_loss,
        repeat_kv=kv_repeats(config.model.num_kv_heads, layout),
    )


def build_program(config: Any, layout: Layout) -> Program:
    """Compose the step for a resolved config (`model.vocab_size` known).

    config: the root `Config`; layout: the mesh and its rules. Raises ValueError where a size does not fit.
    """
    model = build_model(config.model)
    ops = build_ops(config, layout)
    training = config.training
    strategy = Plain(training.accumulation_steps, training.remat, training.scan_layers)
    schedule = make_schedule(config.schedule, num_steps=training.num_steps)
    tx = make_optimizer(
        config.optim, schedule, decay_mask=decay_mask(model.info), matrices=matrix_dims(model.info)
    )
    step = make_train_step(
        model,
        tx,
        strategy,
        ops,
        learning_rate=lambda count: config.optim.learning_rate * schedule(count),
        grad_clip=config.optim.grad_clip,
        ema_decay=training.ema_decay,
        seed=config.seed,
    )
    state = abstract_state(model, tx, layout, ema=training.ema_decay is not None)
    batch = abstract_batch(layout, training.global_batch_size, config.data.seq_len)
    options = compiler_options(config.deterministic, layout.mesh.devices.flat[0].platform)
    return Program(model, layout, ops, strategy, tx, state, batch, step, options)


def trace(program: Program) -> Any:
    """Trace the step without devices' memory: every shape error of a config surfaces here."""
    return jax.eval_shape(program.train_step, program.state, program.batch)
