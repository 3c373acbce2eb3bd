"""Quantization-aware training: what a projection computes with is what is exported, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.einsum import Projector
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from models.weights import merged, quantizable, quantize, rounded_product
from training.config import TrainingConfig
from training.precision import build_projector

CONFIG = ModelConfig(
    num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, vocab_size=128
)


def ops_of(**settings):
    training = TrainingConfig(**settings)
    return Ops(project=build_projector(training, jax.devices()[0]))


@pytest.fixture(scope="module")
def model():
    model = build_model(CONFIG)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, (2, 16)).astype(np.int32)
    batch = {
        **{"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones_like(tokens)},
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        "loss_weights": np.ones(tokens.shape, np.float32),
    }
    return model, model.init(jax.random.key(1)), batch


@pytest.mark.parametrize(("bits", "group"), [(3, None), (4, 16), (8, None), (2, 8)])
def test_what_is_trained_is_what_is_exported(model, bits, group):
    model, params, batch = model
    trained = model.apply(params, batch, ops_of(weight_bits=f"{bits}/{group}" if group else str(bits)))
    packed = jax.tree.map(
        lambda info, w: quantize(info, w, bits, group) if quantizable(info) and info.role == "matrix" else w,
        model.info,
        params,
    )
    exported = merged(packed)
    np.testing.assert_array_equal(trained, model.apply(exported, batch, Ops()))
    # A product of levels has its scale behind it where one is an output's: other sums, no other weights.
    np.testing.assert_allclose(trained, model.apply(packed, batch, Ops()), rtol=0, atol=1e-6)
    # Rounded once more it is where it was: an export of what a run computes with has nothing to lose.
    assert np.abs(np.asarray(trained) - np.asarray(model.apply(params, batch, Ops()))).max() > 1e-4


def test_the_gradient_goes_through_as_if_nothing_were_rounded():
    w = jax.random.normal(jax.random.key(0), (6, 2, 4))
    x = jax.random.normal(jax.random.key(1), (3, 5, 6))

    def loss(w, rounded):
        near = rounded_product("BTD,DCF->BTCF", w, bits=3, group=None) if rounded else w
        return jnp.sum(jnp.sin(jnp.einsum("BTD,DCF->BTCF", x, near)))

    near = rounded_product("BTD,DCF->BTCF", w, bits=3, group=None)
    np.testing.assert_allclose(jax.grad(loss)(w, True), jax.grad(loss)(near, False), rtol=1e-5, atol=1e-6)
    levels = near / (jnp.abs(w).max(axis=0, keepdims=True) / 3)
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
    assert len(np.unique(np.round(levels))) <= 7


def test_projections_that_are_named_stay_as_they_are():
    projector = build_projector(TrainingConfig(weight_bits="2", full_precision=["o"]), jax.devices()[0])
    w, x = jax.random.normal(jax.random.key(0), (4, 2, 6)), jnp.ones((1, 2, 4, 2))
    spec = "BTNH,NHD->BTD"
    np.testing.assert_array_equal(projector("o", spec, x, w), Projector()("o", spec, x, w))
    assert np.abs(projector("down", spec, x, w) - Projector()("down", spec, x, w)).max() > 0.01


def test_what_rounds_twice_is_refused():
    with pytest.raises(ValueError, match="would both round"):
        build_projector(TrainingConfig(weight_bits="4", precision="int8"), jax.devices()[0])
    for text in ("7", "3/", "4/1", "four"):
        with pytest.raises(ValueError, match=f"training.weight_bits={text} must be one of"):
            TrainingConfig(weight_bits=text)
