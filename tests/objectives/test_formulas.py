"""Every objective's value and its gradient by log-probabilities against TRL's formulae in float64."""

import functools

import jax
import numpy as np
import pytest

from tests.objectives import formulas
from training.objectives.base import build_objective, objectives

ROWS, LENGTH, OUTCOMES = 8, 12, 5
CASES = {
    "dpo": ("dpo", {}),
    "dpo smoothed": ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    "ipo": ("ipo", {"beta": 0.2}),
    "simpo": ("simpo", {"beta": 2.5, "margin": 0.7}),
    "orpo": ("orpo", {"beta": 0.3}),
    "kto": ("kto", {}),
    "kto weighted": ("kto", {"beta": 0.4, "wanted_weight": 1.5, "unwanted_weight": 0.5}),
    "grpo clipped": ("grpo", {"updates": 2}),
    "grpo near its reference": ("grpo", {"kl_weight": 0.3, "clip": 0.1, "clip_high": 0.1, "mean": "answers"}),
    "grpo by a constant": ("grpo", {"updates": 4, "mean": "constant", "max_new_tokens": 20}),
}


@functools.cache
def batch():
    rng = np.random.default_rng(3)
    weights = (np.arange(LENGTH) >= rng.integers(1, 6, (ROWS, 1))) & (
        np.arange(LENGTH) < rng.integers(8, LENGTH + 1, (ROWS, 1))
    )
    labels = np.array([1, 0, -1, 0, -1, 0, 1, 0])[:, None] * weights
    near = -rng.exponential(1.0, (ROWS, LENGTH)) - 0.05
    return {
        "loss_weights": weights.astype(np.float64),
        "labels": labels.astype(np.float64),
        "reference_logprobs": near + rng.normal(0, 0.3, near.shape),
        "behaviour_logprobs": near + rng.normal(0, 0.3, near.shape),
        "advantages": np.repeat(rng.normal(0, 1, (ROWS, 1)), LENGTH, 1) * weights,
        "drawn_reward": np.zeros((ROWS, LENGTH)),
    }, near


def judged(name):
    """The batch as an objective has it, and log-probabilities: of pairs, the better one and the worse one."""
    given, logprobs = batch()
    if name != "kto":
        given = {**given, "labels": np.resize([1, -1], ROWS)[:, None] * given["loss_weights"]}
    return given, logprobs


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_formulae(case):
    name, settings = CASES[case]
    given, logprobs = judged(name)
    own = {k: v for k, v in settings.items() if k != "updates"}
    formula = functools.partial(getattr(formulas, name), batch=given, **own)
    if name == "kto":  # to which no gradient goes
        ratios = formulas.sums(logprobs - given["reference_logprobs"], given)
        formula = functools.partial(formula, kl=max(ratios[1::2].mean(), 0.0))
    objective = build_objective({"name": name, **settings})
    (value, _), slope = jax.value_and_grad(objective.value, has_aux=True)(
        np.float32(logprobs), jax.tree.map(np.float32, given)
    )
    np.testing.assert_allclose(value, formula(logprobs), rtol=1e-6)
    wanted = formulas.slope(formula, logprobs)
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(slope, wanted, atol=1e-6 * max(1.0, np.abs(wanted).max()))


def test_answers_drawn_for_one_update_have_the_gradient_of_the_ratio():
    """Without a forward pass of its own: the ratio is 1 there, and its clipping without effect."""
    given, _ = batch()
    given = {**jax.tree.map(np.float32, given), "tokens": np.zeros((ROWS, LENGTH), np.int32)}
    once, twice = (build_objective({"name": "grpo", "updates": n}) for n in (1, 2))

    def never(batch):
        raise AssertionError("a forward pass that nothing needs")

    ready, figures = once.prepare(given, never)
    on_policy, _ = twice.prepare(given, lambda b: {"logprobs": given["behaviour_logprobs"]})
    np.testing.assert_allclose(ready["signed_weights"], on_policy["signed_weights"], rtol=1e-6, atol=1e-7)
    assert figures["loss"] == pytest.approx(
        float(-formulas.grpo(given["behaviour_logprobs"], given)) * -1, 1e-5
    )


def test_equal_distributions_are_no_loss_and_have_no_slope():
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet(np.ones(40), (2, 3)))[..., : OUTCOMES + 1].astype(np.float32)
    given = {"loss_weights": np.ones((2, 3), np.float32), "teacher_logprobs": logprobs[..., :-1]}
    for divergence in ("forward", "reverse", "skew"):
        objective = build_objective({"name": "distill", "teacher": "any", "divergence": divergence})
        (value, _), slope = jax.value_and_grad(objective.value, has_aux=True)(logprobs, given)
        assert abs(value) < 1e-6
        # By logits it is the slope minus its mean under the model, outcomes that nobody named among them.
        inner = np.exp(logprobs[..., :-1]) * np.sum(slope[..., :-1], -1, keepdims=True)
        np.testing.assert_allclose(slope[..., :-1] - inner, 0, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "skew"])
def test_divergences_are_sums_over_the_outcomes(divergence):
    rng = np.random.default_rng(1)
    p, q = (rng.dirichlet(np.ones(OUTCOMES + 1), (2, 3)) for _ in range(2))
    given = {
        "loss_weights": np.ones((2, 3), np.float32),
        "teacher_logprobs": np.log(p[..., :-1]).astype(np.float32),
    }
    logprobs = np.concatenate([np.log(q[..., :-1]), np.full((2, 3, 1), -2.0)], -1).astype(np.float32)
    settings = {"teacher": "any", "divergence": divergence, "skew": 0.2, "hard_weight": 0.25}
    value, figures = build_objective({"name": "distill", **settings}).value(logprobs, given)
    mixed = {"forward": q, "skew": 0.2 * p + 0.8 * q}
    wanted = (
        np.sum(q * np.log(q / p), -1)
        if divergence == "reverse"
        else np.sum(p * np.log(p / mixed[divergence]), -1)
    )
    np.testing.assert_allclose(figures["divergence"], wanted.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, 0.75 * wanted.mean() + 0.25 * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpo", "beta": 0}, "objective.beta=0"),
        ({"name": "dpo", "label_smoothing": 0.7}, "objective.label_smoothing=0.7"),
        ({"name": "grpo", "group": 1}, "objective.group=1"),
        ({"name": "grpo", "mean": "rows"}, "objective.mean=rows"),
        ({"name": "distill", "support": "sampled", "divergence": "reverse"}, "use support=top"),
        ({"name": "kto", "gamma": 1}, "objective=kto"),
    ],
)
def test_values_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_objective(settings)


def test_every_objective_has_its_values_in_a_file():
    from configs.groups import options

    assert set(options("objective")) == set(objectives())
