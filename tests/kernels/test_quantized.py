"""Products in eight bits: how far they are from float32, and what becomes of zeros, outliers and nan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.einsum import Projector
from kernels.einsum_8bit import FORWARD, GRADIENT, PRODUCTS, fp8_scale, to_fp8

SPEC = "BTD,DCF->BTCF"
# Relative to the norm: half a unit in the last of 3 (e4m3) or 2 bits (e5m2) spread evenly gives about 2.6 and
# 5.2 % for each operand; int8 of normal values about 0.7 %. Gradients of int8 are exact products.
BOUNDS = {"fp8": (0.045, 0.07, 0.07), "int8": (0.012, 1e-6, 1e-6)}


def operands(spread=1.0):
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 32, 64), (64, 2, 48), (2, 32, 2, 48))
    )
    return x * spread, w * 0.02, dy * 1e-5


def product_and_gradients(einsum, x, w, dy):
    y, pull = jax.vjp(lambda x, w: einsum(SPEC, x, w), x, w)
    return y, *pull(dy.astype(y.dtype))


def errors(kind, *operands):
    got = jax.jit(partial(product_and_gradients, PRODUCTS[kind]))(*operands)
    exact = product_and_gradients(jnp.einsum, *(a.astype(jnp.float32) for a in operands))
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("spread", [1.0, 1e-12, 1e12])
def test_errors_are_those_of_the_format_at_any_magnitude(kind, spread):
    found = errors(kind, *operands(spread))
    assert all(e < bound for e, bound in zip(found, BOUNDS[kind], strict=True)), found
    assert found[0] > 1e-3  # it was rounded


@pytest.mark.parametrize("kind", PRODUCTS)
def test_dtypes_are_the_activations_and_the_masters(kind):
    x, w, dy = operands()
    y, dx, dw = product_and_gradients(PRODUCTS[kind], x.astype(jnp.bfloat16), w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert errors(kind, x.astype(jnp.bfloat16), w, dy)[0] < BOUNDS[kind][0] + 0.005


@pytest.mark.parametrize("kind", PRODUCTS)
def test_zeros_give_zeros_and_the_other_gradient(kind):
    """`zero_init` begins with weights of zeros; idle stages of a pipeline work on zeros."""
    x, w, dy = operands()
    y, dx, dw = product_and_gradients(PRODUCTS[kind], x, 0 * w, dy)
    assert not y.any() and not dx.any() and jnp.isfinite(dw).all() and dw.any()
    y, dx, dw = product_and_gradients(PRODUCTS[kind], 0 * x, w, 0 * dy)
    assert not y.any() and not dx.any() and not dw.any()


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(kind, bad):
    x, w, dy = operands()
    y, _, dw = product_and_gradients(PRODUCTS[kind], x.at[0, 0, 0].set(bad), w, dy)
    assert not jnp.isfinite(y[0, 0]).any() and not jnp.isfinite(dw).all()
    _, dx, dw = product_and_gradients(PRODUCTS[kind], x, w, dy.at[0, 0, 0, 0].set(bad))
    assert not jnp.isfinite(dx[0, 0]).any() and not jnp.isfinite(dw).all()


def test_int8_rows_do_not_see_each_others_outliers():
    x, w, dy = operands()
    einsum = PRODUCTS["int8"]
    usual, beside = einsum(SPEC, x, w), einsum(SPEC, x.at[0, 0].mul(1e6), w)
    np.testing.assert_array_equal(beside[0, 1:], usual[0, 1:])
    np.testing.assert_array_equal(einsum(SPEC, x, w.at[:, 0, 0].mul(1e6))[..., 1], usual[..., 1])


def test_an_outlier_costs_fp8_nothing_within_fifteen_powers_of_two():
    x, w, dy = operands()
    assert max(errors("fp8", x.at[0, 0, 0].set(2.0**10), w, dy)[1:]) < 0.07


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
def test_scales_are_the_largest_powers_of_two_that_fit(dtype):
    top = float(jnp.finfo(dtype).max)
    for largest in (1.0, 1.75, 1.7501, 2.0, top, top + 1, 3e-38, 3e38, 2.0**-100, 7.0):
        scale = float(fp8_scale(jnp.array([largest, -largest / 3]), dtype))
        assert np.frexp(scale)[0] == 0.5 and float(jnp.float32(largest)) * scale <= top
        assert float(jnp.float32(largest)) * scale * 2 > top or scale == 2.0**126
        rounded, back = to_fp8(jnp.array([largest, -largest]), dtype)
        np.testing.assert_allclose(np.asarray(rounded, np.float32) * back, [largest, -largest], rtol=0.13)
    assert float(fp8_scale(jnp.zeros(3), dtype)) == 1.0


def test_cut_in_parts_a_product_is_nearly_the_same():
    """Another power of two for a scale changes no digit, but for what is a hundred thousand times smaller."""
    x, w, dy = operands()
    whole = product_and_gradients(PRODUCTS["fp8"], x, w, dy)
    rows = jax.jit(jax.vmap(lambda x, dy: product_and_gradients(PRODUCTS["fp8"], x[None], w, dy[None])))
    y, dx, dw = rows(x, dy * jnp.array([1.0, 4.0])[:, None, None, None])
    np.testing.assert_allclose(y[:, 0], whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx[1, 0] / 4, whole[1][1], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(dw[0] + dw[1] / 4, whole[2], rtol=1e-4, atol=1e-7)


def test_what_is_kept_is_the_plain_product():
    x, w, _ = operands()
    project, plain = Projector(quantized=PRODUCTS["fp8"], keep=("up",)), jnp.einsum(SPEC, x, w)
    np.testing.assert_array_equal(project("up", SPEC, x, w), plain)
    assert (project("kv", SPEC, x, w) != plain).any()
