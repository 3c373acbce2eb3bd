"""One matrix and what goes into it: rounding and zeros that cost the output least."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.solve import (
    Fitted,
    Grid,
    Sparsity,
    factors,
    fit,
    gptq,
    inverse_root,
    levels_on,
    magnitude,
    output_error,
    rounded,
    solve,
    wanda,
)

GOLDEN = Path(__file__).with_name("golden") / "qwix_gptq.npz"
GRIDS = [Grid(3), Grid(4, 8, symmetric=False), Grid(2, clip=True), Grid(8, floating=True)]
PATTERN = Sparsity(keep=2, of=4)


def drawn(seed, inputs=32, outputs=12, rows=256):
    """A matrix, and second moments of inputs some of which go along and are larger than others."""
    w, x, mix, size = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 4),
            [(inputs, outputs), (rows, inputs), (inputs, inputs), (inputs,)],
            strict=True,
        )
    )
    x = (x + x @ mix / inputs**0.5) * jnp.exp(size)
    return w, x.T @ x


@pytest.mark.parametrize("grid", GRIDS)
def test_inputs_that_do_not_go_along_make_gptq_rounding(grid):
    w, _ = drawn(0)
    fitted = fit(w, grid)
    for ordered in (False, True):
        np.testing.assert_array_equal(solve(w, jnp.eye(32), fitted, ordered=ordered), rounded(w, fitted))


def test_in_a_thousand_draws_gptq_is_never_further_than_rounding():
    @jax.jit
    @jax.vmap
    def errors(seed):
        w, h = drawn(seed, inputs=16, outputs=6, rows=24)
        fitted = fit(w, Grid(3))
        return tuple(output_error(w, q, h) for q in (gptq(w, h, fitted), rounded(w, fitted)))

    solved, plain = (np.asarray(x) for x in errors(jnp.arange(1000)))
    assert solved.shape == (1000, 6) and (solved <= plain * (1 + 1e-5)).all()
    assert solved.sum() < 0.7 * plain.sum()  # and on the whole far nearer


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_levels_are_those_of_qwix(kind):
    """Its core, on the same moments and the same scales (tests/compress/qwix_oracle.py made them)."""
    there = np.load(GOLDEN)
    scale = jnp.asarray(there[f"{kind}_scale"]).T[:, None]
    # Its grid has the lowest level too: ours has where a zero is given.
    grid = Grid(int(kind[3:]), symmetric=False)
    fitted = Fitted(grid, scale, jnp.zeros_like(scale))
    values = solve(jnp.asarray(there["w"]).T, jnp.asarray(there["h"]), fitted, block=8)
    np.testing.assert_array_equal(levels_on(values, fitted).T, there[f"{kind}_levels"])


def test_values_come_back_as_the_levels_that_they_are_and_blocks_change_nothing():
    w, h = drawn(1)
    fitted = fit(w, Grid(4, 16, symmetric=False))
    values = solve(w, h, fitted)
    scale, zero = fitted.rows(32)
    again = (levels_on(values, fitted).astype(jnp.float32) - zero) * scale
    np.testing.assert_array_equal(again, values)
    assert float(jnp.abs(solve(w, h, fitted, block=4) - values).max()) <= 1e-5


def test_what_is_zero_stays_zero():
    w, h = drawn(2)
    w = magnitude(w, PATTERN)
    assert bool(jnp.all(jnp.where(w == 0, gptq(w, h, fit(w, Grid(4))), 0.0) == 0))


def test_an_input_that_never_was_there_spoils_nothing():
    w, h = drawn(3)
    h = h.at[5].set(0.0).at[:, 5].set(0.0)
    for q in (gptq(w, h, fit(w, Grid(3))), solve(w, h, None, PATTERN), factors(w, h, 4)[0]):
        assert bool(jnp.all(jnp.isfinite(q)))


def test_the_root_of_the_inverse():
    _, h = drawn(4)
    h = h + 0.01 * jnp.mean(jnp.diagonal(h)) * jnp.eye(32)
    root = inverse_root(h)
    assert float(jnp.abs(jnp.tril(root, -1)).max()) == 0
    assert float(jnp.abs(root.T @ root @ h - jnp.eye(32)).max()) < 5e-2  # of a condition of some 10^4


@pytest.mark.parametrize("sparsity", [PATTERN, Sparsity(keep=1, of=8), Sparsity(0.25)])
def test_so_many_weights_are_zero_and_no_more(sparsity):
    w, h = drawn(5)
    found = {"magnitude": magnitude(w, sparsity), "wanda": wanda(w, h, sparsity)}
    found["sparsegpt"] = solve(w, h, None, sparsity)
    for name, q in found.items():
        if sparsity.of:
            kept = (q.reshape(-1, sparsity.of, 12) != 0).sum(axis=1)
            assert (kept == sparsity.keep).all(), name
        elif name == "wanda":
            assert ((q == 0).sum(axis=0) == 8).all()  # of each output
        else:
            assert int((q == 0).sum()) == 96
    for name in ("magnitude", "wanda"):  # what stays is as it was
        assert bool(jnp.all((found[name] == w) | (found[name] == 0)))


def test_two_in_four_cost_least_by_sparsegpt_and_most_by_magnitude():
    @jax.jit
    @jax.vmap
    def errors(seed):
        w, h = drawn(seed)
        ways = (magnitude(w, PATTERN), wanda(w, h, PATTERN), solve(w, h, None, PATTERN))
        return tuple(jnp.sum(output_error(w, q, h)) for q in ways)

    by_size, by_input, solved = (np.asarray(x) for x in errors(jnp.arange(50)))
    assert by_size.sum() > 2 * by_input.sum() and by_input.sum() > 1.2 * solved.sum()
    assert (solved < by_input).mean() > 0.95


def test_a_range_that_is_looked_for_costs_less():
    w, h = drawn(6)
    for bits in (2, 3):
        plain, clipped = (
            jnp.sum(output_error(w, rounded(w, fit(w, Grid(bits, clip=clip), jnp.diagonal(h))), h))
            for clip in (False, True)
        )
        assert float(clipped) < float(plain)


def test_factors_are_the_nearest_product_of_their_rank():
    w, h = drawn(7)

    def error(a, b):
        return float(jnp.sum(output_error(w, a @ b, h)))

    left, sizes, right = np.linalg.svd(np.asarray(w), full_matrices=False)
    plain = error(left[:, :4] * sizes[:4], right[:4])
    assert error(*factors(w, h, 4)) < 0.8 * plain
    assert error(*factors(w, h, 12)) < 1e-3 * plain


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(Grid, 7), "bits=7 is not one of 8, 6, 5, 4, 3, 2"),
        (partial(Grid, 4, 1), "group=1 must be 2 or more"),
        (partial(Sparsity, 1.0), "sparsity=1.0 must be between 0 and 1"),
        (partial(Sparsity, keep=5, of=4), "pattern=5:4 must be N of M"),
        (lambda: fit(jnp.ones((12, 2)), Grid(4, 8)), "group=8 does not divide 12 inputs; use one of 2, 3, 4"),
        (lambda: magnitude(jnp.ones((10, 2)), PATTERN), "pattern=2:4 needs whole groups"),
        (lambda: solve(jnp.ones((10, 2)), jnp.eye(10), None, PATTERN), "10 inputs are no whole number of 4"),
    ],
)
def test_what_cannot_be_is_one_line(make, said):
    with pytest.raises(ValueError, match=said):
        make()
