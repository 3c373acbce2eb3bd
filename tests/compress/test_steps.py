"""Whole models: what is recorded, and what steps make of them layer by layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import STREAM, walk
from compress.scale import find_factors, rescaled
from compress.slice import Slice, refitted
from compress.solve import Grid, fit, output_error, rounded
from compress.steps import Material, Prune, Quantize
from models.ops import Ops
from models.transformer import build_model
from models.weights import QTensor, merged, quantizable, quantize
from tests.models.decoders import FAMILIES, family, make_batch
from tests.models.mixtures import mixture

OPS = Ops()
LLAMA = family(num_heads=4, num_kv_heads=2, tie_embeddings=True)


def opened(config, seed=0):
    """(model, weights none of which is zero, a batch of 4 rows, one of them padded)."""
    model = build_model(config)
    params = model.init(jax.random.key(seed))
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(7), w.shape), params)
    batch = jax.tree.map(jnp.asarray, make_batch([[96], [40, 56], [90], [96]], 96, seed=seed))
    return model, params, batch


def logits(model, params, batch):
    return jax.jit(lambda params: model.apply(params, batch, OPS))(params)


def material(batch):
    return Material(lambda config: OPS, [batch])


def error(got, wanted, batch):
    real = (batch["segment_ids"] > 0)[..., None]
    return float(jnp.sum(jnp.square(got - wanted) * real) / jnp.sum(jnp.square(wanted) * real))


def test_what_is_recorded_is_what_went_in():
    model, params, batch = opened(LLAMA)
    layers = []
    same = walk(model, params, [batch, batch], OPS, lambda layer: layers.append(layer) or layer.weights)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert [(layer.segment, layer.row) for layer in layers] == [(0, 0), (0, 1)]
    recorded = layers[1].recorded
    assert set(recorded) == {"q", "kv", "o", "up", "down", STREAM}
    first = jax.tree.map(lambda w: w[0], params["segments"]["0"]["0"])
    spec = model.segments[0].period[0]
    x = model.layer(spec, first, model.embed(params, batch, OPS), batch, None, OPS)[0]
    scale = params["segments"]["0"]["0"]["attention_norm"]["scale"][1]
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale
    rows = normed[batch["segment_ids"] > 0]
    wanted = 2 * np.asarray(rows.T @ rows)  # two batches; padding is nobody's
    assert float(recorded["q"].count) == 2 * rows.shape[0] == 2 * 378
    assert np.abs(recorded["q"].second - wanted).max() <= 1e-4 * np.abs(wanted).max()
    np.testing.assert_array_equal(recorded["kv"].second, recorded["q"].second)
    assert np.abs(recorded["q"].peak - jnp.abs(rows).max(axis=0)).max() < 1e-4


def test_experts_are_recorded_by_the_tokens_that_choose_them():
    model, params, batch = opened(mixture(), seed=1)
    seen = {}
    walk(model, params, [batch], OPS, lambda layer: seen.setdefault(layer.row, layer) and layer.weights)
    up, down = (seen[1].recorded[f"experts.{name}"] for name in ("up", "down"))
    assert up.second.shape == (6, 32, 32) and down.second.shape == (6, 8, 8)
    np.testing.assert_array_equal(up.count, down.count)
    assert float(up.count.sum()) == 2 * 378 and float(down.worth.min()) > 0
    assert (
        np.abs(jnp.trace(up.second, axis1=1, axis2=2).sum() - 2 * jnp.trace(seen[1].recorded["q"].second)) > 0
    )
    # Few tokens are no ground to solve on: such an expert is rounded.
    _, packed = Quantize("gptq", 4).apply(model, params, material(batch))
    experts = packed["segments"]["0"]["0"]["mlp"]["experts"]
    info = model.info["segments"]["0"]["0"]["mlp"]["experts"]["up"]
    few = np.asarray(up.count) < 256
    assert few.any()
    plain = quantize(info, params["segments"]["0"]["0"]["mlp"]["experts"]["up"], 4).levels()
    np.testing.assert_array_equal(experts["up"].levels()[1][few], plain[1][few])


def test_rounding_is_that_of_the_grid():
    model, params, batch = opened(LLAMA)
    _, packed = Quantize("rtn", 4, 8, symmetric=False, tables=8, keep=["o"]).apply(
        model, params, material(batch)
    )

    def of(path, info, w):
        if not quantizable(info) or info.projection == "o":
            return w
        if info.role == "embedding":
            return quantize(info, w, 8)
        return quantize(info, w, 4, 8, symmetric=False)

    wanted = jax.tree_util.tree_map_with_path(of, model.info, params)
    assert jax.tree.structure(packed) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, packed, wanted)


def test_what_is_solved_for_is_nearer_than_what_is_rounded():
    model, params, batch = opened(LLAMA)
    wanted = logits(model, params, batch)
    found = {}
    for method in ("rtn", "gptq"):
        _, packed = Quantize(method, 3, symmetric=False).apply(model, params, material(batch))
        found[method] = error(logits(model, packed, batch), wanted, batch)
    assert found["gptq"] < 0.6 * found["rtn"]
    for method in ("magnitude", "wanda", "sparsegpt"):
        _, sparse = Prune(method, pattern="2:4").apply(model, params, material(batch))
        found[method] = error(logits(model, sparse, batch), wanted, batch)
    assert found["sparsegpt"] < 0.8 * min(found["wanda"], found["magnitude"])


def test_a_pruned_model_stays_so_when_it_is_quantized():
    model, params, batch = opened(LLAMA)
    _, sparse = Prune("sparsegpt", pattern="2:4").apply(model, params, material(batch))
    _, packed = Quantize("gptq", 4).apply(model, sparse, material(batch))
    for was, now in zip(jax.tree.leaves(sparse), jax.tree.leaves(merged(packed)), strict=True):
        assert bool(jnp.all((was != 0) | (now == 0)))
    with pytest.raises(ValueError, match="an earlier one has quantized; quantize last"):
        Prune("magnitude").apply(model, packed, material(batch))


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("method", ["awq", "smooth"])
def test_scaled_inputs_leave_the_function_as_it_was(name, method):
    config = FAMILIES[name]
    if config.position == "learned":
        config = replace(config, max_seq_len=96)
    model, params, batch = opened(config)
    wanted = logits(model, params, batch)
    scaled = walk(model, params, [batch], OPS, lambda layer: rescaled(layer, config, method, Grid(3)).weights)
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, scaled)), strict=True)]
    assert any(moved)
    assert float(jnp.abs(logits(model, scaled, batch) - wanted).max()) <= 1e-5 * float(jnp.abs(wanted).max())


def test_factors_that_are_looked_for_never_cost_their_product_anything():
    model, params, batch = opened(LLAMA)
    layers = []
    walk(model, params, [batch], OPS, lambda layer: layers.append(layer) or layer.weights)
    grid = Grid(3)
    for name, w in (("down", layers[0].weights["mlp"]["down"]), ("o", layers[0].weights["attention"]["o"])):
        moments = layers[0].recorded[name]
        w = w.reshape(moments.peak.size, -1)
        factors = find_factors([w], moments, "awq", grid)
        scaled = w * factors[:, None]
        back = rounded(scaled, fit(scaled, grid)) / factors[:, None]
        errors = [jnp.sum(output_error(w, q, moments.second)) for q in (back, rounded(w, fit(w, grid)))]
        assert float(errors[0]) <= float(errors[1]) * (1 + 1e-5)


# -- slices ------------------------------------------------------------------------------------------------


def silenced(model, params, kept):
    """The weights with zeros where units are left out: `kept`, by axis, per layer or for all."""

    def of(path, info, w):
        for dim, axis in enumerate(info.axes):
            if axis not in kept:
                continue
            index = kept[axis]
            mask = jnp.zeros((w.shape[0], w.shape[dim])) if index.ndim == 2 else jnp.zeros(w.shape[dim])
            mask = (
                mask.at[jnp.arange(w.shape[0])[:, None], index].set(1)
                if index.ndim == 2
                else mask.at[index].set(1)
            )
            shape = [1] * w.ndim
            shape[dim] = w.shape[dim]
            if index.ndim == 2:
                shape[0] = w.shape[0]
            w = w * mask.reshape(shape)
        return w

    return jax.tree_util.tree_map_with_path(of, model.info, params)


def chosen_by(step, model, params, batch, monkeypatch):
    """What the step makes, and its choice."""
    kept = {}
    choose = Slice.choose

    def note(self, scores, config):
        found = choose(self, scores, config)
        for axis, places in found.items():
            (index,) = places.values()
            kept[axis] = index[0] if axis in ("embed", "layers") else index
        return found

    monkeypatch.setattr(Slice, "choose", note)
    return *step.apply(model, params, material(batch)), kept


@pytest.mark.parametrize(
    "shares", [{"mlp": 0.67}, {"heads": 0.5}, {"embed": 0.75}, {"mlp": 0.5, "embed": 0.5}]
)
def test_a_narrower_model_is_the_wide_one_with_silent_units(shares, monkeypatch):
    model, params, batch = opened(replace(LLAMA, norm_eps=1e-12))
    narrow, smaller, kept = chosen_by(
        Slice("width", refit=False, **shares), model, params, batch, monkeypatch
    )
    config = narrow.config
    assert (config.d_ff < 48) == ("mlp" in shares) and (config.d_model < 32) == ("embed" in shares)
    assert (config.num_kv_heads, config.num_heads) == ((1, 2) if "heads" in shares else (2, 4))
    jax.tree.map(lambda info, w: np.testing.assert_equal(info.shape, w.shape), narrow.info, smaller)
    wanted = logits(model, silenced(model, params, kept), batch)
    got = logits(narrow, smaller, batch)
    assert float(jnp.abs(got - wanted).max()) <= 1e-4 * float(jnp.abs(wanted).max())


def test_units_that_stay_take_over_from_those_that_go():
    """No other matrix on the same inputs is nearer, and what goes along with them costs nothing."""
    x = jax.random.normal(jax.random.key(1), (200, 6))
    x = x.at[:, 4].set(x[:, 0] - 2 * x[:, 1])
    w, stays = jax.random.normal(jax.random.key(2), (6, 3)), np.array([1, 1, 1, 1, 0, 1], bool)
    new = refitted(w, x.T @ x, stays)
    assert float(jnp.abs(x @ (new - w)).max()) < 0.05 * float(jnp.abs(x @ w).max())  # of the damping
    stays[2] = False
    new = refitted(w, x.T @ x, stays)
    best = jnp.linalg.lstsq(x[:, stays], x @ w)[0]
    assert not jnp.any(new[~stays])
    np.testing.assert_allclose(new[stays], best, atol=0.1)  # of the damping


@pytest.mark.parametrize("shares", [{"mlp": 0.5}, {"heads": 0.5}])
def test_a_narrower_model_that_is_refitted_is_nearer_to_the_wide_one(shares):
    model, params, batch = opened(LLAMA)
    wanted = logits(model, params, batch)
    far, near = (
        error(
            logits(*Slice("width", refit=refit, **shares).apply(model, params, material(batch)), batch),
            wanted,
            batch,
        )
        for refit in (False, True)
    )
    assert near < 0.9 * far


def test_layers_that_turn_the_stream_least_are_left_out(monkeypatch):
    model, params, batch = opened(replace(LLAMA, num_layers=4))
    idle = jax.tree.map(lambda w: w.at[2].multiply(1e-3), params["segments"]["0"]["0"])
    params = {**params, "segments": {"0": {"0": idle}}}
    shallow, smaller, kept = chosen_by(Slice("depth", keep=3), model, params, batch, monkeypatch)
    np.testing.assert_array_equal(kept["layers"], [0, 1, 3])
    assert shallow.config.num_layers == 3
    wanted = logits(model, params, batch)
    assert error(logits(shallow, smaller, batch), wanted, batch) < 1e-3


def test_experts_that_say_least_are_left_out_with_their_columns_of_the_router():
    config = mixture({"bias_update_rate": 0.1})
    model, params, batch = opened(config)
    quiet = params["segments"]["0"]["0"]["mlp"]["experts"]
    quiet["down"] = quiet["down"].at[:, jnp.array([1, 4])].multiply(1e-3)
    fewer, smaller = Slice("experts", keep=4).apply(model, params, material(batch))
    assert fewer.config.moe.num_experts == 4
    jax.tree.map(lambda info, w: np.testing.assert_equal(info.shape, w.shape), fewer.info, smaller)
    left = jnp.array([0, 2, 3, 5])
    experts = smaller["segments"]["0"]["0"]["mlp"]["experts"]
    np.testing.assert_array_equal(experts["down"], quiet["down"][:, left])
    np.testing.assert_array_equal(experts["router"], quiet["router"][..., left])
    assert bool(jnp.all(jnp.isfinite(logits(fewer, smaller, batch))))


@pytest.mark.parametrize(
    ("step", "config", "said"),
    [
        (Slice("depth", keep=1), FAMILIES["gemma2"], "needs layers of one kind"),
        (Slice("depth", keep=2), LLAMA, "keep=2 must be below 2 layers"),
        (Slice("experts", keep=2), LLAMA, "this model has none"),
        (Slice("experts", keep=1), mixture(), "keep=1 must be from 2 to 5"),
        (Slice("width", mlp=0.5), mixture(), "leaves experts as they are; use slice=experts"),
        (Slice("width", embed=0.5), FAMILIES["gemma2"], "embed needs RMSNorm and embed_scale=false"),
        (Quantize("rtn", 4, 5), LLAMA, "group=5 does not divide"),
        (Prune("wanda", pattern="2:5"), LLAMA, "pattern=2:5 needs whole groups"),
    ],
)
def test_what_a_model_cannot_have_is_one_line(step, config, said):
    model, params, batch = opened(config)
    with pytest.raises(ValueError, match=said):
        step.apply(model, params, material(batch))


def test_packed_weights_are_not_sliced():
    model, params, batch = opened(LLAMA)
    _, packed = Quantize("rtn", 8).apply(model, params, material(batch))
    assert any(
        isinstance(w, QTensor) for w in jax.tree.leaves(packed, is_leaf=lambda w: isinstance(w, QTensor))
    )
    with pytest.raises(ValueError, match="behind a step that quantizes; quantize last"):
        Slice("width", mlp=0.5).apply(model, packed, material(batch))
