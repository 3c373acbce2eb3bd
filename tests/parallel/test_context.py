"""Attention over positions on several devices is attention on one, forward and backward."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels.names import ATTENTION_OUTPUT
from parallel.attention.context import (
    context_attention,
    permute_batch,
    uses_zigzag,
    zigzag_order,
)
from parallel.attention.sharded import kv_copies
from parallel.axes import Layout
from parallel.config import CONTEXT_ATTENTION
from tests.parallel.context_cases import (
    LENGTH,
    dense_attention,
    errors,
    layout_of,
    make_inputs,
    make_masks,
    value_and_grads,
)

FEATURES = {
    "plain": ({}, {}),
    "gqa": ({"kv_heads": 2}, {}),
    "window": ({}, {"window": 9}),
    "short_window": ({"kv_heads": 4}, {"window": 3}),
    "softcap": ({}, {"softcap": 2.0}),
    "mla": ({"value_size": 4}, {}),
    "all": ({"kv_heads": 2, "value_size": 4}, {"window": 9, "softcap": 2.0}),
}
EIGHT, WITH_TENSOR = {"context": 8}, {"context": 4, "tensor": 2}
WITH_DATA = {"context": 2, "data": 2, "tensor": 2}
WITH_ROWS = {"context": 2, "fsdp": 2, "expert": 2}
WITH_PIPELINE = {"context": 2, "pipeline": 2, "tensor": 2}
KINDS_AND_ORDERS = [
    (kind, zigzag) for kind in CONTEXT_ATTENTION for zigzag in {False, uses_zigzag(kind, True)}
]
ORDERED = [f"{kind}{'_zigzag' if zigzag else ''}" for kind, zigzag in KINDS_AND_ORDERS]
every_kind = pytest.mark.parametrize(("kind", "zigzag"), KINDS_AND_ORDERS, ids=ORDERED)
# All features at once on every mesh, none on one; one by one by the ring: others leave them to the kernel.
MANY_HEADS = {"context": 2, "tensor": 4}  # more than K/V heads
MESHES = (EIGHT, WITH_TENSOR, WITH_DATA, WITH_ROWS, WITH_PIPELINE, MANY_HEADS)
CASES = [(*kind, mesh, "all") for kind in KINDS_AND_ORDERS for mesh in MESHES]
CASES += [(*kind, WITH_TENSOR, "plain") for kind in KINDS_AND_ORDERS]
CASES += [("ring", False, WITH_TENSOR, feature) for feature in ("window", "short_window")]
CASES += [("ring", True, WITH_TENSOR, feature) for feature in ("gqa", "softcap", "mla", "window")]


def name_of(value):
    return ",".join(f"{axis}={n}" for axis, n in value.items()) if isinstance(value, dict) else str(value)


@functools.cache
def one_device(feature):
    sizes, options = FEATURES[feature]
    run = jax.jit(functools.partial(value_and_grads, dense_attention, **options))
    return run(*make_inputs(**sizes), *make_masks())


def order_of(layout, zigzag):
    return zigzag_order(LENGTH, layout.mesh.shape["context"]) if zigzag else np.arange(LENGTH)


@pytest.mark.parametrize(("kind", "zigzag", "mesh", "feature"), CASES, ids=name_of)
def test_context_equals_one_device(kind, zigzag, mesh, feature):
    sizes, options = FEATURES[feature]
    layout = layout_of(**mesh)
    order = order_of(layout, zigzag)
    attention = context_attention(kind, layout, dense_attention, zigzag=zigzag)
    arrays = [x[:, order] for x in (*make_inputs(**sizes), *make_masks())]
    got = jax.jit(functools.partial(value_and_grads, attention, **options))(*arrays)
    assert max(errors(got, [x[:, order] for x in one_device(feature)])) < 1e-6
    # Row 2 and the end of row 1 are padding: exact zeros, in the output and in every gradient.
    padding = arrays[-1] == 0
    assert padding.any() and all(not np.asarray(x)[padding].any() for x in got)


@every_kind
def test_stages_side_by_side_equal_one_device(kind, zigzag):
    # Pipelines run their stages under vmap, with remat, inside scans: two stages, each with rows of its own.
    layout = layout_of(**WITH_PIPELINE)
    order = order_of(layout, zigzag)
    sizes, options = FEATURES["all"]
    inner = context_attention(kind, layout, dense_attention, zigzag=zigzag)

    def attention(q, k, v, masks, scores):
        def layer(total, share):
            return total + share * jax.checkpoint(lambda *qkv: inner(*qkv, masks, scores))(q, k, v), None

        zeros = jnp.zeros((*q.shape[:3], v.shape[3]))
        return jax.lax.scan(layer, zeros, jnp.array([0.25, 0.75]))[0]

    arrays = [x[:, order] for x in (*make_inputs(**sizes), *make_masks())]
    stages = [np.stack([x, np.roll(x, 1, axis=0)]) for x in arrays]
    run = jax.vmap(functools.partial(value_and_grads, attention, **options), spmd_axis_name="pipeline")
    program = jax.jit(run).lower(*pipelined(layout, stages)).compile()
    expected = [np.asarray(x)[:, order] for x in one_device("all")]
    expected = [np.stack([x, np.roll(x, 1, axis=0)]) for x in expected]
    assert max(errors(program(*pipelined(layout, stages)), expected)) < 1e-6
    # Nothing crosses stages: no collective's group holds devices of both.
    assert {axes for _, _, axes in collectives(program, layout)} == {("context",)}


def pipelined(layout, stages):
    """Arrays [P, B, T, ...] on a mesh, one stage a device along mesh.pipeline."""
    axes = ("stages", "batch", "length", "act_heads", None)
    layout = Layout(layout.mesh, {**layout.rules, "stages": ["pipeline"]})
    return [jax.device_put(x, layout.sharding(axes[: x.ndim], x.shape)) for x in stages]


def sharded(layout, arrays):
    axes = ("batch", "length", "act_heads", None)
    return [jax.device_put(x, layout.sharding(axes[: x.ndim], x.shape)) for x in arrays]


def compiled(kind, zigzag, mesh, feature="gqa"):
    layout = layout_of(**mesh)
    sizes, options = FEATURES[feature]
    attention = context_attention(kind, layout, dense_attention, zigzag=zigzag)
    run = jax.jit(functools.partial(value_and_grads, attention, **options))
    return run.lower(*sharded(layout, [*make_inputs(**sizes), *make_masks()])).compile(), layout


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\((.*)"
)


def collectives(program, layout):
    """(operation, elements of its largest float result, mesh axes it crosses) of each in the program."""
    found = []
    for line in program.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            shapes, operation, rest = match.groups()
            dims = re.findall(r"f32\[([\d,]+)\]", shapes)
            sizes = [math.prod(int(n) for n in text.split(",")) for text in dims]
            found.append((operation, max(sizes, default=0), crossed(rest, layout)))
    return found


def crossed(text, layout):
    """Mesh axes along which devices of one group, or the ends of a transfer, differ."""
    if named := re.search(r"replica_groups=mesh\[[^]]*\] \{([^}]*)\}", text):
        return tuple(re.findall(r"'(\w+)'", named.group(1)))
    groups = re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", text).group(1)
    axes = set()
    for group in groups.split("},{"):
        places = [np.unravel_index(int(i), layout.mesh.devices.shape) for i in group.split(",")]
        axes |= {name for name, *at in zip(layout.mesh.axis_names, *places, strict=True) if len(set(at)) > 1}
    return tuple(sorted(axes))


def test_ulysses_trades_positions_for_heads_and_gathers_no_keys():
    program, layout = compiled("ulysses", False, WITH_TENSOR)
    found = collectives(program, layout)
    # q, k, v in and the output out, and their gradients; positions and segments whole.
    assert sorted(operation for operation, _, _ in found) == ["all-gather"] * 2 + ["all-to-all"] * 8
    assert all(size == 0 for operation, size, _ in found if operation == "all-gather")
    assert {axes for _, _, axes in found} == {("context",)}


def test_allgather_gathers_keys_and_scatters_their_gradients():
    program, layout = compiled("allgather", True, WITH_TENSOR)
    found = collectives(program, layout)
    expected = ["all-gather"] * 4 + ["reduce-scatter"] * 2
    assert sorted(operation for operation, _, _ in found) == expected
    assert {axes for _, _, axes in found} == {("context",)}


@pytest.mark.parametrize("zigzag", [False, True])
def test_ring_only_passes_blocks_and_never_under_a_branch(zigzag):
    program, layout = compiled("ring", zigzag, WITH_TENSOR)
    found = collectives(program, layout)
    assert {(operation, axes) for operation, _, axes in found} == {("collective-permute", ("context",))}
    keys = make_inputs(kv_heads=2)[1]
    assert max(size for _, size, _ in found) == keys.size // 8  # one device's part
    assert " conditional(" not in program.as_text()


@pytest.mark.parametrize("zigzag", [False, True])
def test_tiles_smaller_than_a_block_change_nothing(zigzag, monkeypatch):
    monkeypatch.setattr("parallel.attention.ring.TILE", 2)
    test_context_equals_one_device("ring", zigzag, {"context": 2, "tensor": 2}, "all")


def dot_flops(jaxpr):
    """Multiply-adds of a traced function's dots, loops by their length: what one device executes."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((left, _), _), shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in left)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * sum(dot_flops(inner) for inner in jaxprs_in_params(eqn.params))
    return total


@pytest.mark.parametrize(("window", "zigzag", "share"), [(None, True, 17 / 32), (5, False, 2 / 8)])
def test_ring_leaves_out_what_no_query_sees(window, zigzag, share):
    def work(window, zigzag):
        attention = context_attention("ring", layout_of(**EIGHT), dense_attention, zigzag=zigzag)
        run = functools.partial(value_and_grads, attention, window=window)
        return dot_flops(jax.make_jaxpr(run)(*make_inputs(), *make_masks()).jaxpr)

    assert work(window, zigzag) == share * work(None, False)


def test_merging_blocks_without_the_cotangent_of_their_lse_would_be_seen():
    # What a kernel that returns its log-sum-exp as a residual gives to a ring that is simply differentiated.
    q, k, v, cotangent = make_inputs()
    positions, segments = make_masks()

    def block(q, k, v, half):
        scores = 0.3 * jnp.einsum("BTNH,BSNH->BNTS", q, k)
        seen = slice(half * LENGTH // 2, (half + 1) * LENGTH // 2)
        mask = (segments[:, :, None] == segments[:, None, seen]) & (segments > 0)[:, :, None]
        mask &= positions[:, :, None] >= positions[:, None, seen]
        scores = jnp.where(mask[:, None], scores, -1e30)
        lse = jax.lax.stop_gradient(jax.nn.logsumexp(scores, axis=-1))
        return jnp.einsum("BNTS,BSNW->BTNW", jax.nn.softmax(scores, axis=-1) * mask[:, None], v), lse

    def naive(q, k, v, masks, scores):
        (one, lse_one), (two, lse_two) = (
            block(q, *(jnp.split(x, 2, axis=1)[half] for x in (k, v)), half) for half in (0, 1)
        )
        share = jnp.moveaxis(jax.nn.sigmoid(lse_one - lse_two), 1, 2)[..., None]
        return share * one + (1 - share) * two

    found = errors(value_and_grads(naive, q, k, v, cotangent, positions, segments), one_device("plain"))
    out, dq, dk, dv = found
    assert max(out, dv) < 1e-6 and min(dq, dk) > 1e-2


def test_bfloat16_stays_near_float32_and_keeps_its_dtype():
    arrays = [x.astype(jnp.bfloat16) for x in make_inputs()]
    attention = context_attention("ring", layout_of(**WITH_TENSOR), dense_attention, zigzag=False)
    got = jax.jit(functools.partial(value_and_grads, attention))(*arrays, *make_masks())
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert max(errors(got, one_device("plain"))) < 2e-2


def test_remat_may_keep_what_the_backward_ring_needs():
    attention = context_attention("ring", layout_of(**EIGHT), dense_attention, zigzag=True)

    def work(policy):
        def kept(q, k, v, masks, scores):
            return jax.checkpoint(lambda *qkv: attention(*qkv, masks, scores), policy=policy)(q, k, v)

        run = functools.partial(value_and_grads, kept)
        return dot_flops(jax.make_jaxpr(run)(*make_inputs(), *make_masks()).jaxpr)

    # Two products forward and five backward (scores again); without the name, the two once more.
    policies = jax.checkpoint_policies
    kept, nothing = work(policies.save_only_these_names(ATTENTION_OUTPUT)), work(policies.nothing_saveable)
    assert 9 * kept == 7 * nothing


def test_one_device_along_context_is_the_kernel_itself():
    assert context_attention("ring", layout_of(tensor=2), dense_attention, zigzag=True) is dense_attention


def test_zigzag_gives_every_device_an_early_and_a_late_chunk():
    order = zigzag_order(16, 4)
    assert order.tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]


def test_permuted_batch_is_the_batch_in_zigzag_order():
    positions, segments = (jnp.asarray(x) for x in make_masks())
    tokens = jax.random.randint(jax.random.key(0), positions.shape, 0, 100)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    permuted = permute_batch(batch, 4)
    for name, x in batch.items():
        np.testing.assert_array_equal(permuted[name], x[:, zigzag_order(LENGTH, 4)])
        np.testing.assert_array_equal(x, np.asarray(permuted[name])[:, np.argsort(permuted["order"][0])])
    assert permuted["order"].dtype == jnp.int32 and permuted["order"].shape == tokens.shape
    assert permute_batch(batch, 1) is batch


@pytest.mark.parametrize("size", [2, 8])
def test_zigzag_balances_causal_work(size):
    # A query at place p of the text sees p + 1 keys.
    even, uneven = (
        (order.astype(np.int64) + 1).reshape(size, -1).sum(axis=1)
        for order in (zigzag_order(64, size), np.arange(64))
    )
    assert even.sum() == uneven.sum() == 64 * 65 // 2
    assert set(even) == {even[0]}
    assert uneven.max() / uneven.mean() == pytest.approx(2 - 1 / size, rel=0.02)


def test_kv_heads_are_repeated_only_as_often_as_a_split_needs():
    assert [kv_copies(*case) for case in ((8, 4), (2, 4), (1, 8), (6, 4))] == [1, 2, 8, 2]


def test_what_legality_has_to_refuse_is_an_assertion_here():
    layout = layout_of(**EIGHT)
    with pytest.raises(AssertionError):
        context_attention("striped", layout, dense_attention, zigzag=False)
    with pytest.raises(AssertionError):
        context_attention("ring", Layout(layout.mesh, {"batch": ()}), dense_attention, zigzag=False)
    with pytest.raises(AssertionError):
        permute_batch({"tokens": jnp.zeros((1, LENGTH))}, 32)
