import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.token_losses import chunked_cross_entropy, chunked_logprobs, softcap_logits
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


def soft(kind, length=12, vocab=40, wanted=5):
    """Distributions over the vocabulary: the ids and weights of the `wanted` likeliest, or of all."""
    keys = jax.random.split(jax.random.key(7), 3)
    x = jax.random.normal(keys[0], (2, length, 16))
    w = jax.random.normal(keys[1], (vocab, 16))
    teacher = jax.nn.softmax(3 * jax.random.normal(keys[2], (2, length, vocab)))
    weights, ids = jax.lax.top_k(teacher, vocab if kind == "all" else wanted)
    return x, w, teacher, ids.astype(jnp.int32), weights


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["all", "some"])
def test_several_targets_are_a_divergence(kind, softcap):
    """Of K = V targets the full KL to 1e-6, of fewer what their weights say; value and gradients."""
    x, w, teacher, ids, weights = soft(kind)
    kept = (
        jnp.zeros_like(teacher)
        .at[jnp.arange(2)[:, None, None], jnp.arange(12)[None, :, None], ids]
        .set(weights)
    )

    def full(x, w):
        logits = softcap_logits(jnp.einsum("BTD,VD->BTV", x, w), softcap)
        plain = jax.nn.log_softmax(logits)
        z = jax.nn.logsumexp(logits, axis=-1) ** 2 * jnp.sum(kept, -1)
        return jnp.sum(kept * (jnp.log(jnp.where(kept > 0, kept, 1)) - plain)) + 0.01 * jnp.sum(z)

    def ours(x, w):
        loss, _ = chunked_cross_entropy(x, w, ids, weights, chunk=7, softcap=softcap, z_loss=0.01)
        return loss + jnp.sum(kept * jnp.log(jnp.where(kept > 0, kept, 1)))

    (wanted, slopes), (got, found) = (jax.value_and_grad(f, (0, 1))(x, w) for f in (full, ours))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for a, b in zip(found, slopes, strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6


def test_one_target_of_several_is_the_single_one():
    x, w, _, ids, weights = soft("some")
    many, sums = chunked_cross_entropy(x, w, ids[..., :1], weights[..., :1], chunk=8, z_loss=0.1)
    one, alone = chunked_cross_entropy(x, w, ids[..., 0], weights[..., 0], chunk=8, z_loss=0.1)
    np.testing.assert_allclose((many, sums["z_loss"]), (one, alone["z_loss"]), rtol=1e-6)


def test_log_probabilities_and_their_gradient():
    x, w, _, ids, _ = soft("some")
    targets, weights = ids[..., 0], jax.random.normal(jax.random.key(1), ids.shape[:2])

    def plain(x, w):
        logits = jax.nn.log_softmax(softcap_logits(jnp.einsum("BTD,VD->BTV", x, w), 5.0))
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    def ours(x, w):
        return chunked_logprobs(x, w, targets, chunk=7, softcap=5.0)

    np.testing.assert_allclose(ours(x, w), plain(x, w), rtol=1e-6, atol=1e-6)
    slopes, found = (
        jax.grad(lambda x, w, f=f: jnp.sum(weights * f(x, w) ** 2), (0, 1))(x, w) for f in (plain, ours)
    )
    for a, b in zip(found, slopes, strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6
