import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.token_losses import chunked_cross_entropy
from tests.kernels.test_attention import shapes_in

B, T, D, V = 3, 10, 8, 21


def make_inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = 2 * jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.round(jax.random.uniform(keys[3], (B, T), maxval=2.0))  # some are zero
    return x, w, targets, weights


def naive(x, w, targets, weights, softcap, z_loss):
    logits = x @ w.T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    z = z_loss * jax.scipy.special.logsumexp(logits, -1) ** 2
    return jnp.sum(weights * (z - picked)), (-jnp.sum(weights * picked), jnp.sum(weights * z))


@pytest.mark.parametrize(
    ("chunk", "parts", "softcap", "z_loss"),
    # Chunks of 1, 2, 2 (12 // 3 = 4 does not divide 10), 2, 10 and twice 1 positions.
    [
        (1, (1, 1), None, 0.0),
        (7, (1, 1), 2.0, 0.0),
        (12, (1, 1), None, 0.01),
        (12, (1, 1), 2.0, 0.01),
        (1000, (1, 1), 2.0, 0.01),
        (12, (3, 2), 2.0, 0.01),
    ],
)
def test_chunked_cross_entropy_equals_naive_in_loss_and_grads(chunk, parts, softcap, z_loss):
    x, w, targets, weights = make_inputs()

    def chunked(x, w):
        loss, aux = chunked_cross_entropy(
            x, w, targets, weights, chunk=chunk, parts=parts, softcap=softcap, z_loss=z_loss
        )
        return 3.0 * loss, (aux["nll"], aux["z_loss"])

    def plain(x, w):
        loss, aux = naive(x, w, targets, weights, softcap, z_loss)
        return 3.0 * loss, aux

    got, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(x, w)
    want, expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(x, w)
    np.testing.assert_allclose(jax.tree.leaves(got), jax.tree.leaves(want), rtol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(jax.jit(chunked)(x, w)[0], want[0], rtol=1e-5)  # the path without gradients


def count_dots(jaxpr) -> int:
    """Matrix products in the text of a program, loop bodies counted once."""
    return str(jaxpr).count("dot_general[")


def test_loss_alone_does_no_gradient_work():
    x, w, targets, weights = make_inputs()

    def run(x, w):
        return chunked_cross_entropy(x, w, targets, weights, chunk=6)[0]

    assert count_dots(jax.make_jaxpr(run)(x, w)) == 1
    assert count_dots(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(x, w)) == 3


def test_logits_of_all_tokens_never_exist():
    x, w, targets, weights = make_inputs()
    run = jax.grad(lambda x, w: chunked_cross_entropy(x, w, targets, weights, chunk=6)[0], argnums=(0, 1))
    with_vocabulary = [shape for shape in shapes_in(jax.make_jaxpr(run)(x, w).jaxpr) if shape[-1:] == (V,)]
    assert with_vocabulary and all(np.prod(shape) <= 6 * V for shape in with_vocabulary)


def test_parts_carry_no_gradient():
    x, w, targets, weights = make_inputs()

    def parts(x):
        aux = chunked_cross_entropy(x, w, targets, weights, chunk=6, z_loss=0.1)[1]
        return aux["nll"] + aux["z_loss"]

    assert not np.any(jax.grad(parts)(x))


def test_bfloat16_states_give_a_float32_table_gradient_close_to_float32():
    x, w, targets, weights = make_inputs()

    def run(x, w):
        return chunked_cross_entropy(x, w, targets, weights, chunk=6)[0]

    exact = jax.grad(run, argnums=1)(x, w)
    rough = jax.grad(run, argnums=1)(x.astype(jnp.bfloat16), w)
    assert rough.dtype == jnp.float32
    assert np.linalg.norm(rough - exact) < 0.02 * np.linalg.norm(exact)
