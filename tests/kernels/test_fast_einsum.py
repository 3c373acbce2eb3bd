"""Products in the form that CPUs are fast at are the products of `plain_einsum`, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.einsum import plain_einsum
from kernels.einsum_cpu import contract_rows, fast_einsum, materialize
from kernels.token_losses import chunked_cross_entropy

SPECS = {
    "BTD,DNH->BTNH": ((2, 6, 8), (8, 2, 3)),
    "BTD,DCKH->BTCKH": ((2, 6, 8), (8, 2, 2, 3)),
    "BTNH,NHD->BTD": ((2, 6, 2, 3), (2, 3, 8)),
    "BTF,FD->BTD": ((2, 6, 5), (5, 8)),
}


def slopes(einsum, spec, x, w, dy):
    y, pull = jax.vjp(lambda x, w: einsum(spec, x, w), x, w)
    return y, *pull(dy)


def inputs(spec):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = (jax.random.normal(key, shape) for key, shape in zip(keys, SPECS[spec], strict=False))
    return x, w, jax.random.normal(keys[2], jnp.einsum(spec, x, w).shape)


@pytest.mark.parametrize("spec", SPECS)
def test_equals_einsum_in_value_and_gradients(spec):
    ours, plain = (slopes(einsum, spec, *inputs(spec)) for einsum in (fast_einsum, plain_einsum))
    for a, b in zip(ours, plain, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_is_of_factors_alone(spec):
    """Every product is that of rounded factors, and nothing is rounded after it."""
    x, w, dy = inputs(spec)
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w, dy)]
    ours = slopes(partial(fast_einsum, dtype=jnp.bfloat16), spec, x, w, dy)
    for a, b in zip(ours, slopes(plain_einsum, spec, *rounded), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", [((24, 3), (24, 5)), ((24, 5), (24, 3)), ((7, 2), (7, 2))])
def test_rows_are_contracted_in_blocks(shapes):
    x, y = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    exact = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, y)]
    np.testing.assert_allclose(contract_rows(x, y), x.T @ y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        contract_rows(x, y, dtype=jnp.bfloat16), exact[0].T @ exact[1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("spec", ["BTD,TD->BT", "BTD,DF->BFT", "BTD,NH->BTDNH"])
def test_what_is_no_projection_is_refused(spec):
    with pytest.raises(ValueError, match="is no projection"):
        fast_einsum(spec, jnp.zeros((2, 3, 4)), jnp.zeros((3, 4)))


def test_once_changes_no_number():
    x = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 1e6
    np.testing.assert_array_equal(materialize(x), x)


def test_the_table_gets_the_same_gradient_either_way():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (2, 6, 8)), jax.random.normal(keys[1], (16, 8))
    targets = jax.random.randint(keys[2], (2, 6), 0, 16)

    def grads(**how):
        def loss(x, w):
            return chunked_cross_entropy(x, w, targets, jnp.ones((2, 6)), chunk=4, **how)[0]

        return jax.grad(loss, argnums=(0, 1))(x, w)

    for a, b in zip(grads(), grads(contract_rows=contract_rows), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    rough = grads(contract_rows=partial(contract_rows, dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    for a, b in zip(grads(), rough, strict=True):
        assert b.dtype == jnp.float32 and 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(a) < 2e-2


def test_bits_are_moved_and_not_numbers():
    # Rows in several blocks, and values that a 16-bit format of another kind does not hold.
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), jnp.bfloat16)
    y = jnp.asarray(np.random.default_rng(1).standard_normal((64, 16)), jnp.bfloat16)
    x, y = x.at[3, 2].set(1e-30), y.at[3, 1].set(1e30)
    found = contract_rows(x, y, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64).T @ np.asarray(y, np.float64)
    assert np.all(np.abs(found - exact) <= 1e-5 * np.abs(exact).max(axis=0))
