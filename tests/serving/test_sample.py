"""The distribution that tokens are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.sampling import Sampling, _keep_top_k, _keep_top_p, keys_at, sample, sample_keys

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.15, 0.3, 0.1]))
DRAWS = 4000


def drawn_shares(sampling):
    keys = keys_at(sample_keys(0, range(DRAWS)), jnp.full(DRAWS, 7))
    drawn = sample(jnp.tile(LOGITS, (DRAWS, 1)), keys, sampling)
    return np.bincount(drawn, minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.15, 0.3, 0.1]),
        (Sampling(temperature=0.5), np.square([0.05, 0.4, 0.15, 0.3, 0.1]) / 0.285),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.75), [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(vocab_size=3), [0.05 / 0.6, 0.4 / 0.6, 0.15 / 0.6, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_p=1e-6), [0, 1, 0, 0, 0]),
    ],
)
def test_shares_of_drawn_tokens_equal_the_distribution(sampling, expected):
    shares = drawn_shares(sampling)
    # Four standard errors of a share of 4,000 draws; what is forbidden is never drawn.
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / np.sqrt(DRAWS))
    assert np.all(shares[np.asarray(expected) == 0] == 0)


def test_a_key_is_its_own_for_every_seed_sample_and_position():
    keys = [
        jax.random.key_data(keys_at(sample_keys(seed, range(4)), jnp.full(4, position))[i]).tobytes()
        for seed in (0, 1)
        for position in (0, 1, 2)
        for i in range(4)
    ]
    assert len(set(keys)) == 24


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0)]
)
def test_a_value_out_of_range_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key}={value} must be "):
        Sampling(**{key: value})


def test_a_draw_is_that_of_jax_random_categorical():
    """To the bit: texts under a seed are the same as ever."""
    keys, logits = sample_keys(3, range(64)), jax.random.normal(jax.random.key(1), (64, 50))
    expected = jax.vmap(jax.random.categorical)(keys, logits / 0.7)
    np.testing.assert_array_equal(sample(logits, keys, Sampling(0.7)), expected)
    np.testing.assert_array_equal(sample(logits, keys, Sampling(0)), jnp.argmax(logits, axis=-1))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_what_is_kept_is_what_a_sort_would_keep(scale):
    logits = scale * jax.random.normal(jax.random.key(2), (20, 33)).at[:, 5:9].set(0.25)
    logits = logits.at[:, 30].set(-jnp.inf)
    falling = jnp.sort(logits, axis=-1, descending=True)
    for k in (1, 7, 32):
        np.testing.assert_array_equal(jnp.isfinite(_keep_top_k(logits, k)), logits >= falling[:, k - 1 : k])
    shares = jax.nn.softmax(falling, axis=-1)
    for p in (0.01, 0.6, 0.99):
        least = jnp.min(jnp.where(jnp.cumsum(shares, -1) - shares < p, falling, jnp.inf), -1, keepdims=True)
        np.testing.assert_array_equal(jnp.isfinite(_keep_top_p(logits, p)), logits >= least)
