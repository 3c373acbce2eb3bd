"""One small job on any mesh, for tests that compare it with one device."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from artifacts.config import RunConfig
from models.config import ModelConfig
from optim.config import AdamWConfig, ConstantConfig
from parallel.config import MESH_AXES, ContextConfig, MeshConfig, PipelineConfig
from parallel.mesh import build_layout
from training.config import AdapterConfig, Config, TrainingConfig
from training.program import Program, build_program
from training.state import shardings

RULES = yaml.safe_load(Path("configs/mesh/_rules.yaml").read_text())["rules"]
ROWS, LENGTH, VOCAB = 16, 32, 256
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_layers": 4,
    "d_model": 64,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "d_ff": 128,
}


def make_config(
    mesh=None, *, model=None, pipeline=None, context=None, optim=None, rules=None, **training
) -> Config:
    """A root config; mesh axes that are not named are 1."""
    sizes: Any = {axis: 1 for axis in MESH_AXES} | dict(mesh or {})
    values = {"num_steps": 5, "global_batch_size": ROWS, "loss_chunk": 64, **training}
    config = Config(
        run=RunConfig(name="test"),
        model=ModelConfig(**{**DENSE, **(model or {})}),
        mesh=MeshConfig(rules={**RULES, **(rules or {})}, **sizes),
        pipeline=PipelineConfig(**{"microbatches": 4, **(pipeline or {})}),
        context=ContextConfig(**(context or {})),
        optim=optim or AdamWConfig(),
        schedule=ConstantConfig(warmup_steps=2),
        training=TrainingConfig(**values),
    )
    config.data.seq_len = LENGTH
    return config


def make_program(config: Config, adapter: AdapterConfig | None = None) -> Program:
    """The program on as many of the forced devices as the mesh asks for."""
    config = config if adapter is None else replace(config, adapter=adapter)
    devices = int(np.prod([getattr(config.mesh, axis) for axis in MESH_AXES]))
    return build_program(config, build_layout(config.mesh, jax.devices()[:devices]))


def packed_batch(step, rows=ROWS, length=LENGTH, vocab=VOCAB):
    """Two documents a row; rows of unequal weight, so that a mean of means would show."""
    rng = np.random.default_rng(step)
    stream = rng.integers(0, vocab, (rows, length + 1))
    cut = rng.integers(4, length - 4, (rows, 1))
    t = np.arange(length)[None]
    weights = np.ones((rows, length), np.float32)
    weights[0, : step + 3] = 0
    return {
        "tokens": stream[:, :-1].astype(np.int32),
        "targets": stream[:, 1:].astype(np.int32),
        "positions": np.where(t < cut, t, t - cut).astype(np.int32),
        "segment_ids": np.where(t < cut, 1, 2).astype(np.int32),
        "loss_weights": weights,
    }


@dataclass
class Outcome:
    """What a mesh made of the job: everything on the host, gradients by canonical path."""

    losses: np.ndarray  # [steps, (loss, grad_norm)]
    grads: Any  # of the first step
    evaluated: float | None  # the loss of a further batch


def place(program, batch):
    return jax.device_put(batch, shardings(program.batch))


def run(config: Config, steps: int = 5, *, evaluate: bool = True) -> Outcome:
    """The loss and every gradient of the first batch, `steps` optimizer steps from it, then an evaluation.

    The gradients are what Adam's first moment is after one step, but for a factor that all leaves share; so
    those compared are those of the step itself, and no program is compiled for them alone.
    """
    assert isinstance(config.optim, AdamWConfig)
    program = make_program(config)
    state, train, losses = program.init_state(0), program.compile_train(), []
    for i in range(steps):
        state, metrics = train(state, place(program, packed_batch(i)))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        if i == 0:
            grads = jax.device_get(program.to_canonical(state).opt_state["direction"].mu)
    if not evaluate:
        return Outcome(np.array(losses), grads, None)
    sums = program.compile_eval()(state.params, place(program, packed_batch(99)))
    return Outcome(np.array(losses), grads, float(sums["nll"]))


def distance(outcome: Outcome, other: Outcome) -> tuple[float, float, float]:
    """Largest relative difference of the first loss, of any gradient (by norm), and of all that came after.

    What only one of them has, further steps or the evaluation, is not compared.
    """
    by_leaf: Any = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12)),
        outcome.grads,
        other.grads,
    )
    common = min(len(outcome.losses), len(other.losses))
    steps = np.abs(outcome.losses[:common] / other.losses[:common] - 1)
    most = steps.max()
    if outcome.evaluated is not None and other.evaluated is not None:
        most = max(most, abs(outcome.evaluated / other.evaluated - 1))
    return float(steps[0, 0]), max(jax.tree.leaves(by_leaf)), float(most)


def assert_equal(outcome: Outcome, other: Outcome) -> None:
    """The law: 1e-5 on losses, 1e-4 on every gradient."""
    loss, grads, steps = distance(outcome, other)
    assert loss < 1e-5 and steps < 1e-5 and grads < 1e-4, (loss, grads, steps)
