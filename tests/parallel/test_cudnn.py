"""cuDNN is told of exactly the documents that masks mean, and what it is not told of rightly is refused.

There is no GPU here. A stand-in for the kernel does what cuDNN does with lengths and offsets, on flat memory,
and leaves everything else undefined; all around it is the code that runs on GPUs.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import attention_cudnn as cudnn
from kernels import backends
from kernels.attention import Masks, Scores, attention_mask, reference_attention
from parallel.attention.context import context_attention
from parallel.attention.sharded import sharded_cudnn
from parallel.axes import Layout
from parallel.config import MESH_AXES
from planner.described_devices import compiler_options, described_devices
from planner.hlo.program import read_hlo
from tests.parallel import context_cases as cases

ROWS = {
    "two documents": [[20, 12], [32]],
    "padding after": [[5, 1, 17], []],
    "single tokens": [[1] * 6 + [26], [31, 1]],
}
LENGTH, DOCUMENTS = 32, 7


def tokens_told(lengths, offsets, stride, tokens):
    """[places, tokens]: which tokens of flat memory each place of the lists holds, and their index in it."""
    starts = offsets.reshape(-1)[: lengths.size] // stride
    index = jnp.arange(tokens) - starts[:, None]
    return (index >= 0) & (index < lengths.reshape(-1)[:, None]), index


def kernel_attention(q, k, v, q_lengths, kv_lengths, q_offsets, kv_offsets, scale, window):
    """Attention of every document in the lists; nan, as memory that nobody wrote, for all other tokens."""
    rows, length, heads, size = q.shape
    flat = [x.reshape(rows * length, -1, size) for x in (q, k, v)]
    held_q, index_q = tokens_told(q_lengths, q_offsets, heads * size, rows * length)
    held_k, index_k = tokens_told(kv_lengths, kv_offsets, k.shape[2] * size, rows * length)
    behind = index_q[:, :, None] - index_k[:, None, :]
    seen = held_q[:, :, None] & held_k[:, None, :] & (behind >= 0)
    mask = jnp.any(seen & (behind < (window or length)), axis=0)
    keys, values = (jnp.repeat(x, heads // k.shape[2], axis=1) for x in flat[1:])
    scores = jnp.einsum("tnh,snh->nts", flat[0], keys) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    out = jnp.einsum("nts,snh->tnh", weights, values)
    return jnp.where(jnp.any(held_q, axis=0)[:, None, None], out, jnp.nan).reshape(q.shape)


def kernel_forward(q, k, v, *rest):
    places = max(rest[0].size, q.shape[0])
    return kernel_attention(q, k, v, *rest), jnp.zeros((places, q.shape[2], q.shape[1]), jnp.float32)


def kernel_backward(q, k, v, *rest):
    *told, stats, out, cotangent, scale, window = rest
    _, pull = jax.vjp(lambda *qkv: kernel_attention(*qkv, *told, scale, window), q, k, v)
    grads = pull(cotangent)
    held, _ = tokens_told(told[0], told[2], q.shape[2] * q.shape[3], q.shape[0] * q.shape[1])
    written = jnp.any(held, axis=0).reshape(*q.shape[:2], 1, 1)
    return tuple(jnp.where(written, g, jnp.nan) for g in grads)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(cudnn, "fused_forward", kernel_forward)
    monkeypatch.setattr(cudnn, "fused_backward", kernel_backward)
    monkeypatch.setattr(cudnn, "check_devices", lambda devices, max_documents: None)
    entry = replace(backends.BACKENDS["cudnn"], dtypes=("float32",))
    monkeypatch.setitem(backends.BACKENDS, "cudnn", entry)


def make_inputs(rows, kv_heads, heads=8, size=8):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [heads, kv_heads, kv_heads, heads]
    return [jax.random.normal(key, (rows, LENGTH, n, size)) for key, n in zip(keys, shapes, strict=True)]


def one_device():
    return cases.layout_of()


def masks_of(positions, segments):
    return Masks.of_rows(jnp.asarray(positions), jnp.asarray(segments))


def both(attention, inputs, positions, segments, **options):
    """Output and gradients of `attention`, and those of the reference."""
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    got = jax.jit(lambda *a: cases.value_and_grads(attention, *a, positions, segments, **options))(*inputs)
    return got, cases.value_and_grads(reference_attention, *inputs, positions, segments, **options)


def close(got, expected):
    return max(cases.errors(got, expected)) < 1e-5


def cut(positions, segments, start):
    """The first document of every row goes on where it was cut: its first position is `start`."""
    return np.where(segments == 1, positions + start, positions)


@pytest.mark.parametrize(("kv_heads", "window"), [(8, None), (2, 6)])
@pytest.mark.parametrize("rows", list(ROWS))
def test_equals_the_reference(kernel, rows, kv_heads, window):
    positions, segments = cases.make_masks(ROWS[rows], LENGTH)
    attention = sharded_cudnn(one_device(), DOCUMENTS)
    inputs = make_inputs(2, kv_heads)
    assert close(*both(attention, inputs, cut(positions, segments, 9), segments, window=window))


@pytest.mark.parametrize("sizes", [{"tensor": 4, "fsdp": 2}, {"tensor": 8}, {"data": 2, "pipeline": 2}])
def test_equals_the_reference_on_a_mesh(kernel, sizes):
    positions, segments = cases.make_masks([[20, 12], [5, 1, 17], [], [32]], LENGTH)
    attention = sharded_cudnn(cases.layout_of(**sizes), DOCUMENTS)
    # tensor=8 over 2 K/V heads: each is repeated.
    assert close(*both(attention, make_inputs(4, 2), positions, segments))


def test_rows_that_are_not_packed_need_no_offsets(kernel, monkeypatch):
    def told(q, k, v, q_lengths, kv_lengths, q_offsets, kv_offsets, scale, window):
        assert q_lengths.shape == (2,) and q_offsets.size == kv_offsets.size == 0
        masks = masks_of(jnp.arange(LENGTH)[None], 1 * (jnp.arange(LENGTH) < q_lengths[:, None]))
        return reference_attention(q, k, v, masks, Scores(scale=scale)), jnp.zeros((2, q.shape[2], LENGTH))

    monkeypatch.setattr(cudnn, "fused_forward", told)
    positions, segments = cases.make_masks([[20], [32]], LENGTH)
    attention = sharded_cudnn(one_device(), 1)
    q, k, v, _ = make_inputs(2, 2)
    masks = masks_of(positions, segments)
    expected = reference_attention(q, k, v, masks, Scores(scale=0.3))
    assert close([attention(q, k, v, masks, Scores(scale=0.3))], [expected])


@pytest.mark.parametrize("axis", ["pipeline", "replica"])
def test_vmapped_over_a_mesh_axis(kernel, axis):
    """As a pipeline's stages and local SGD's replicas call it, backward and recomputed too."""
    layout = cases.layout_of(**{axis: 2, "fsdp": 2, "tensor": 2})
    layout = Layout(layout.mesh, {**layout.rules, "batch": ("data", "fsdp")})
    attention = sharded_cudnn(layout, DOCUMENTS)
    positions, segments = cases.make_masks([[20, 12], [5, 1, 17]], LENGTH)
    other = cases.make_masks([[32], [3, 3, 3, 20]], LENGTH)
    inputs = [jnp.stack([x, x + 1]) for x in make_inputs(2, 2)]
    masks = [np.stack(pair) for pair in zip((positions, segments), other, strict=True)]

    def recomputed(q, k, v, masks, scores):
        return jax.checkpoint(lambda *qkv: attention(*qkv, masks, scores))(q, k, v)

    stages = jax.vmap(lambda *args: cases.value_and_grads(recomputed, *args), spmd_axis_name=axis)
    got = jax.jit(stages)(*inputs, *masks)
    expected = [
        cases.value_and_grads(reference_attention, *(x[i] for x in inputs), *(m[i] for m in masks))
        for i in range(2)
    ]
    assert close(got, [np.stack(pair) for pair in zip(*expected, strict=True)])


def test_inside_ulysses(kernel):
    """The local kernel under context parallelism that hands it whole rows."""
    positions, segments = cases.make_masks([[20, 12], [5, 1, 17]], LENGTH)
    layout = cases.layout_of(context=2, tensor=2)
    attention = context_attention(
        "ulysses", layout, partial(cudnn.cudnn_attention, max_documents=DOCUMENTS), zigzag=True
    )
    assert close(*both(attention, make_inputs(2, 2), positions, segments))


def mask_told(documents, rows):
    """[B, T, T]: the mask that starts and lengths mean."""
    document, index = np.zeros((2, rows * LENGTH), np.int32)
    for number, (start, length) in enumerate(zip(documents.starts, documents.lengths, strict=True), 1):
        held = slice(int(start), int(start + length))
        assert not document[held].any() and held.start // LENGTH == max(held.stop - 1, held.start) // LENGTH
        document[held], index[held] = number, np.arange(length)
    document, index = document.reshape(rows, 1, LENGTH), index.reshape(rows, 1, LENGTH)
    same = (document == document.swapaxes(1, 2)) & (document > 0)
    return same & (index.swapaxes(1, 2) >= index)


def random_rows(rng, rows):
    """Documents of any length, cut anywhere; about one row in four ends in padding."""
    positions, segments = np.zeros((2, rows, LENGTH), np.int32)
    for row in range(rows):
        bounds = np.flatnonzero(rng.random(LENGTH) < 0.15)
        pieces = np.split(np.arange(LENGTH), bounds)
        for number, piece in enumerate((p for p in pieces if len(p)), 1):
            positions[row, piece] = np.arange(len(piece)) + rng.integers(0, 50)
            segments[row, piece] = number
        if rng.random() < 0.25:
            segments[row, rng.integers(0, LENGTH) :] = 0
    return positions, segments


@pytest.mark.parametrize("seed", range(4))
def test_where_exact_the_lists_say_what_the_mask_says(seed):
    rows = 40
    positions, segments = random_rows(np.random.default_rng(seed), rows)
    documents = cudnn.find_documents(jnp.asarray(positions), jnp.asarray(segments), DOCUMENTS)
    exact = np.asarray(documents.exact)
    mask = np.asarray(attention_mask(Masks.of_rows(positions, segments), None))
    np.testing.assert_array_equal(mask_told(documents, rows)[exact], mask[exact])
    counts = segments.max(axis=1)
    assert (exact <= (counts <= DOCUMENTS)).all()
    assert 0 < exact.sum() and (counts > DOCUMENTS).any()  # both kinds of row were met


def test_offsets_count_elements_of_their_own_array():
    positions, segments = cases.make_masks([[20, 12], [5, 27]], LENGTH)
    documents = cudnn.find_documents(jnp.asarray(positions), jnp.asarray(segments), 3)
    q, k = jnp.zeros((2, LENGTH, 8, 16)), jnp.zeros((2, LENGTH, 2, 16))
    lengths, _, q_offsets, kv_offsets = documents.lengths_and_offsets(q, k)
    assert lengths.shape == (2, 3) and q_offsets.shape == kv_offsets.shape == (2, 4)
    np.testing.assert_array_equal(lengths.ravel(), [20, 12, 5, 27, 0, 0])
    starts = np.array([0, 20, 32, 37, 64, 64, 64, 64])
    np.testing.assert_array_equal(q_offsets.ravel(), starts * 8 * 16)
    np.testing.assert_array_equal(kv_offsets.ravel(), starts * 2 * 16)


NOT_IN_ORDER = {
    "too many documents": ([1] * 8 + [2] * 8 + [3] * 8 + [4] * 8, None),
    "a document in two places": ([1] * 8 + [2] * 16 + [1] * 8, None),
    "positions that jump": ([1] * 32, [*range(8), *range(24, 32), *range(8, 24)]),
    "a gap of padding": ([1] * 8 + [0] * 4 + [1] * 20, list(range(32))),
}


@pytest.mark.parametrize("what", list(NOT_IN_ORDER))
def test_a_row_that_cannot_be_told_is_nan_and_its_neighbour_is_not(kernel, what):
    segments, positions = NOT_IN_ORDER[what]
    fine = cases.make_masks([[20, 12]], LENGTH)
    segments = np.concatenate([np.array([segments], np.int32), fine[1]])
    positions = np.concatenate([np.array([positions or np.arange(32)], np.int32), fine[0]])
    attention = sharded_cudnn(one_device(), 3)
    got, expected = both(attention, make_inputs(2, 2), positions, segments)
    for array, right in zip(got, expected, strict=True):
        assert np.isnan(array[0][segments[0] > 0]).all()
        np.testing.assert_allclose(array[1], right[1], atol=1e-5)


def test_keys_of_another_row_are_nan(kernel):
    positions, segments = cases.make_masks([[20, 12]], LENGTH)
    q, k, v, _ = make_inputs(1, 2)
    masks = masks_of(positions, segments)._replace(kv_segments=jnp.asarray(segments[:, ::-1]))
    out = sharded_cudnn(one_device(), 3)(q, k, v, masks, Scores(scale=0.3))
    assert np.isnan(out).all()


GOOD = {"head_dim": 128, "value_dim": 128, "softcap": None, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 100, "value_dim": 100}, ["model.head_dim", "not 100", "use 96 or 104", "chunked"]),
        ({"head_dim": 512, "value_dim": 512}, ["at most 256", "not 512", "use 256,", "chunked"]),
        ({"head_dim": 4, "value_dim": 4}, ["not 4", "use 8,"]),
        ({"value_dim": 64}, ["values as wide as keys", "64 and 128", "use training.attention=chunked"]),
        ({"softcap": 50.0}, ["model.attention_softcap=50.0", "attention_softcap=null"]),
        ({"dtype": "float32"}, ["not float32", "training.precision=bfloat16"]),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change, words):
    problem = backends.problem("cudnn", backends.Wanted(**{**GOOD, **change}))
    assert all(word in problem for word in ["training.attention=cudnn", *words]), problem
    assert "\n" not in problem


def test_what_it_can_do_is_not():
    assert backends.problem("cudnn", backends.Wanted(**GOOD)) is None


def test_the_problem_is_raised_where_it_is_called(kernel):
    positions, segments = cases.make_masks([[20, 12]], LENGTH)
    masks = masks_of(positions, segments)
    attention = sharded_cudnn(one_device(), 3)
    q, k, v, _ = make_inputs(1, 2)
    with pytest.raises(ValueError, match="attention_softcap=5"):
        attention(q, k, v, masks, Scores(scale=1.0, softcap=5.0))
    with pytest.raises(ValueError, match="not 32 and 16 positions; use context.attention=ulysses"):
        attention(q, k[:, :16], v[:, :16], masks, Scores(scale=1.0))


def fake_device(platform, capability, kind):
    return SimpleNamespace(platform=platform, compute_capability=capability, device_kind=kind)


def test_devices_without_the_kernel_are_refused():
    with pytest.raises(ValueError, match="needs NVIDIA GPUs, not cpu; use training.attention=chunked"):
        sharded_cudnn(one_device(), 3)
    ampere = [fake_device("gpu", "8.0", "A100")]
    with pytest.raises(ValueError, match=r"from compute capability 9.0 .* A100 has 8.0"):
        cudnn.check_devices(ampere, 2)
    cudnn.check_devices(ampere, 1)
    cudnn.check_devices([fake_device("gpu", "10.0", "B200")], 64)


def test_batches_with_too_many_documents_are_refused_on_the_host():
    segments = cases.make_masks([[20, 12], [5, 1, 1, 1, 17]], LENGTH)[1]
    cudnn.check_documents(segments, 5)
    with pytest.raises(ValueError, match=r"holds 5 documents.*max_documents=4; use training.max_documents=8"):
        cudnn.check_documents(segments, 4)


def test_rows_in_parts_are_refused(kernel):
    with pytest.raises(ValueError, match=r"whole rows.*context.attention=ulysses or mesh.context=1"):
        sharded_cudnn(cases.layout_of(context=2), 3)


def hopper(count):
    try:
        return described_devices("h200", count)
    except ImportError as error:
        pytest.skip(f"NOT COMPILED FOR A GPU: {error}")


@pytest.mark.parametrize("window", [None, 128])
def test_compiles_for_a_described_gpu_under_a_pipeline(window):
    sizes = {**dict.fromkeys(MESH_AXES, 1), "pipeline": 2, "fsdp": 2, "tensor": 2}
    devices = np.array(hopper(8)).reshape(tuple(sizes.values()))
    layout = Layout(
        Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)), cases.layout_of().rules
    )
    attention = sharded_cudnn(layout, 8)

    def stage(q, k, v, positions, segments):
        def loss(*qkv):
            masks = masks_of(positions, segments)
            return jnp.sum(attention(*qkv, masks, Scores(scale=0.1, window=window)).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    def shape(*sizes, dtype=jnp.bfloat16):
        sharding = NamedSharding(layout.mesh, PartitionSpec("pipeline", "fsdp"))
        return jax.ShapeDtypeStruct((2, 4, 512, *sizes), dtype, sharding=sharding)

    mapped = jax.jit(jax.vmap(stage, spmd_axis_name="pipeline"))
    masks = shape(dtype=jnp.int32), shape(dtype=jnp.int32)
    lowered = mapped.lower(shape(8, 64), shape(2, 64), shape(2, 64), *masks)
    text = lowered.compile(compiler_options(list(devices.flat))).as_text()
    calls = read_hlo(text, sizes).custom_calls
    assert calls["__cudnn$fmhaSoftmax"] == calls["__cudnn$fmhaSoftmaxBackward"] == 1
    assert f'"sliding_window_length": {window or 0}' in text and '"mask_type": "PADDING_CAUSAL"' in text
