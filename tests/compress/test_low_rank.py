"""Matrices of a lower rank: never further than by a plain SVD, all of it back at full rank, whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import Moments, walk
from compress.low_rank import Factorize, of_rank
from compress.measure import sizes
from compress.recipes import recipe
from compress.solve import output_error
from compress.steps import Quantize
from tests.compress.test_solve import drawn
from tests.compress.test_steps import LLAMA, OPS, error, logits, material, opened
from tests.models.mixtures import mixture


def moments_of(h, count=1000.0):
    nothing = jnp.zeros(h.shape[:-1])
    return Moments(h, nothing, nothing, jnp.full(h.shape[:-2], count))


def plain(w, rank):
    left, sizes, right = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


@pytest.mark.parametrize("rows", [24, 256])  # of fewer than inputs H has no root of its own
@pytest.mark.parametrize("rank", [1, 4, 11, 12])
def test_outputs_are_never_further_than_by_a_plain_svd(rows, rank):
    found = []
    for seed in range(20):
        w, h = drawn(seed, rows=rows)
        near = of_rank(w, moments_of(h), rank)
        assert np.linalg.matrix_rank(near, tol=1e-4) <= rank
        errors = [float(jnp.sum(output_error(w, x, h))) for x in (near, plain(w, rank))]
        noise = 1e-9 * float(jnp.sum(output_error(w, jnp.zeros_like(w), h)))
        assert errors[0] <= errors[1] * (1 + 1e-4) + noise, seed
        found.append(errors)
    ours, theirs = np.sum(found, axis=0)
    assert rank == 12 or ours < 0.8 * theirs


@pytest.mark.parametrize("moments", [None, 1000.0])
def test_full_rank_is_the_matrix(moments):
    w, h = drawn(3)
    back = of_rank(w, None if moments is None else moments_of(h, moments), 12)
    assert float(jnp.abs(back - w).max()) <= 1e-5 * float(jnp.abs(w).max())


def test_an_expert_that_saw_little_takes_the_plain_one():
    (w, h), (v, g) = drawn(4), drawn(5)
    moments = moments_of(jnp.stack([h, g]))
    moments = Moments(moments.second, moments.peak, moments.total, jnp.array([255.0, 256.0]))
    few, many = of_rank(jnp.stack([w, v]), moments, 4)
    np.testing.assert_allclose(few, plain(w, 4), atol=1e-5)
    assert float(jnp.abs(many - plain(v, 4)).max()) > 1e-2


def test_what_goes_in_says_which_factors_are_nearest():
    model, params, batch = opened(LLAMA)
    wanted = logits(model, params, batch)
    found = {}
    for method in ("svd", "whitened"):
        step = Factorize(method, share=0.5)
        _, thin = step.apply(model, params, material(batch))
        found[method] = error(logits(model, thin, batch), wanted, batch)
        up = thin["segments"]["0"]["0"]["mlp"]["up"][1].reshape(32, 96)
        assert np.linalg.matrix_rank(up, tol=1e-4) == 32 * 96 // 2 // 128
    assert found["whitened"] < found["svd"]
    dense = sum(info.shape[0] * np.prod(info.shape[1:]) for info in matrices(model))
    assert 0.5 * dense <= step.spared(model) < 0.55 * dense
    assert Factorize("svd", share=0.5, keep=["up"]).spared(model) < step.spared(model)


def matrices(model):
    return [info for info in jax.tree.leaves(model.info["segments"]) if info.role == "matrix"]


def test_what_stays_stays_and_a_grid_may_follow():
    model, params, batch = opened(mixture(), seed=1)
    steps = [Factorize("whitened", rank=4, keep=["experts"]), Quantize("gptq", 8)]
    _, thin = steps[0].apply(model, params, material(batch))
    there, now = (tree["segments"]["0"]["0"]["mlp"]["experts"] for tree in (params, thin))
    np.testing.assert_array_equal(now["up"], there["up"])
    _, packed = steps[1].apply(model, thin, material(batch))
    assert sizes(packed, "float32")["bits_a_weight"] < 32
    with pytest.raises(ValueError, match="an earlier one has quantized; quantize last"):
        steps[0].apply(model, packed, material(batch))
    experts = []
    walk(model, params, [batch], OPS, lambda layer: experts.append(layer) or layer.weights)
    few = np.asarray(experts[0].recorded["experts.down"].count) < 256
    _, all_thin = Factorize("whitened", rank=4).apply(model, params, material(batch))
    down = all_thin["segments"]["0"]["0"]["mlp"]["experts"]["down"][0]
    for number in np.flatnonzero(few):
        np.testing.assert_allclose(down[number], plain(there["down"][0, number], 4), atol=1e-5)
    assert few.any()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"factorize": "cur"}, "factorize=cur is not one of svd, whitened"),
        ({"factorize": "svd"}, "factorize=svd needs share or rank"),
        ({"factorize": "svd", "share": 0.5, "rank": 8}, "factorize=svd needs share or rank, and one of them"),
        ({"factorize": "svd", "share": 1.5}, "share=1.5 must be above 0 and at most 1"),
        ({"factorize": "svd", "rank": 0.5}, "rank=0.5 must be a whole number"),
        ({"factorize": "svd", "rank": 8, "keep": ["ups"]}, "keep=ups is not one of"),
    ],
)
def test_a_step_that_is_none_is_one_line(step, said):
    with pytest.raises(ValueError, match=said):
        recipe("mine", {"steps": [step]})


def test_a_rank_that_a_matrix_cannot_have_is_named():
    model, params, batch = opened(LLAMA)
    with pytest.raises(ValueError, match=r"rank=64 of a matrix \[32, \d+\] must be from 1 to 32; use share"):
        Factorize("svd", rank=64).apply(model, params, material(batch))
