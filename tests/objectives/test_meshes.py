"""Every objective on every mesh and schedule as on one device: values, and gradients of the whole model.

What a schedule compiles does not depend on the objective: one program scores, one differentiates the
cross-entropy with signed weights, and what lies between is a function of [B, T] numbers. So five meshes are
compiled, and all objectives go through each.
"""

import functools

import jax
import numpy as np
import pytest

from parallel.axes import Layout
from tests.parallel.small import LENGTH, ROWS, VOCAB, make_config, make_program, packed_batch
from training.objectives.base import build_objective
from training.step import abstract_batch

SHAPE = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 64}
CASES = {
    "plain": ({}, {}),
    "accumulation": ({}, {"accumulation_steps": 4}),
    "fsdp": ({"fsdp": 4}, {}),
    "tensor": ({"tensor": 2, "data": 2}, {}),
    "1f1b": ({"pipeline": 2, "data": 2}, {}),
}
ONE_TARGET = {
    "dpo": {},
    "ipo": {},
    "simpo": {},
    "orpo": {},
    "kto": {},
    "grpo": {},
    "grpo off policy": {"updates": 2, "kl_weight": 0.2, "mean": "answers"},
}
SEVERAL = {
    "distill": {"teacher": "any", "targets": 4, "hard_weight": 0.5},
    "distill reverse": {"teacher": "any", "targets": 4, "divergence": "reverse"},
    "distill sampled": {"teacher": "any", "targets": 4, "support": "sampled"},
}


def settings_of(name):
    return {"name": name.split(" ")[0], **({**ONE_TARGET, **SEVERAL}[name])}


@functools.cache
def batch():
    """Texts, and what any objective wants beside them."""
    rng = np.random.default_rng(7)
    texts = packed_batch(0)
    weights = (rng.random((ROWS, LENGTH)) < 0.6).astype(np.float32)
    labels = np.where(np.arange(ROWS) % 2, 0, np.where(np.arange(ROWS) % 4, -1, 1))[:, None]
    near = -rng.exponential(1.0, (ROWS, LENGTH)).astype(np.float32) - 5
    outcomes = np.argsort(rng.random((ROWS, LENGTH, VOCAB)), -1)[..., :4].astype(np.int32)
    return {
        **texts,
        "loss_weights": weights,
        "labels": (labels * weights).astype(np.float32),
        "reference_logprobs": near,
        "behaviour_logprobs": near,
        "advantages": np.repeat(rng.normal(0, 1, (ROWS, 1)), LENGTH, 1).astype(np.float32),
        "drawn_reward": np.zeros_like(weights),
        "soft_targets": outcomes,
        "teacher_logprobs": np.log(rng.dirichlet(np.ones(6), (ROWS, LENGTH))[..., :4]).astype(np.float32),
    }


@functools.cache
def compiled(case):
    mesh, training = CASES[case]
    program = make_program(make_config(mesh, model=SHAPE, z_loss=0.01, **training))
    model, ops, strategy = program.model, program.ops, program.strategy
    carrier = build_objective({"name": "dpo"})  # any of them: they differ in the weights alone

    @jax.jit
    def score(params, batch):
        return strategy.score(model, params, batch, ops)

    @jax.jit
    def differentiate(params, batch):
        means, grads = strategy.value_and_grad(carrier, model, params, batch, jax.random.key(0), ops)
        return means, grads

    return program, program.init_state(0).params, score, differentiate


def placed(program, arrays):
    """The arrays as the step has them; those of a batch alone."""
    layout: Layout = program.layout
    objective = build_objective({"name": "distill", "teacher": "any", "targets": 4})
    known = abstract_batch(
        layout,
        ROWS,
        LENGTH,
        {name: objective.fields.get(name) or objective.fields["loss_weights"] for name in arrays},
    )
    return {name: jax.device_put(x, known[name].sharding) for name, x in arrays.items()}


@functools.cache
def outcome(case, name):
    """(what is reported, gradients), canonical and on the host."""
    program, params, score, differentiate = compiled(case)
    objective = build_objective(settings_of(name))
    own = {key: batch()[key] for key in objective.fields}
    if name in ("dpo", "ipo", "simpo", "orpo"):
        own["labels"] = np.float32(np.resize([1, -1], ROWS)[:, None] * own["loss_weights"])
    given = placed(program, own)
    ready, figures = jax.jit(lambda params, given: objective.prepare(given, lambda b: score(params, b)))(
        params, given
    )
    wanted = ("tokens", "targets", "positions", "segment_ids", "loss_weights", "signed_weights")
    means, grads = differentiate(params, {key: ready[key] for key in wanted})
    reported = objective.report({**means, **figures})
    return jax.device_get((reported, program.to_canonical(grads)))


def distance(a, b):
    """Relative, of all leaves together."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


@pytest.mark.parametrize("name", [*ONE_TARGET, *SEVERAL])
@pytest.mark.parametrize("case", [case for case in CASES if case != "plain"])
def test_equals_one_device(case, name):
    reported, grads = outcome(case, name)
    known, slopes = outcome("plain", name)
    assert np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(slopes)])) > 1e-3
    assert distance(grads, slopes) < 1e-5
    for figure, value in known.items():
        np.testing.assert_allclose(reported[figure], value, rtol=1e-5, atol=1e-6, err_msg=figure)


@pytest.mark.parametrize("name", ["dpo", "distill"])
def test_one_device_is_autodiff_through_the_log_probabilities(name):
    program, params, _, _ = compiled("plain")
    objective = build_objective(settings_of(name))
    own = {key: batch()[key] for key in objective.fields}
    model, ops = program.model, program.ops

    def direct(params):
        x = model.hidden(params, own, ops)
        targets = (
            own["targets"]
            if name == "dpo"
            else np.concatenate([own["soft_targets"], own["targets"][..., None]], -1)
        )
        logprobs = model.logprobs(params, x, {"targets": targets}, ops)
        nothing = np.zeros_like(own["loss_weights"])
        z, _ = model.cross_entropy(params, x, own["targets"], nothing, own["loss_weights"], ops)
        return objective.value(logprobs, own)[0] + z / objective.weight(own)

    assert distance(outcome("plain", name)[1], jax.device_get(jax.jit(jax.grad(direct))(params))) < 1e-5
