"""Latent attention against loops in float64; values whose heads have another size than keys."""

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
from tests.models.decoders import lively, make_batch, slope
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
    decode, cache = jax.jit(partial(model.decode, ops=Ops())), model.init_cache(2, 15, jnp.float32)
    shapes = {name: leaf.shape for name, leaf in cache["segments"]["0"][0]["0"].items()}
    assert shapes == {"latent": (2, 15, 16), "k_rope": (2, 15, 4)}
    parts = []
    for cut in (slice(0, 7), *(slice(t, t + 1) for t in range(7, 12))):
        logits, cache = decode(params, batch["tokens"][:, cut], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=5e-5)


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
