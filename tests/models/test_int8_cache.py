"""Keys and values in eight bits: what they cost in bytes and in logits, and what comes back to the bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Masks, Scores
from kernels.attention_paged import paged_attention
from kernels.int8_vectors import to_vectors
from models.config import DeltaConfig, ModelConfig
from models.mixer import CacheArray, extend_cache, kept, vectors
from models.ops import Ops
from models.transformer import build_model
from serving.generator import Generator
from serving.settings import ServeConfig
from tests.models.decoders import decoded, lively, make_batch
from tests.models.mixtures import latent

PLAIN = ModelConfig(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48, max_seq_len=64
)
DELTA = DeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8, chunk=8)
MODELS = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=6, window_pattern=["local", "global"]),
    "latent": latent({"q_lora_rank": None}, num_layers=2),
    "hybrid": replace(PLAIN, delta=DELTA, mixer_pattern=["gated_delta", "attention"]),
}
EIGHT = Ops(cache_bits=8)
ARRAYS = {
    "k": CacheArray((2, 16, 12), ("act_kv_heads", None, "length")),
    "v": CacheArray((2, 12, 16), ("act_kv_heads", "length", None)),
    "latent": CacheArray((12, 24), ("length", None), parts=(16, 8)),
}


def on_the_grid(shape, axis, seed=0):
    """Whole numbers of which the largest of each vector is 127, times a power of two of its own."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-127, 128, shape)
    np.moveaxis(levels, axis, 0)[3] = 127
    one = [1 if i == axis else size for i, size in enumerate(shape)]
    return jnp.asarray(levels * 2.0 ** rng.integers(-20, 20, one), jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_near_those_of_a_float_cache(name):
    """Behind a prompt and token by token: by a twentieth at most of how much logits vary."""
    model = build_model(MODELS[name])
    params, tokens = lively(model, spread=0.15), make_batch([[24], [24]], 24)["tokens"]
    exact, near = (decoded(model, params, tokens, 8, cache_bits=bits) for bits in (None, 8))
    error = np.abs(near - exact).max()
    assert 0 < error < np.std(exact) / 20


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_vectors_on_the_grid_come_back_to_the_bit_from_where_they_were_written(name, paged):
    """Of two rows three tokens, then two and one: read back beside zeros, the first not touched again."""
    array, rows = ARRAYS[name], 2
    place, pages = array.axes.index("length"), jnp.array([[2, 0], [3, 1]])
    page = replace(array, shape=tuple(6 if i == place else n for i, n in enumerate(array.shape)))
    here, count = (page, 4) if paged else (array, rows)
    found = []
    for ops in (Ops(), EIGHT):
        cache = {n: a.grown(None, count, ops) for n, a in kept({name: here}, ops.cache_bits).items()}
        before = jnp.zeros(rows, jnp.int32)
        for seed, tokens in enumerate(([3, 3], [2, 1])):
            size = max(tokens)
            shape = (rows, *(size if i == place else n for i, n in enumerate(array.shape)))
            parts = np.split(np.zeros(shape), np.cumsum(array.sizes)[:-1], 1 + array.vector)
            new = [on_the_grid(part.shape, 1 + array.vector, seed) for part in parts]
            batch = {
                "positions": before[:, None] + jnp.arange(size),
                "segment_ids": (jnp.arange(size) < jnp.array(tokens)[:, None]).astype(jnp.int32),
                **({"pages": pages} if paged else {}),
            }
            new = {name: jnp.concatenate(new, 1 + array.vector)}
            cache = extend_cache(cache, new, {name: here}, batch, ops)
            before += jnp.array(tokens)
        held = vectors(cache, name, here, batch, ops)
        found.append(held.floats(jnp.float32) if paged and ops is EIGHT else held)
    assert found[1].dtype == jnp.float32 and np.count_nonzero(found[0]) > 0
    np.testing.assert_array_equal(*found)


def test_attention_to_pages_in_eight_bits_is_that_to_the_numbers_they_stand_for():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v = draw(2, 3, 4, 16), draw(5, 4, 2, 16), draw(5, 4, 2, 24)
    positions, segments = jnp.array([[5, 6, 7], [2, 3, 4]]), jnp.ones((2, 3), jnp.int32)
    masks, pages = Masks.of_rows(positions, segments), jnp.array([[4, 1], [0, 3]])
    levels = to_vectors(k, 3, (16,)), to_vectors(v, 3, (16, 8))
    run = jax.jit(lambda k, v: paged_attention(q, k, v, masks, Scores(scale=0.3), pages=pages))
    np.testing.assert_array_equal(run(*levels), run(*(x.floats(jnp.float32) for x in levels)))


def test_an_error_is_half_a_level_at_most_and_nothing_turns_finite():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 24)), jnp.float32)
    found = to_vectors(x, 1, (16, 8))
    assert found.levels.dtype == jnp.int8 and found.scale.shape == (5, 2)
    np.testing.assert_allclose(found.scale[:, 1], np.abs(x[:, 16:]).max(axis=1) / 127, rtol=1e-6)
    error = np.abs(found.floats(jnp.float32) - x)
    assert (error <= np.repeat(found.scale, [16, 8], axis=1) * 0.5001).all()
    for bad in (jnp.nan, jnp.inf):
        beside = to_vectors(x.at[2, 20].set(bad), 1, (16, 8)).floats(jnp.float32)
        assert not np.isfinite(beside[2, 16:]).any() and np.isfinite(beside[:2]).all()
        assert np.isfinite(beside[2, :16]).all()


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_a_level_a_number_and_a_scale_a_vector(name):
    """Of bfloat16's (H + 4) / 2H, of a latent and its rotated part two scales; what is no token's stays."""
    model, size = build_model(MODELS[name]), 12
    wide, narrow = (
        model.init_cache(3, size, Ops(compute_dtype=jnp.bfloat16, cache_bits=bits))["segments"]
        for bits in (None, 8)
    )
    token = lambda path: jax.tree_util.keystr(path[-1:], simple=True).startswith(("k", "v", "latent"))  # noqa: E731
    grows = lambda path, x: token(path) and size in x.shape  # noqa: E731
    sizes, fixed = [0, 0], [0, 0]
    for place, tree in enumerate((wide, narrow)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            sizes[place] += x.nbytes if grows(path, x) else 0
            fixed[place] += 0 if grows(path, x) else x.nbytes
    vector, scales = (16 + 4, 2) if name == "latent" else (16, 1)
    assert sizes[1] / sizes[0] == (vector + 4 * scales) / (2 * vector)
    assert fixed[0] == fixed[1] and (fixed[0] > 0) == (name == "hybrid")


def test_a_cache_that_grows_keeps_what_it_has():
    model = build_model(MODELS["latent"])
    small, large = (model.init_cache(2, size, EIGHT) for size in (6, 9))
    small["segments"] = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), small["segments"])
    grown = model.grow(small, 9, EIGHT)
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, large)
    for old, new in zip(*map(jax.tree.leaves, (small["segments"], grown["segments"])), strict=True):
        assert new.dtype == old.dtype and new.sum() == old.size
        np.testing.assert_array_equal(new[tuple(map(slice, old.shape))], old)


@pytest.mark.parametrize("bits", [0, 4, 16])
def test_other_bits_are_refused_by_name(bits):
    message = f"cache_bits={bits} must be 8, or null"
    with pytest.raises(ValueError, match=message):
        ServeConfig(cache_bits=bits)
    model = build_model(PLAIN)
    with pytest.raises(ValueError, match=message):
        Generator(model, lively(model), Ops(), cache_bits=bits)
