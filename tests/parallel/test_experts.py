"""Experts on several devices compute what one device computes, alone and beside every other axis."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels.grouped_experts import ExpertSpec, run_experts
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from parallel.axes import Layout
from parallel.config import MESH_AXES
from parallel.experts import Axes, expert_dispatch
from parallel.schedules.accumulate import GradientAccumulation
from planner.hlo.program import read_hlo
from tests.models.decoders import lively, make_batch
from tests.models.mixtures import mixture
from training.objectives.next_token import NextToken
from training.state import is_info

RULES = {
    "embed": ["fsdp"],
    "expert_embed": ["fsdp"],
    "experts": ["expert"],
    "heads": ["tensor"],
    "kv_heads": ["tensor"],
    "mlp": ["tensor"],
    "vocab": ["tensor"],
    "batch": ["replica", "data", "fsdp", "expert"],
    "length": ["context"],
    "act_length": ["context"],
    "act_heads": ["tensor"],
    "act_kv_heads": ["tensor"],
    "act_mlp": ["tensor"],
    "act_vocab": ["tensor"],
    "stages": ["pipeline"],
}
ROWS = [[12], [5, 7], [4, 3], [2, 8, 2], [12], [5, 7], [4, 3], [12]]
KEY = jax.random.key(0)


def parts_of(place):
    """Devices that rows and positions are split over."""
    return place.ways("batch"), place.ways("length")


def layout(**sizes: int) -> Layout:
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return Layout(
        jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices), RULES
    )


@cache
def small(dispatch: str) -> ModelConfig:
    moe = {
        "num_experts": 8,
        "num_shared_experts": 1,
        "bias_update_rate": 0.1,
        "router_z_weight": 0.1,
        "dispatch": dispatch,
        "capacity_factor": 0.8,
        "shared_gate": True,
    }
    return mixture(moe, num_layers=1, biases=["experts"] if dispatch == "dropless" else [])


@cache
def expected(dispatch: str):
    model: Any = build_model(small(dispatch))
    params, batch = lively(model, spread=0.2), make_batch(ROWS, 12)
    step = jax.jit(
        lambda params, batch: GradientAccumulation(remat="full").value_and_grad(
            NextToken(), model, params, batch, KEY, Ops()
        )
    )
    return model, params, batch, step(params, batch)


MESHES = [
    ({"expert": 4}, "dropless"),
    ({"expert": 8}, "dropless"),
    ({"expert": 2, "tensor": 2}, "dropless"),
    ({"expert": 2, "fsdp": 2}, "dropless"),
    ({"expert": 2, "context": 2}, "dropless"),
    ({"data": 2, "fsdp": 2, "tensor": 2}, "dropless"),
    ({"expert": 8}, "capacity"),
    ({"expert": 2, "fsdp": 2, "tensor": 2}, "capacity"),
    ({"expert": 2, "context": 2}, "capacity"),
]


@pytest.mark.parametrize(("sizes", "dispatch"), MESHES, ids=str)
def test_experts_on_a_mesh_equal_one_device(sizes, dispatch):
    model, params, batch, (means, grads) = expected(dispatch)
    place = layout(**sizes)
    ops = Ops(constrain=place.constrain, experts=expert_dispatch(place, run_experts), parts=parts_of(place))
    step = jax.jit(
        lambda params, batch: GradientAccumulation(remat="full").value_and_grad(
            NextToken(), model, params, batch, KEY, ops
        )
    )
    spread = {n: jax.device_put(x, place.sharding(("batch", "length"), x.shape)) for n, x in batch.items()}
    got, slopes = step(jax.device_put(params, place.tree(model.info, is_info)), spread)
    assert (means["moe/dropped"] > 0.1) == (dispatch == "capacity")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, means)
    for mine, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(mine - want) <= 1e-4 * np.linalg.norm(want)


def layer_inputs(rows: int, length: int = 8, seed: int = 0):
    """Arguments of a dispatch for D=8, E=4, k=2, F=4; weights last."""
    rng = np.random.default_rng(seed)
    choices = np.array([rng.permutation(4)[:2] for _ in range(rows * length)], np.int32)
    return (
        jnp.asarray(rng.normal(size=(rows, length, 8)), jnp.float32),
        jnp.asarray(choices.reshape(rows, length, 2)),
        jnp.asarray(rng.uniform(0.2, 1, (rows, length, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 8, 2, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 4, 8)), jnp.float32),
    )


def layer(run, spec, x, experts, gates, up, down, order=None):
    """The dispatch within checkpoint and scan, twice over, as a stage of layers has it."""
    real = jnp.ones(x.shape[:2], bool)

    def body(x, _):
        y, dropped = run(x, experts, gates, up, down, real=real, order=order, spec=spec)
        return jnp.tanh(x + y), dropped

    x, dropped = jax.lax.scan(jax.checkpoint(body), x, None, length=2)
    return x, jnp.sum(dropped)


@pytest.mark.parametrize(("capacity", "axis"), [(None, {"expert": 2}), (4, {"context": 2})], ids=str)
def test_stages_of_a_pipeline_have_experts_of_their_own(capacity, axis):
    """`vmap(spmd_axis_name="pipeline")` around shard_map, scan and checkpoint, differentiated outside."""
    place, spec = layout(pipeline=2, tensor=2, **axis), ExpertSpec("swiglu", capacity)
    stages = [layer_inputs(4, seed=seed) for seed in (0, 1)]
    stacked = tuple(jnp.stack(pair) for pair in zip(*stages, strict=True))

    def total(run, vmap, x, gates, up, down):
        each = vmap(partial(layer, run, spec))
        y, dropped = each(x, stacked[1], gates, up, down)
        return jnp.sum(jnp.sin(3 * y)) + jnp.sum(dropped)

    def many(one):
        return lambda *args: jax.tree.map(
            lambda *y: jnp.stack(y), *(one(*(a[s] for a in args)) for s in range(2))
        )

    spmd = partial(jax.vmap, spmd_axis_name="pipeline")
    given = tuple(stacked[i] for i in (0, 2, 3, 4))
    axes = [("stages", "batch", "length", None)] * 2
    axes += [("stages", "experts", "expert_embed", None, "mlp"), ("stages", "experts", "mlp", "expert_embed")]
    placed = [jax.device_put(a, place.sharding(names, a.shape)) for a, names in zip(given, axes, strict=True)]
    pull = partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    got = jax.jit(pull(partial(total, expert_dispatch(place, run_experts), spmd)))(*placed)
    want = jax.jit(pull(partial(total, run_experts, many)))(*given)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_positions_out_of_order_are_dropped_as_the_text_goes():
    """Zigzag order over context: the same tokens are dropped as where the text lies in order."""
    place, spec = layout(context=2, expert=2), ExpertSpec("swiglu", 3)
    x, experts, gates, up, down = layer_inputs(4)
    turn = np.array([0, 1, 6, 7, 2, 3, 4, 5])
    order = jnp.broadcast_to(jnp.asarray(turn, jnp.int32), (4, 8))
    run = expert_dispatch(place, run_experts)
    y, dropped = jax.jit(partial(layer, run, spec))(
        x[:, turn], experts[:, turn], gates[:, turn], up, down, order
    )
    want, lost = jax.jit(partial(layer, run_experts, spec))(x, experts, gates, up, down)
    assert lost > 0
    np.testing.assert_allclose(dropped, lost, rtol=1e-6)
    np.testing.assert_allclose(y, want[:, turn], rtol=1e-5, atol=1e-6)


def collectives(compiled: Any, place: Layout) -> Counter[tuple[str, Axes]]:
    """How many there are of each kind over each axis; groups of one (axes of size 1) move nothing."""
    found = read_hlo(compiled.as_text(), place.mesh.shape).collectives
    return Counter((c.kind, c.axes) for c in found for _ in range(c.times) if c.size > 1)


@pytest.mark.parametrize("capacity", [None, 4], ids=["dropless", "capacity"])
def test_tokens_cross_by_all_to_all_and_nothing_else(capacity):
    place, spec = layout(expert=4), ExpertSpec("swiglu", capacity)
    run = expert_dispatch(place, run_experts)
    x, experts, gates, up, down = layer_inputs(4)
    real = jnp.ones(x.shape[:2], bool)
    spread = [
        jax.device_put(a, place.sharding(("batch", "length", None), a.shape)) for a in (x, experts, gates)
    ]
    weights = [
        jax.device_put(up, place.sharding(("experts", "expert_embed", None, "mlp"), up.shape)),
        jax.device_put(down, place.sharding(("experts", "mlp", "expert_embed"), down.shape)),
    ]

    def forward(*args):
        return run(*args, real=real, spec=spec)[0]

    compiled = jax.jit(forward).lower(*spread, *weights).compile()
    # Dropless: tokens, and with them numbers and gates, there; sums back. Capacity: places there and back.
    assert collectives(compiled, place) == {("all-to-all", ("expert",)): 3 if capacity is None else 2}


def test_weights_are_gathered_over_fsdp_and_their_gradients_scattered():
    place = layout(expert=2, fsdp=2)
    run = expert_dispatch(place, run_experts)
    x, experts, gates, up, down = layer_inputs(4)
    real = jnp.ones(x.shape[:2], bool)
    spread = [
        jax.device_put(a, place.sharding(("batch", "length", None), a.shape)) for a in (x, experts, gates)
    ]
    up_sharding = place.sharding(("experts", "expert_embed", None, "mlp"), up.shape)

    def loss(up):
        return jnp.sum(run(*spread, up, down, real=real, spec=ExpertSpec("swiglu", 4))[0] ** 2)

    grad = jax.jit(jax.grad(loss), in_shardings=up_sharding, out_shardings=up_sharding)
    assert collectives(grad.lower(up).compile(), place) == {
        ("all-gather", ("fsdp",)): 2,
        ("all-to-all", ("expert",)): 3,  # there, back, and the gradient there
        ("reduce-scatter", ("fsdp",)): 1,
    }


def test_the_router_collects_no_tokens():
    """Choosing and counting stay where the tokens are: only counts of a row would cross, over context."""
    place = layout(expert=4)
    model = build_model(replace(small("dropless"), vocab_size=64))
    kept = {}

    def watch(x, experts, gates, up, down, **static):
        kept["experts"] = experts
        return x, jnp.zeros(x.shape[:2])

    ops = Ops(constrain=place.constrain, experts=watch, parts=parts_of(place))
    spec = model.segments[0].period[0]
    params = jax.tree.map(lambda leaf: leaf[0], lively(model)["segments"]["0"]["0"])
    batch = {
        n: jax.device_put(v, place.sharding(("batch", "length"), v.shape))
        for n, v in make_batch(ROWS, 12).items()
    }
    x = jax.device_put(jnp.ones((8, 12, 32)), place.sharding(("batch", "length", None), (8, 12, 32)))

    def run(x, batch):
        _, sums = model.layer(spec, params, x, batch, None, ops)
        return kept["experts"], sums["loss"]

    found = collectives(jax.jit(run).lower(x, batch).compile(), place)
    assert {kind for kind, _ in found} == {"all-reduce"}


def test_one_device_needs_no_dispatch():
    assert expert_dispatch(layout(data=1), run_experts) is run_experts


def test_experts_that_do_not_divide_are_refused():
    run = expert_dispatch(layout(expert=8), run_experts)
    x, *rest = layer_inputs(8)
    with pytest.raises(
        ValueError, match=r"experts' up: mesh.expert=8 cannot split experts=4; use one of 1, 2, 4"
    ):
        run(x, *rest, real=jnp.ones(x.shape[:2], bool), spec=ExpertSpec("swiglu"))
