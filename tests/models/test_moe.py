"""Experts against loops in float64: routing, both dispatches, the losses, the bias, counts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kernels.activations import activate
from kernels.grouped_experts import (
    ExpertSpec,
    block_size,
    capacity_of,
    grouped_feed_forward,
    run_experts,
)
from models.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig
from models.moe import route
from models.ops import Ops
from models.transformer import build_model
from optim.config import AdamWConfig, ConstantConfig, LionConfig, MuonConfig
from optim.optimizers import make_optimizer
from optim.schedules import make_schedule
from parallel.schedules.accumulate import GradientAccumulation
from tests.configs.composing import config
from tests.models.decoders import decoded, lively, make_batch, slope
from tests.models.mixtures import DEEPSEEK, MIXTURES, LoopMixture, loop_route, mixture
from training.objectives.base import router_metrics
from training.objectives.next_token import NextToken
from training.state import balance_mask, decay_mask, make_state, matrix_dims
from training.step import make_train_step, weights_only

PACKED = [[5, 7], [3, 1, 6]]  # 12 positions a row, the second with padding
KEY = jax.random.key(0)


def gradient(model, ops=None, **how):
    """Jitted (params, batch) -> (means, gradients)."""
    ops = ops or Ops(loss_chunk=7)
    return jax.jit(
        lambda params, batch: GradientAccumulation(**how).value_and_grad(
            NextToken(), model, params, batch, KEY, ops
        )
    )


# -- routing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"normalize_gates": False, "experts_per_token": 1},
        {"score": "sigmoid", "gate_scale": 2.5},
        {"score": "sigmoid", "num_groups": 4, "groups_per_token": 2, "experts_per_token": 3},
        {"num_groups": 8, "groups_per_token": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_routing_equals_loops(values, biased):
    moe = MoEConfig(num_experts=8, **values)
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(3, 11, 8)), rng.normal(size=8) if biased else np.zeros(8)
    got = route(jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32) if biased else None, moe)
    for b, t in np.ndindex(3, 11):
        experts, gates = loop_route(logits[b, t], bias, moe)
        assert got.experts[b, t].tolist() == experts
        np.testing.assert_allclose(got.gates[b, t], gates, rtol=1e-5)
    np.testing.assert_allclose(np.sum(got.shares, -1), 1, rtol=1e-6)


def test_the_bias_moves_the_choice_and_neither_gates_nor_their_gradient():
    moe = MoEConfig(num_experts=4, experts_per_token=2, score="sigmoid", normalize_gates=False)
    logits, bias = jnp.asarray([[[2.0, 1.0, 0.0, -1.0]]]), jnp.asarray([0.0, -9.0, 0.0, 5.0])
    routing = route(logits, bias, moe)
    assert routing.experts.tolist() == [[[3, 0]]]
    np.testing.assert_allclose(routing.gates[0, 0], jax.nn.sigmoid(jnp.asarray([-1.0, 2.0])), rtol=1e-6)
    assert not np.any(jax.grad(lambda b: jnp.sum(route(logits, b, moe).gates))(bias))


# -- dispatch --------------------------------------------------------------------------------------------


def problem(activation="swiglu", experts=5, per_token=2, rows=2, length=9, used=None, seed=0):
    """Tokens, distinct choices among the first `used` experts, gates and weights, in float64."""
    rng = np.random.default_rng(seed)
    size, width = 6, 4
    pair = (2,) if activation == "swiglu" else ()
    choices = [rng.permutation(used or experts)[:per_token] for _ in range(rows * length)]
    return {
        "x": rng.normal(size=(rows, length, size)),
        "experts": np.array(choices, np.int32).reshape(rows, length, per_token),
        "gates": rng.uniform(0.2, 1.0, (rows, length, per_token)),
        "up": rng.normal(size=(experts, size, *pair, width)),
        "down": rng.normal(size=(experts, width, size)),
    }


def all_experts(x, experts, gates, up, down, *, kept, activation):
    """Every expert on every token, then a weighted sum: nothing is sorted or gathered."""
    hidden = activate(jnp.einsum("BTD,ED...F->BTE...F", x, up), activation)
    out = jnp.einsum("BTEF,EFD->BTED", hidden, down)
    weight = jnp.sum(jax.nn.one_hot(experts, up.shape[0]) * (gates * kept)[..., None], axis=2)
    return jnp.einsum("BTED,BTE->BTD", out, weight)


def compare(given, real, spec, kept, order=None):
    """Output and gradients of `run_experts` against all experts on all tokens; also what it dropped."""
    names = ("x", "gates", "up", "down")
    given = {name: jnp.asarray(v, jnp.float32 if name in names else jnp.int32) for name, v in given.items()}
    pull = jnp.asarray(np.random.default_rng(9).normal(size=given["x"].shape), jnp.float32)

    def outcome(run, parts):
        return jnp.sum(run(**{**given, **parts}) * pull)

    parts = {name: given[name] for name in names}
    mine = partial(outcome, lambda **a: run_experts(**a, real=real, order=order, spec=spec)[0])
    plain = partial(outcome, partial(all_experts, kept=kept, activation=spec.activation))
    for got, want in zip(*(jax.jit(jax.value_and_grad(f))(parts) for f in (mine, plain)), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), got, want)
    return jax.jit(lambda: run_experts(**given, real=real, order=order, spec=spec))()


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_dispatch_equals_all_experts_on_all_tokens(dispatch, activation):
    given = problem(activation, used=4)  # the last expert has no token at all
    real = np.ones((2, 9), bool)
    real[1, 6:] = False
    spec = ExpertSpec(activation, None if dispatch == "dropless" else 9)
    y, dropped = compare(given, real, spec, kept=real[..., None])
    assert not np.any(dropped) and not np.any(y[1, 6:]) and np.all(np.any(y[0], axis=-1))


@pytest.mark.parametrize("shuffled", [False, True])
def test_past_capacity_the_later_tokens_of_the_text_are_dropped(shuffled):
    given = problem(experts=3, per_token=2, length=8)
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(8) if shuffled else np.arange(8) for _ in range(2)]).astype(np.int32)
    real = rng.uniform(size=(2, 8)) > 0.2
    kept = np.zeros((2, 8, 2), bool)
    for b in range(2):
        room = [3] * 3
        for t in np.argsort(order[b]):  # as the text goes
            for j, e in enumerate(given["experts"][b, t]):
                if real[b, t] and room[e]:
                    room[e] -= 1
                    kept[b, t, j] = True
    assert 0 < np.sum(~kept & real[..., None]) < kept.size / 2
    _, dropped = compare(given, real, ExpertSpec("swiglu", 3), kept, jnp.asarray(order) if shuffled else None)
    np.testing.assert_allclose(dropped, np.sum(~kept & real[..., None], axis=-1) / 2)


def test_a_clamped_gate_and_value_go_no_further():
    """GPT-OSS: the gate from above, the value from both sides, and one more than the value."""
    gate, up = np.meshgrid([-20.0, -1.0, 0.5, 6.9, 7.1, 30.0], [-30.0, -7.1, -0.5, 2.0, 7.1])
    got = activate(jnp.stack([gate, up], axis=-2), "clamped_swiglu")
    low, bounded = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    np.testing.assert_allclose(got, low / (1 + np.exp(-1.702 * low)) * (bounded + 1), rtol=1e-5, atol=1e-6)


def test_capacity_is_an_even_share_times_its_factor_rounded_up():
    assert capacity_of(12, 2, 8, 1.0) == 3 and capacity_of(12, 2, 8, 1.25) == 4
    assert capacity_of(10, 1, 8, 1.0) == 2 and capacity_of(4, 2, 4, 9.0) == 4
    assert capacity_of(1, 2, 64, 1.0) == 1


def test_blocks_of_many_rows_equal_blocks_of_few():
    """Hundreds of choices in uneven loads: several blocks an expert, the last of each partly empty."""
    given = problem(experts=4, per_token=2, rows=1, length=300, seed=3)
    given["experts"][0, :200, 0], given["experts"][0, :200, 1] = 1, 3
    assert block_size(600, 4) == 64
    compare(given, np.ones((1, 300), bool), ExpertSpec("swiglu"), kept=np.ones((1, 300, 1)))


def test_a_batch_of_loops_takes_turns():
    """Under vmap, as a pipeline's stages are, with weights that are batched or shared."""
    given = problem(rows=3, length=7)
    args = [
        jnp.asarray(given[n], jnp.int32 if n == "experts" else jnp.float32) for n in ("x", "experts", "gates")
    ]
    weights = [jnp.asarray(given[n], jnp.float32) for n in ("up", "down")]

    def loss(x, experts, gates, up, down):
        return jnp.sum(jnp.sin(grouped_feed_forward(x, experts, gates, up, down, "swiglu")))

    pull = jax.value_and_grad(loss, argnums=(0, 2, 3))
    together = jax.jit(jax.vmap(pull, in_axes=(0, 0, 0, None, None)))(*args, *weights)
    for row in range(3):
        alone = jax.jit(pull)(*(a[row] for a in args), *weights)
        mine = jax.tree.map(lambda a, row=row: a[row], together)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), mine, alone)


def test_bfloat16_accumulates_in_float32():
    given = problem(rows=1, length=200, per_token=3)
    y = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        args = {n: jnp.asarray(v, jnp.int32 if n == "experts" else dtype) for n, v in given.items()}
        args["gates"] = args["gates"].astype(jnp.float32)

        def loss(up, args=args):
            out, _ = run_experts(
                **{**args, "up": up}, real=jnp.ones((1, 200), bool), spec=ExpertSpec("swiglu")
            )
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(args["up"])
        assert out.dtype == grad.dtype == dtype
        y[dtype] = (out.astype(jnp.float32), grad.astype(jnp.float32))
    for rough, exact in zip(y[jnp.bfloat16], y[jnp.float32], strict=True):
        assert np.linalg.norm(rough - exact) < 0.02 * np.linalg.norm(exact)


# -- whole models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_model_equals_loops_in_objective_and_gradient(name):
    model, loops = build_model(MIXTURES[name]), LoopMixture(MIXTURES[name])
    params, batch = lively(model), make_batch(PACKED, 12)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    weight = batch["loss_weights"].sum()
    means, grads = gradient(model, remat="full")(params, batch)
    np.testing.assert_allclose(means["objective"] * weight, loops.objective(exact, batch), rtol=1e-5)
    np.testing.assert_allclose(means["nll"] * weight, loops.loss(exact, batch), rtol=1e-5)
    leaves, tree = jax.tree.flatten(exact)
    roles = [info.role for info in jax.tree.leaves(model.info)]
    for place, grad in enumerate(jax.tree.leaves(grads)):
        if roles[place] == "balance":
            continue
        direction, expected = slope(
            lambda *x: loops.objective(jax.tree.unflatten(tree, x), batch), leaves, place
        )
        scale = np.linalg.norm(grad) * weight * np.linalg.norm(direction)
        np.testing.assert_allclose(np.vdot(grad, direction) * weight, expected, atol=1e-4 * scale + 1e-6)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_microbatches_change_nothing(dispatch):
    moe = {**DEEPSEEK, "dispatch": dispatch, "capacity_factor": 1.0, "d_expert": 8}
    model = build_model(mixture(moe | {"first_dense_layers": 0}, num_layers=1))
    params, batch = lively(model), make_batch([*PACKED, [12], [2, 4, 6]], 12)
    whole, grads = gradient(model)(params, batch)
    parts, added = gradient(model, accumulation_steps=4)(params, batch)
    assert (whole["moe/dropped"] > 0.05) == (dispatch == "capacity")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5), parts, whole)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), added, grads)


def test_padding_counts_nowhere():
    model = build_model(mixture({"router_z_weight": 0.1, "bias_update_rate": 0.1}, num_layers=1))
    params, short = lively(model), make_batch([[5], [3, 2]], 5)
    long = {name: np.pad(x, ((0, 0), (0, 7))) for name, x in short.items()}
    run = gradient(model)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), run(params, long), run(params, short)
    )


def test_statistics_say_what_happened():
    model = build_model(mixture(num_layers=2))
    batch = make_batch(PACKED, 12)
    params = jax.tree.map(jnp.zeros_like, lively(model))  # every expert alike: ties go to the first two
    means, _ = gradient(model)(params, batch)
    weight, tokens = batch["loss_weights"].sum(), (batch["segment_ids"] > 0).sum()
    np.testing.assert_allclose(means["moe/load"] * weight, [2 * tokens] * 2 + [0] * 4, rtol=1e-6)
    np.testing.assert_allclose(means["moe/entropy"], np.log(6), rtol=1e-6)
    np.testing.assert_allclose(means["moe/router_z_loss"], np.log(6) ** 2, rtol=1e-6)
    np.testing.assert_allclose(means["moe/load_balance_loss"], 1, rtol=1e-6)
    metrics = router_metrics(means)
    assert set(metrics) == {
        f"moe/{n}" for n in "entropy dropped load_balance_loss router_z_loss max_load".split()
    }
    np.testing.assert_allclose(metrics["moe/max_load"], 3, rtol=1e-6)


def test_decode_equals_forward_and_drops_nothing():
    for name in ("mixtral", "deepseek"):
        model = build_model(replace(MIXTURES[name]))
        params, batch = lively(model), make_batch([[12], [12]], 12)
        full = jax.jit(partial(model.apply, ops=Ops()))(params, batch)
        np.testing.assert_allclose(decoded(model, params, batch["tokens"], 4), full[:, 4:], atol=1e-4)


# -- balance by bias -------------------------------------------------------------------------------------


def make_tx(optim, model, rate=0.25):
    return make_optimizer(
        optim,
        make_schedule(ConstantConfig(warmup_steps=9), num_steps=9),
        decay_mask=decay_mask(model.info),
        matrices=matrix_dims(model.info),
        balance=balance_mask(model.info),
        balance_rate=rate,
    )


def test_a_bias_has_the_violation_for_its_gradient():
    model = build_model(mixture({"bias_update_rate": 0.01, "load_balance_weight": 0.0}, num_layers=1))
    params, batch = lively(model), make_batch(PACKED, 12)
    means, grads = gradient(model)(params, batch)
    load = means["moe/load"]
    np.testing.assert_allclose(
        grads["segments"]["0"]["0"]["mlp"]["experts"]["bias"][0], load - load.mean(), rtol=1e-5
    )
    assert np.ptp(load) > 0
    np.testing.assert_allclose(means["objective"], means["nll"], rtol=1e-6)  # and adds nothing


@pytest.mark.parametrize("optim", [AdamWConfig(), MuonConfig(), LionConfig()], ids=lambda c: c.name)
def test_the_optimizer_moves_biases_by_their_rate_alone(optim):
    model = build_model(mixture({"bias_update_rate": 0.25}, num_layers=2))
    tx, params = make_tx(optim, model), lively(model)
    grads = jax.tree.map(jnp.ones_like, params)
    experts = grads["segments"]["0"]["0"]["mlp"]["experts"]
    experts["bias"] = jnp.asarray([[3.0, -2.0, -1.0, 0.0, 1e-7, 0.5], [0.0] * 6])
    updates, state = tx.update(grads, tx.init(params), params)
    moved = updates["segments"]["0"]["0"]["mlp"]["experts"]["bias"]
    np.testing.assert_array_equal(moved, [[-0.25, 0.25, 0.25, 0, 0, -0.25], [0.0] * 6])
    without = make_optimizer(
        optim,
        make_schedule(ConstantConfig(warmup_steps=9), num_steps=9),
        decay_mask=decay_mask(model.info),
        matrices=matrix_dims(model.info),
    )
    assert jax.tree.structure(without.init(params)) == jax.tree.structure(state)
    expected, _ = without.update(grads, without.init(params), params)
    np.testing.assert_allclose(updates["embed"]["table"], expected["embed"]["table"], rtol=1e-6)


def test_biases_even_out_the_load_and_stay_out_of_the_norm():
    moe = {"bias_update_rate": 0.25, "load_balance_weight": 0.0, "score": "sigmoid"}
    model = build_model(mixture(moe, num_layers=1))
    params, batch = lively(model), make_batch([[12]] * 8, 12)
    tx = optax.chain(make_tx(AdamWConfig(learning_rate=1e-9), model))
    step = make_train_step(
        model,
        tx,
        GradientAccumulation(),
        Ops(),
        NextToken(),
        learning_rate=lambda count: jnp.asarray(0.0),
        grad_clip=1e-3,
        ema_decay=None,
        seed=0,
    )
    state, loads = make_state(params, tx, ema=False), []
    _, grads = gradient(model)(params, batch)
    norm = optax.tree.norm(weights_only(model.info, grads))
    run = jax.jit(step)
    for _ in range(30):
        state, metrics = run(state, batch)
        loads.append(float(metrics["moe/max_load"]))
    bias = state.params["segments"]["0"]["0"]["mlp"]["experts"]["bias"]
    assert np.mean(loads[-10:]) < 0.8 * loads[0] and np.any(
        bias != params["segments"]["0"]["0"]["mlp"]["experts"]["bias"]
    )
    assert norm < 0.999 * optax.tree.norm(grads)
    state, metrics = run(make_state(params, tx, ema=False), batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_a_bias_without_a_rate_chooses_experts_and_stands_still():
    plain, model = (build_model(mixture({"selection_bias": has}, num_layers=1)) for has in (False, True))
    params, batch = lively(model), make_batch([[12]] * 4, 12)
    experts = params["segments"]["0"]["0"]["mlp"]["experts"]
    bias = experts["bias"] = jnp.asarray([[2.0, -2.0, 2.0, -2.0, -2.0, -2.0]])
    tx = make_tx(AdamWConfig(), model, rate=0.0)
    settings = dict(learning_rate=lambda count: jnp.asarray(0.0), grad_clip=1.0, ema_decay=None, seed=0)
    step = jax.jit(make_train_step(model, tx, GradientAccumulation(), Ops(), NextToken(), **settings))
    state = make_state(params, tx, ema=False)
    for _ in range(3):
        state, _ = step(state, batch)
    trained = state.params["segments"]["0"]["0"]["mlp"]["experts"]
    np.testing.assert_array_equal(trained["bias"], bias)
    assert np.all(trained["router"] != experts["router"])
    loads = gradient(model)(params, batch)[0]["moe/load"]
    np.testing.assert_array_equal(loads > 0, bias[0] > 0)  # the two that it favours, and no other
    # At zero, where it begins, it changes nothing; and without it every weight begins as it did.
    experts["bias"] = jnp.zeros_like(bias)
    own = {name: x for name, x in experts.items() if name != "bias"}
    others = {"segments": {"0": {"0": {**params["segments"]["0"]["0"], "mlp": {"experts": own}}}}}
    means, want = gradient(model)(params, batch)[0], gradient(plain)({**params, **others}, batch)[0]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), means, want)
    born = dict(jax.tree_util.tree_leaves_with_path(jax.jit(model.init)(KEY)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(plain.init)(KEY)):
        np.testing.assert_array_equal(born.pop(path), leaf)
    assert [np.any(leaf) for leaf in born.values()] == [False]


# -- counts and configs ----------------------------------------------------------------------------------

PUBLISHED = {  # all parameters but those for further tokens, and those that a token meets
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
    "deepseek_v3": (671_026_419_200, 37_552_297_472),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    counts = build_model(config("run.name=any", f"model={name}").model).num_params()
    assert (counts["total"] - counts.get("mtp", 0), counts["active"]) == PUBLISHED[name]


def test_flops_count_the_experts_that_a_token_meets():
    model = build_model(mixture({"num_shared_experts": 1}, num_layers=1, tie_embeddings=False))
    attention = 2 * 32 * 4 * 8 + 32 * 2 * 2 * 8
    met = attention + 32 * 6 + 3 * 3 * 32 * 8  # the router, two chosen and one shared expert
    assert model.flops_per_token(16)["matmul"] == 2 * (met + 64 * 32)
    counts = model.num_params()
    assert counts["total"] - counts["active"] == 4 * 3 * 32 * 8
    assert "mtp" not in counts


def test_further_tokens_cost_a_layer_and_a_head_each():
    plain, one = (build_model(mixture(num_layers=1, mtp=mtp)) for mtp in (None, MTPConfig()))
    more = one.flops_per_token(8)["matmul"] - plain.flops_per_token(8)["matmul"]
    assert more == plain.flops_per_token(8)["matmul"] + 2 * 2 * 32 * 32
    assert one.num_params()["active"] == plain.num_params()["active"]
    assert one.num_params()["total"] == plain.num_params()["total"] + one.num_params()["mtp"]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (dict(score="softmx"), ["model.moe.score=softmx", "softmax?"]),
        (dict(dispatch="drop"), ["model.moe.dispatch=drop", "dropless"]),
        (dict(num_experts=0), ["model.moe.num_experts=0", "above 0"]),
        (dict(num_groups=3), ["model.moe.num_groups=3", "model.moe.num_experts=8", "[1, 2, 4, 8]"]),
        (dict(groups_per_token=2), ["model.moe.groups_per_token=2", "model.moe.num_groups=1"]),
        (dict(experts_per_token=9), ["model.moe.experts_per_token=9", "the 8 experts"]),
        (dict(num_groups=4, experts_per_token=3), ["model.moe.experts_per_token=3", "the 2 experts"]),
        (dict(capacity_factor=0.0), ["model.moe.capacity_factor=0.0", "above 0"]),
        (dict(load_balance_weight=-1.0), ["model.moe.load_balance_weight=-1.0", "0 (off) or more"]),
        (dict(bias_update_rate=float("nan")), ["model.moe.bias_update_rate=nan"]),
        (dict(layer_pattern=["dense"]), ["model.moe.layer_pattern=dense", "experts, mlp"]),
        (dict(layer_pattern=["mlp", "experts"], first_dense_layers=1), ["first_dense_layers=1", "use"]),
    ],
)
def test_values_that_make_no_mixture_are_one_clear_line(values, parts):
    with pytest.raises(ValueError) as caught:
        MoEConfig(**values)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (dict(moe=MoEConfig(first_dense_layers=4)), ["model.moe.first_dense_layers=4", "at most 3"]),
        (dict(moe=MoEConfig(layer_pattern=["mlp"] * 9 + ["experts"])), ["model.num_layers=4", "[experts]"]),
        (dict(moe=MoEConfig(layer_pattern=[])), ["model.moe.layer_pattern=[]", "[experts]"]),
        (
            dict(moe=MoEConfig(layer_pattern=["mlp", "experts"]), mtp=MTPConfig()),
            ["model.moe.layer_pattern", "use model.mtp=null"],
        ),
        (dict(moe=MoEConfig(), bias=True), ["model.bias=true", "model.bias=false"]),
        (dict(mla=MLAConfig(), head_dim=64), ["model.head_dim=64", "use 192"]),
        (dict(mla=MLAConfig(), head_dim=192, num_kv_heads=2), ["model.num_kv_heads=2", "model.num_heads=8"]),
        (
            dict(mla=MLAConfig(), head_dim=192, num_kv_heads=8, qk_norm=True),
            ["model.qk_norm=true", "model.qk_norm=false"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_line(values, parts):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**values)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)
