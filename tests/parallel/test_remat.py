"""What a layer keeps for its backward pass: the policies compute the same gradient, each at its own price."""

import functools
from types import SimpleNamespace

import jax
import pytest

from parallel.schedules.accumulate import POLICIES, check_remat
from tests.parallel.small import distance, make_config, make_program, run
from training.config import REMAT

SIZES = {"num_layers": 2, "d_model": 32, "d_ff": 64}


def gradient(remat, **mesh):
    """The gradient of a layer scan as text: its equations are what is computed and kept."""
    program = make_program(make_config(mesh, remat=remat))

    def grad(params, batch):
        strategy, model, ops = program.strategy, program.model, program.ops
        return strategy.value_and_grad(program.objective, model, params, batch, jax.random.key(0), ops)

    return str(jax.make_jaxpr(grad)(program.state.params, program.batch))


def test_each_policy_computes_again_what_it_says():
    products = {remat: gradient(remat, data=2).count("dot_general[") for remat in REMAT}
    again = {remat: count - products["none"] for remat, count in products.items()}
    # Of a layer's six products (q, kv, scores, values, o, up) all but `down`, whose result nobody asks for.
    assert again == {
        "none": 0,
        "dots": 3,  # o; scores and values too: without a kernel they are attention's own business
        "offload": 3,
        "attention": 4,  # and the feed-forward's
        "full": 6,  # and those before it
    }


def test_offload_sends_attention_s_inputs_and_the_wide_product_to_the_host():
    text = gradient("offload", data=2)
    for shape in ("16,32,8,8", "16,32,4,8", "16,32,2,128"):
        assert f"<host>[4,{shape}]" in text  # of all four layers
    assert "<host>[4,16,32,64]" not in text  # the residual stream stays
    assert "<host>" not in gradient("dots", data=2)


def test_fused_attention_s_forward_runs_once_where_its_output_is_kept():
    none, dots = (gradient(remat).count("dot_general[") for remat in ("none", "dots"))
    # On one CPU device, where it is what `auto` takes; the one more is the projection behind it.
    assert dots == none + 1


@functools.cache
def outcome(remat, stages=1):
    config = make_config({"pipeline": stages}, model=SIZES, remat=remat)
    return run(config, steps=1, evaluate=False)


@pytest.mark.parametrize(("remat", "stages"), [("attention", 1), ("offload", 1), ("offload", 2)])
def test_every_policy_has_the_same_gradient(remat, stages):
    """`dots` and `full` are held to it on meshes (test_meshes_equal_one_device)."""
    assert max(distance(outcome(remat, stages), outcome("none"))) <= 1e-5


def test_a_device_without_host_memory_is_refused_and_told_what_else_there_is():
    poor = SimpleNamespace(device_kind="toy", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(
        ValueError, match="remat=offload needs pinned_host .* toy has only device; use"
    ) as error:
        check_remat("offload", [poor])
    assert "\n" not in str(error.value)
    for remat in {*POLICIES, "none"} - {"offload"}:
        check_remat(remat, [poor])
    assert {*POLICIES, "none"} == set(REMAT)
