"""What is read from a compiled program is what the program does: kinds, axes, counts, bytes, operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from planner.hlo.program import group_axes, read_hlo
from planner.hlo.text import parse_groups, parse_instruction, type_bytes

AXES = {"fsdp": 2, "tensor": 4}
P = PartitionSpec
SPLIT = P("fsdp", "tensor")
X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
WHOLE = 8 * 16 * 4


def mesh():
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * 2)


def read(function, *shapes, **options):
    return read_hlo(jax.jit(function, **options).lower(*shapes).compile().as_text(), AXES)


def by_hand(function, in_specs=SPLIT, out_specs=SPLIT):
    """Totals of a program whose collectives are written out; x is [8, 16], [4, 4] on a device."""
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return read(mapped, X)


def test_all_reduce():
    got = by_hand(lambda x: jax.lax.psum(x, "fsdp"), out_specs=P(None, "tensor"))
    assert got.totals() == {("all-reduce", ("fsdp",)): (1, WHOLE // 8)}
    got = by_hand(lambda x: jax.lax.psum(x, ("fsdp", "tensor")), out_specs=P())
    assert got.totals() == {("all-reduce", ("fsdp", "tensor")): (1, WHOLE // 8)}


def test_all_gather_counts_what_arrives():
    got = by_hand(lambda x: jax.lax.all_gather(x, "tensor", axis=1, tiled=True), out_specs=P("fsdp"))
    assert got.totals() == {("all-gather", ("tensor",)): (1, WHOLE // 2)}


def test_reduce_scatter_counts_what_leaves():
    got = by_hand(
        lambda x: jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True), in_specs=P("fsdp")
    )
    assert got.totals() == {("reduce-scatter", ("tensor",)): (1, WHOLE // 2)}


def test_all_to_all():
    got = by_hand(
        lambda x: jax.lax.all_to_all(x, "tensor", split_axis=0, concat_axis=1, tiled=True),
        out_specs=P(("fsdp", "tensor")),
    )
    assert got.totals() == {("all-to-all", ("tensor",)): (1, WHOLE // 8)}


def test_permute_along_an_axis():
    ring = [(i, (i + 1) % 4) for i in range(4)]
    got = by_hand(lambda x: jax.lax.ppermute(x, "tensor", ring))
    assert got.totals() == {("collective-permute", ("tensor",)): (1, WHOLE // 8)}


def test_nested_loops_multiply():
    def inner(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "fsdp"), None), x, None, length=3)[0]

    def outer(x):
        x = jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0]
        return jax.lax.psum(x, "tensor")

    got = by_hand(outer, out_specs=P())
    assert {key: times for key, (times, _) in got.totals().items()} == {
        ("all-reduce", ("fsdp",)): 15,
        ("all-reduce", ("tensor",)): 1,
    }
    assert not got.uncounted_loops


def test_a_collective_in_a_branch_is_found_and_one_beside_it_is_not():
    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: jax.lax.psum(y, "fsdp"), lambda y: y, x)

    got = [c for c in by_hand(branch).collectives if c.branch is not None]
    assert [(c.kind, c.axes) for c in got] == [("all-reduce", ("fsdp",))]
    assert "psum" in got[0].source

    def beside(x):
        return jax.lax.psum(jax.lax.cond(x[0, 0] > 0, lambda y: 2 * y, lambda y: y, x), "fsdp")

    found = by_hand(beside, out_specs=P(None, "tensor")).collectives
    assert found and all(c.branch is None for c in found)


def test_a_partitioned_product():
    # Contracted over tensor: each device multiplies its part, and parts are added up.
    x = NamedSharding(mesh(), P("fsdp", "tensor"))
    w = NamedSharding(mesh(), P("tensor"))
    shapes = X, jax.ShapeDtypeStruct((16, 32), jnp.float32)
    got = read(jnp.dot, *shapes, in_shardings=(x, w), out_shardings=NamedSharding(mesh(), P("fsdp")))
    assert got.totals() == {("all-reduce", ("tensor",)): (1, 4 * 32 * 4)}
    assert got.flops == 2 * 4 * 4 * 32


@pytest.mark.parametrize("length", [1, 7])
def test_operations_of_a_loop_of_products(length):
    def product(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ jnp.ones((16, 16))), None), x, None, length=length)[0]

    assert read(product, X).flops == length * 2 * 8 * 16 * 16


def test_operations_of_batched_and_differentiated_products():
    shapes = jax.ShapeDtypeStruct((3, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)

    def product(x, w):
        return jnp.sum(jnp.tanh(jnp.einsum("bij,bjk->bik", x, w)))

    once = 2 * 3 * 8 * 4 * 5
    assert read(product, *shapes).flops == once
    assert read(jax.grad(product, argnums=(0, 1)), *shapes).flops == 3 * once


def test_a_loop_without_a_count_is_named():
    def converge(x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 7, lambda c: c + jnp.tanh(c), x)

    assert len(read(converge, X).uncounted_loops) == 1


def test_the_largest_buffer_leads():
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 64), (64, 256)))
    got = read(lambda x, w: (jnp.sort(x), jnp.sort(w)), *shapes)
    assert got.buffers[0].bytes == 64 * 256 * 4
    assert [b.bytes for b in got.buffers] == sorted((b.bytes for b in got.buffers), reverse=True)


def test_no_program_is_an_error():
    with pytest.raises(ValueError, match="compiled.as_text"):
        read_hlo("HloModule nothing", AXES)


def groups(text, devices=8):
    return sorted(sorted(group) for group in parse_groups(f"channel_id=1, {text}, x=1", devices).tolist())


ACROSS, ALONG = [[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ACROSS),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ACROSS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ACROSS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}", ACROSS),
        ("replica_groups=mesh['b'=4,'a'=2], device_ids=([2,4]T(1,0)) {'a'}", ACROSS),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ALONG),
        ("replica_groups=[2,4]<=[8]", ALONG),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ALONG),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ALONG),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,1,2,3,4,5,6,7) {'b'}", ALONG),
        ("replica_groups={}", [list(range(8))]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
        ("source_target_pairs={{0,4},{1,5},{2,6},{3,7}}", ACROSS),
    ],
)
def test_every_way_to_write_groups(text, expected):
    assert groups(text) == expected


def test_axes_of_groups():
    assert group_axes(np.array(ACROSS), AXES) == ("fsdp",)
    assert group_axes(np.array(ALONG), AXES) == ("tensor",)
    assert group_axes(np.arange(8)[:, None], AXES) == ()
    assert group_axes(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), AXES) == ("tensor",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[4,4]{1,0}", 64),
        ("bf16[3]{0}", 6),
        ("(s32[], pred[8]{0}, /*index=2*/f8e4m3fn[16]{0})", 4 + 8 + 16),
        ("u4[3]{0:E(4)}", 2),
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("token[]", 0),
    ],
)
def test_bytes_of_types(text, expected):
    assert type_bytes(text) == expected


def test_an_instruction_whose_type_holds_parentheses():
    line = (
        "  ROOT %y.1 = (bf16[8]{0:T(8)(2,1)}, u32[]{:S(2)}) collective-permute-start(%x.1), "
        'source_target_pairs={{0,1}}, metadata={op_name="jit(f)/a(b"}'
    )
    got = parse_instruction(line)
    assert (got.name, got.opcode, got.operands) == ("y.1", "collective-permute-start", ("x.1",))
    assert got.source == "jit(f)/a(b"


ASYNCHRONOUS = """HloModule m, num_partitions=8

%wrapped (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[4], b: bf16[8]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %b = bf16[8]{0} parameter(1)
  %s = ((f32[4], bf16[8]), (f32[16], bf16[32])) all-gather-start(%a, %b), replica_groups=[2,4]<=[8]
  %d = (f32[16]{0}, bf16[32]{0}) all-gather-done(%s)
  %g = f32[16]{0} get-tuple-element(%d), index=0
  %t = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%g), calls=%wrapped
  %u = f32[4]{0} async-done(%t)
  %v = ((f32[16]{0}), f32[4]{0}) call-start(%g), async_execution_thread="sparsecore", to_apply=%wrapped
  %w = f32[4]{0} call-done(%v)
  ROOT %r = f32[16]{0} all-gather(%u), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, dimensions={0}
}
"""


def test_a_start_and_its_done_are_one_and_combined_operands_add():
    got = read_hlo(ASYNCHRONOUS, AXES)
    assert got.totals() == {
        ("all-gather", ("tensor",)): (1, 16 * 4 + 32 * 2),
        ("reduce-scatter", ("tensor",)): (2, 2 * 16 * 4),
    }
    assert len(got.collectives) == 4  # the group of one is there, and moves nothing


GEMM = """HloModule m

ENTRY %main (a: bf16[32,64], b: bf16[64,16]) -> bf16[32,16] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,16]{1,0} parameter(1)
  %c = (bf16[32,16]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"beta":0}}
  ROOT %d = bf16[32,16]{1,0} get-tuple-element(%c), index=0
}
"""


def test_a_product_by_library_call():
    got = read_hlo(GEMM, AXES)
    assert got.flops == 2 * 32 * 16 * 64
    assert got.custom_calls == {"__cublas$lt$matmul": 1}


@pytest.mark.parametrize("unroll", [1, 6])
def test_a_loop_counts_as_its_layers_unrolled(unroll):
    def layers(x, stacked):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)), None

        return jax.lax.scan(layer, x, stacked, unroll=unroll)[0]

    specs = (SPLIT, P(None, "fsdp"))
    mapped = jax.shard_map(layers, mesh=mesh(), in_specs=specs, out_specs=SPLIT, check_vma=False)
    got = read(mapped, X, jax.ShapeDtypeStruct((6, 4, 4), jnp.float32))
    assert got.flops == 6 * 2 * 4 * 4 * 4
    assert sum(size for _, size in got.totals().values()) == 6 * 4 * 4 * 4
