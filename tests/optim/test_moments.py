"""Moments in bfloat16: rounding that is right on average, the same on any mesh, and of half the size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optim.config import AdamWConfig, LionConfig, MuonConfig, OptimConfig, SGDConfig
from optim.moments import random_bits, stochastic_bfloat16
from optim.optimizers import make_optimizer

COUNT = 1 << 16


def optimizer(config, matrices=None, seed=0):
    found = matrices or {"w": None}
    mask = dict.fromkeys(found, True)
    return make_optimizer(config, lambda _: 1.0, decay_mask=mask, matrices=found, seed=seed)


def as_integers(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16)).astype(int)


def test_rounding_is_to_a_neighbour_and_right_on_average():
    values = np.array([1.001, -1.001, 3.14159, 1e-30, -7e20, 0.99999], np.float32)
    x = jnp.broadcast_to(values[:, None], (len(values), COUNT))
    rounded = stochastic_bfloat16(x, random_bits(x.shape, 0, 0, "x"))
    below = jax.lax.bitcast_convert_type((values.view(np.uint32) >> 16).astype(np.uint16), jnp.bfloat16)
    away = as_integers(rounded) - as_integers(below)[:, None]
    assert set(np.unique(away)) == {0, 1}
    unit = np.asarray(
        jax.lax.bitcast_convert_type((as_integers(below) + 1).astype(np.uint16), jnp.bfloat16), np.float64
    ) - np.asarray(below, np.float64)
    mean = np.asarray(rounded, np.float64).mean(axis=1)
    # The mean of so many coins has at most this deviation; four of them.
    assert np.all(np.abs(mean - values) < 4 * np.abs(unit) * 0.5 / np.sqrt(COUNT))


def test_what_bfloat16_can_hold_stays():
    values = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0**-126, jnp.inf, -jnp.inf], jnp.float32)
    for step in range(8):
        bits = random_bits(values.shape, 0, step, "x")
        np.testing.assert_array_equal(
            as_integers(stochastic_bfloat16(values, bits)), as_integers(values.astype(jnp.bfloat16))
        )
    nans = jnp.full((64,), jnp.uint32(0x7FFFFFFF), jnp.uint32).view(jnp.float32)
    assert np.all(np.isnan(stochastic_bfloat16(nans, random_bits((64,), 0, 0, "x"))))


def test_bits_are_even_and_streams_have_nothing_to_do_with_each_other():
    shape = (256, COUNT // 256)
    streams = [
        random_bits(shape, *name)
        for name in [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b"), (0, 2, "a")]
    ]
    streams = [np.asarray(s).ravel() for s in streams]
    first = streams[0]
    later = [first[1:], first[256:], *streams[1:]]
    for bit in range(16):  # those that are used
        coin = (first >> bit & 1) * 2.0 - 1
        assert abs(coin.mean()) < 4.5 / np.sqrt(COUNT)
        for other in later:
            same = coin[: other.size] * ((other >> bit & 1) * 2.0 - 1)
            assert abs(same.mean()) < 4.5 / np.sqrt(other.size)
    for stream in streams:
        counts = np.bincount(stream & 0xFF, minlength=256)
        chi2 = np.sum((counts - COUNT / 256) ** 2) / (COUNT / 256)
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


def test_bits_are_the_same_on_a_mesh_and_in_the_stages_of_a_pipeline():
    plain = np.asarray(random_bits((8, 4, 6), 3, 5, "w"))
    assert np.array_equal(plain, np.asarray(random_bits((2, 2, 2, 4, 6), 3, 5, "w")).reshape(8, 4, 6))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    split = jax.jit(
        lambda step: random_bits((8, 4, 6), 3, step, "w"),
        out_shardings=NamedSharding(mesh, PartitionSpec("b", "a")),
    )
    np.testing.assert_array_equal(plain, split(5))


def test_a_slow_mean_of_squares_falls_where_rounding_to_the_nearest_stalls():
    """b2 = 0.999 moves by a quarter of a bfloat16's unit a step."""
    steps, tx = 300, optimizer(AdamWConfig(b2=0.999, moment_dtype="bfloat16"))
    params = {"w": jnp.zeros(512)}
    state = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim else x, tx.init(params))
    nearest = jnp.ones((), jnp.bfloat16)

    def step(carry, _):
        state, nearest = carry
        _, state = tx.update({"w": jnp.zeros(512)}, state, params)
        return (state, (nearest.astype(jnp.float32) * 0.999).astype(jnp.bfloat16)), None

    (state, nearest), _ = jax.lax.scan(step, (state, nearest), length=steps)
    nu = np.asarray(state["direction"].nu["w"], np.float32)
    assert float(nearest) == 1.0
    assert abs(nu.mean() / 0.999**steps - 1) < 0.005


MATRICES = {"w": ((0,), (1,)), "b": None}
CONFIGS = [AdamWConfig, MuonConfig, LionConfig, SGDConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_moment_is_narrow_and_every_counter_as_it_was(config):
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(16)}
    wide = optimizer(config(), MATRICES)
    narrow = optimizer(config(moment_dtype="bfloat16"), MATRICES)
    before, after = jax.eval_shape(wide.init, params), jax.eval_shape(narrow.init, params)
    _, later = jax.eval_shape(narrow.update, params, after, params)
    assert jax.tree.structure(before) == jax.tree.structure(after) == jax.tree.structure(later)
    for x, y, z in zip(*map(jax.tree.leaves, (before, after, later)), strict=True):
        assert x.shape == y.shape == z.shape
        assert y.dtype == z.dtype == (jnp.bfloat16 if x.ndim else x.dtype)


@pytest.mark.parametrize("config", [AdamWConfig, MuonConfig, LionConfig], ids=lambda c: c.__name__)
def test_training_goes_as_well_as_in_float32(config):
    """Least squares, 16 inputs to 16 outputs: the loss falls by as much, to a few parts in a hundred."""
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 16), (16, 16)))

    def loss(params):
        return jnp.mean(jnp.square(x @ params["w"] + params["b"] - x @ target))

    def end(dtype):
        tx = optimizer(config(learning_rate=0.05, weight_decay=0.0, moment_dtype=dtype), MATRICES)
        params = {"w": jnp.zeros((16, 16)), "b": jnp.zeros(16)}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=60)
        return float(loss(params)), float(loss({"w": jnp.zeros((16, 16)), "b": jnp.zeros(16)}))

    (wide, start), (narrow, _) = end("float32"), end("bfloat16")
    assert wide < 0.5 * start and narrow != wide
    assert abs(narrow - wide) < 0.02 * (start - wide)


def test_the_seed_decides_the_rounding():
    params = {"w": jnp.full(64, 0.3)}

    def momentum(seed):
        tx = optimizer(LionConfig(moment_dtype="bfloat16"), seed=seed)
        return as_integers(tx.update(params, tx.init(params), params)[1]["direction"].mu["w"])

    assert np.array_equal(momentum(1), momentum(1)) and not np.array_equal(momentum(1), momentum(2))


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="optim.moment_dtype=float16 must be float32 or bfloat16"):
        OptimConfig(moment_dtype="float16")
