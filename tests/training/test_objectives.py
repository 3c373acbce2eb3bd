"""An objective is one file: a toy of 26 lines, trained on every mesh and schedule as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training.objectives
from common.checks import ConfigError
from models.config import MoEConfig
from tests.parallel.small import make_config, make_program, packed_batch
from training.objectives.base import LogprobObjective, build_objective, objectives
from training.objectives.next_token import NextToken
from training.state import shardings

TOY = '''"""Preference without a reference (as SimPO, arXiv:2405.14734): of two rows the first is better."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.checks import require
from training.objectives.base import LogprobObjective


@dataclass
class Toy(LogprobObjective):
    """-log sigmoid(beta (mean logp of even rows - of odd rows) - margin), over pairs."""

    name: str = "toy"
    beta: float = 2.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        require(self.beta > 0, "objective.beta", self.beta, "above 0")

    def value(self, logprobs, batch):
        weights = batch["loss_weights"]
        means = jnp.sum(weights * logprobs, 1) / jnp.maximum(jnp.sum(weights, 1), 1)
        gap = self.beta * (means[0::2] - means[1::2])
        return -jnp.mean(jax.nn.log_sigmoid(gap - self.margin)), {"accuracy": jnp.mean(gap > 0)}
'''
MOE = MoEConfig(
    num_experts=4, experts_per_token=2, d_expert=32, load_balance_weight=0.1, router_z_weight=0.01
)
ROUTED = {"moe": MOE, "num_layers": 4, "d_model": 32, "num_heads": 4, "d_ff": 64}
ZERO = {"schedule": "zero_bubble"}
TWICE = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
CASES = {
    "plain": ({}, {}),
    "accumulation": ({}, {"accumulation_steps": 4}),
    "fsdp": ({"fsdp": 4}, {}),
    "tensor": ({"tensor": 2, "data": 2}, {}),
    "expert": ({"expert": 2, "fsdp": 2}, {}),
    "context": ({"context": 2}, {}),
    "gpipe": ({"pipeline": 2}, {"pipeline": {"schedule": "gpipe"}}),
    "1f1b": ({"pipeline": 2, "data": 2}, {}),
    "interleaved": ({"pipeline": 2}, {"pipeline": TWICE}),
    "zero_bubble": ({"pipeline": 2}, {"pipeline": ZERO}),
}


@pytest.fixture(autouse=True, scope="module")
def toy_file(tmp_path_factory):
    """The file that a person would write, where objectives are looked for."""
    folder = tmp_path_factory.mktemp("objectives")
    (folder / "toy.py").write_text(TOY, "utf-8")
    training.objectives.__path__.append(str(folder))
    yield
    training.objectives.__path__.remove(str(folder))


class Direct(NextToken):
    """What the toy means, by autodiff through the log-probabilities: of one microbatch on one device only."""

    def loss(self, model, params, x, batch, ops):
        value, _ = build_objective({"name": "toy"}).value(model.logprobs(params, x, batch, ops), batch)
        nothing = jnp.zeros_like(batch["loss_weights"])
        z, _ = model.cross_entropy(params, x, batch["targets"], nothing, batch["loss_weights"], ops)
        return value * self.weight(batch) + z, {"nll": value * self.weight(batch)}


@functools.cache
def program_of(case, model="routed"):
    mesh, settings = CASES[case]
    shape = ROUTED if model == "routed" else {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 64}
    config = make_config(mesh, model=shape, z_loss=0.01, **settings)
    config.objective = {"name": "toy"}
    return make_program(config)


@functools.cache
def outcome(case):
    """(log-probabilities, toy's value and gradients, all on the host and canonical) at step 0."""
    program = program_of(case)
    params = program.init_state(0).params
    batch = jax.device_put(packed_batch(0), shardings(program.batch))

    @jax.jit
    def run(params, batch):
        scored = program.strategy.score(program.model, params, batch, program.ops)
        ready, figures = program.objective.prepare(batch, lambda batch: scored)
        key = jax.random.key(0)
        means, grads = program.strategy.value_and_grad(
            program.objective, program.model, params, ready, key, program.ops
        )
        return scored["logprobs"], program.objective.report({**means, **figures}), grads

    logprobs, reported, grads = run(params, batch)
    return jax.device_get((logprobs, reported, program.to_canonical(grads)))


@functools.cache
def direct():
    """The same by autodiff, and by a plain forward pass."""
    program = program_of("plain")
    params, batch = program.init_state(0).params, packed_batch(0)
    model, ops = program.model, program.ops

    @jax.jit
    def run(params, batch):
        key = jax.random.key(0)
        means, grads = program.strategy.value_and_grad(Direct(), model, params, batch, key, ops)
        plain = jax.nn.log_softmax(model.apply(params, batch, ops))
        picked = jnp.take_along_axis(plain, batch["targets"][..., None], axis=-1)[..., 0]
        return picked, means["nll"], grads

    return jax.device_get(run(params, batch))


def distance(a, b):
    """Relative, of all leaves together."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


@pytest.mark.parametrize("case", CASES)
def test_signed_weights_have_the_gradient_of_autodiff(case):
    """With experts, their losses, and z-loss, none of which sees a sign."""
    logprobs, reported, grads = outcome(case)
    picked, value, slopes = direct()
    np.testing.assert_allclose(logprobs, picked, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(reported["loss"], value, rtol=1e-6)
    assert distance(grads, slopes) < 1e-6
    assert set(reported) >= {"loss", "accuracy", "moe/max_load", "moe/load_balance_loss"}


@functools.cache
def losses(case):
    program = program_of(case, "dense")
    state, step, found = program.init_state(0), program.compile_train(), []
    for number in range(3):
        batch = jax.device_put(packed_batch(number), shardings(program.batch))
        state, metrics = step(state, batch)
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    return found


@pytest.mark.parametrize("case", ["accumulation", "fsdp", "tensor", "context", "1f1b", "zero_bubble"])
def test_the_toy_trains_as_on_one_device(case):
    np.testing.assert_allclose(losses(case), losses("plain"), rtol=1e-5)


def test_an_objective_is_found_by_its_file_and_its_values_are_checked():
    assert "toy" in objectives() and "next_token" in objectives()
    assert len(TOY.splitlines()) <= 30
    assert build_objective({"name": "toy", "beta": 3}).beta == 3.0
    with pytest.raises(ConfigError, match="there is no objective toi; did you mean toy"):
        build_objective({"name": "toi"})
    with pytest.raises(ConfigError, match="objective=toy: .*gamma"):
        build_objective({"name": "toy", "gamma": 3})
    with pytest.raises(ConfigError, match="objective.beta=-1"):
        build_objective({"name": "toy", "beta": -1})
    assert isinstance(build_objective({"name": "toy"}), LogprobObjective)
