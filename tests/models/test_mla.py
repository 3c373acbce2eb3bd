"""Latent attention against loops in float64; values whose heads have another size than keys."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Masks, Scores, chunked_attention, reference_attention
from models.config import MLAConfig, RopeScaling
from models.ops import Ops
from models.transformer import build_model
from parallel.schedules.accumulate import GradientAccumulation
from tests.models.decoders import decoded, lively, make_batch, slope
from tests.models.mixtures import LoopMixture, latent
from training.objectives.next_token import NextToken

PACKED = [[5, 7], [3, 1, 6]]
LATENTS = {
    "plain": latent({"q_lora_rank": None}, num_layers=1),
    "latents' norms apart": latent({"norm_eps": 0.5}, num_layers=1),
    "yarn": latent({"v_head_dim": 6}, num_layers=1, rope_scaling=RopeScaling("yarn", 4.0, 64)),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latent_attention_equals_loops_in_loss_and_gradient(name):
    model, loops = build_model(LATENTS[name]), LoopMixture(LATENTS[name])
    params, batch = lively(model), make_batch(PACKED, 12)
    ops = Ops(attention=partial(chunked_attention, block=4))
    run = jax.jit(
        lambda p: GradientAccumulation().value_and_grad(NextToken(), model, p, batch, jax.random.key(0), ops)
    )
    means, grads = run(params)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    weight = batch["loss_weights"].sum()
    np.testing.assert_allclose(means["nll"] * weight, loops.loss(exact, batch), rtol=1e-5)
    leaves, tree = jax.tree.flatten(exact)
    for place, grad in enumerate(jax.tree.leaves(grads)):
        direction, expected = slope(lambda *x: loops.loss(jax.tree.unflatten(tree, x), batch), leaves, place)
        scale = np.linalg.norm(grad) * weight * np.linalg.norm(direction)
        np.testing.assert_allclose(np.vdot(grad, direction) * weight, expected, atol=1e-4 * scale + 1e-6)


def test_decode_equals_forward_and_caches_the_latent_alone():
    model = build_model(LATENTS["yarn"])
    params, batch = lively(model), make_batch([[12], [12]], 12)
    full = jax.jit(partial(model.apply, ops=Ops()))(params, batch)
    shapes = jax.tree.map(jnp.shape, model.init_cache(2, 15, Ops())["segments"]["0"][0]["0"])
    assert shapes == {"latent": (2, 15, 16 + 4)}
    # The prompt is expanded, as in training; every token behind it meets the latent itself.
    np.testing.assert_allclose(decoded(model, params, batch["tokens"], 6), full[:, 6:], atol=5e-5)


def test_a_decoded_token_expands_nothing():
    """No array of the program has heads and places of the cache, but scores [B, N, S]."""
    model = build_model(LATENTS["yarn"])
    params, ops, places = model.unstack(lively(model), Ops()), Ops(), 37
    cache, token = model.init_cache(2, places, ops), jnp.ones((2, 1), jnp.int32)
    program = str(jax.make_jaxpr(partial(model.decode, ops=ops))(params, token, cache))
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", program)}
    wide = [shape for shape in shapes if places in shape and np.prod(shape) > 2 * places * 20]
    assert (2, places, 20) in shapes and not wide


@pytest.mark.parametrize("size", [3, 12])
def test_values_may_be_narrower_or_wider_than_keys(size):
    """Each element of a value is mixed alone: padding or cutting values pads or cuts the output."""
    rng = np.random.default_rng(0)
    draw = lambda heads, size: jnp.asarray(rng.normal(size=(2, 8, heads, size)), jnp.float32)  # noqa: E731
    q, k, v = draw(4, 8), draw(2, 8), draw(2, size)
    batch = make_batch([[3, 5], [6]], 8)
    places, scores = Masks.of_rows(batch["positions"], batch["segment_ids"]), Scores(scale=0.3)
    out = reference_attention(q, k, v, places, scores)
    assert out.shape == (2, 8, 4, size)
    for piece in range(0, size, 3):
        square = jnp.pad(v[..., piece : piece + 3], ((0, 0), (0, 0), (0, 0), (0, 5)))
        want = reference_attention(q, k, square, places, scores)[..., :3]
        np.testing.assert_allclose(out[..., piece : piece + 3], want, atol=1e-6)
    blocks = chunked_attention(q, k, v, places, scores, block=4)
    np.testing.assert_allclose(blocks, out, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (dict(kv_lora_rank=0), ["model.mla.kv_lora_rank=0", "above 0"]),
        (dict(q_lora_rank=0), ["model.mla.q_lora_rank=0", "null"]),
        (dict(norm_eps=0.0), ["model.mla.norm_eps=0.0", "null"]),
        (dict(qk_rope_head_dim=7), ["model.mla.qk_rope_head_dim=7", "use 8"]),
    ],
)
def test_values_that_make_no_latent_are_one_clear_line(values, parts):
    with pytest.raises(ValueError) as caught:
        MLAConfig(**values)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)
