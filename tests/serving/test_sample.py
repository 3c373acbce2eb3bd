"""The distribution that tokens are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.sampling import Sampling, sample, sample_keys

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.15, 0.3, 0.1]))
DRAWS = 4000


def drawn_shares(sampling):
    keys = sample_keys(0, jnp.arange(DRAWS), 7)
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
        jax.random.key_data(sample_keys(seed, jnp.arange(4), position)[i]).tobytes()
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
