"""Splash attention equals the reference in forward and gradient, wherever rows and heads lie.

Its kernels run here in Pallas' interpreter on a CPU; where libtpu is installed they are compiled for TPUs.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention_splash as splash
from kernels.attention import Masks, Scores, attention_mask, reference_attention
from parallel.attention.context import (
    context_attention,
    permute_batch,
    splash_of_parts,
    text_order,
    zigzag_order,
)
from parallel.attention.sharded import sharded_splash
from parallel.axes import Layout
from tests.parallel import context_cases as cases

LENGTH = 256
DOCUMENTS = [[200, 56], [40, 1, 150]]  # the second row ends in padding


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(splash, "BLOCK", 128)


def make_inputs(kv_heads, heads=4, value_size=8, length=LENGTH, rows=2):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(heads, 8), (kv_heads, 8), (kv_heads, value_size), (heads, value_size)]
    return [2 * jax.random.normal(k, (rows, length, *s)) for k, s in zip(keys, sizes, strict=True)]


def both(attention, inputs, positions, segments, **options):
    """Output and gradients of `attention`, and those of the reference."""
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)

    def run(kernel):
        return jax.jit(lambda *a: cases.value_and_grads(kernel, *a, positions, segments, **options))(*inputs)

    return run(attention), run(reference_attention)


def close(got, expected):
    return max(cases.errors(got, expected)) < 5e-6


def test_equals_the_reference_with_every_feature():
    positions, segments = cases.make_masks(DOCUMENTS, LENGTH)
    positions = np.where(segments == 1, positions + 9, positions)  # a document that was cut goes on
    attention = sharded_splash(cases.layout_of())
    inputs = make_inputs(2, value_size=16)
    got, expected = both(attention, inputs, positions, segments, window=100, softcap=5.0)
    assert close(got, expected)
    assert not np.any(got[0][segments == 0])


def test_vmapped_over_stages_on_a_mesh():
    """As a pipeline's stages call it; tensor splits the one K/V head, which is repeated."""
    layout = cases.layout_of(pipeline=2, fsdp=2, tensor=2)
    attention = sharded_splash(Layout(layout.mesh, {**layout.rules, "batch": ("data", "fsdp")}))
    masks = [np.stack(x) for x in zip(cases.make_masks(DOCUMENTS, LENGTH), make_other(), strict=True)]
    inputs = [jnp.stack([x, x + 1]) for x in make_inputs(1, heads=2)]
    stages = jax.vmap(lambda *a: cases.value_and_grads(attention, *a), spmd_axis_name="pipeline")
    got = jax.jit(stages)(*inputs, *masks)
    expected = [
        cases.value_and_grads(reference_attention, *(x[i] for x in inputs), *(m[i] for m in masks))
        for i in range(2)
    ]
    assert close(got, [np.stack(pair) for pair in zip(*expected, strict=True)])


def make_other():
    return cases.make_masks([[256], [3, 253]], LENGTH)


@pytest.mark.parametrize(("kind", "zigzag", "window"), [("ulysses", True, None), ("allgather", True, 100)])
def test_inside_context_parallelism(kind, zigzag, window):
    """As the local kernel; for allgather each device holds an early and a late part of the queries."""
    length = 512
    positions, segments = cases.make_masks([[400, 112], [140, 1, 350]], length)
    layout = cases.layout_of(context=2)
    local = splash_of_parts(2, zigzag=zigzag) if kind == "allgather" else splash.splash_attention
    attention = context_attention(kind, layout, local, zigzag=zigzag)
    inputs = make_inputs(1, heads=2, length=length)
    if kind == "allgather":
        order = zigzag_order(length, 2)
        inputs, positions, segments = [x[:, order] for x in inputs], positions[:, order], segments[:, order]
    assert close(*both(attention, inputs, positions, segments, window=window))


def test_keys_return_to_the_order_of_the_text():
    tokens = jnp.arange(48).reshape(2, 24)
    for size in (2, 3, 4):
        permuted = permute_batch({"tokens": tokens}, size)["tokens"]
        np.testing.assert_array_equal(text_order(permuted[..., None], size)[..., 0], tokens)


NOT_IN_ORDER = {
    "a document in two places": np.repeat([1, 2, 1, 3], 64),
    "a gap of padding": np.repeat([1, 0, 1, 2], 64),
}


def test_a_row_in_another_order_is_nan_and_its_neighbour_is_not():
    segments = np.stack([*NOT_IN_ORDER.values(), np.repeat([1, 2], 128)]).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape)
    q, k, v, _ = make_inputs(1, heads=1, rows=3)
    masks, scores = Masks.of_rows(positions, segments), Scores(scale=0.3)
    out = jax.jit(lambda *qkv: splash.splash_attention(*qkv, masks, scores))(q, k, v)
    assert np.isnan(out[:2]).all() and np.isfinite(out[2]).all()


@pytest.mark.parametrize("window", [None, 1, 60, 300])
@pytest.mark.parametrize(("parts", "zigzag"), [(1, False), (2, False), (2, True)])
def test_every_block_with_something_to_see_is_visited_once_and_in_both_directions(parts, zigzag, window):
    keys = 1024
    places = np.arange(keys, dtype=np.int32)
    find = partial(splash.blocks_that_meet, keys=keys, rows=128, columns=128, window=window)
    find = find if parts == 1 else jax.jit(find)  # of a part, the places depend on the device
    for mine in (zigzag_order(keys, parts) if zigzag else places).reshape(parts, -1):
        seen = splash.seen_by(window)(mine[:, None], places[None]).reshape(-1, 128, keys // 128, 128)
        seen = seen.any((1, 3))
        by_queries, by_keys = find(mine)
        for info, met in ((by_queries, seen), (jax.tree.map(np.transpose, by_keys), seen.T)):
            visits, within = np.asarray(info.data_next), np.asarray(info.block_mask)
            visits, within = visits.reshape(len(met), -1), within.reshape(len(met), -1)
            found = [sorted(row[ok > 0]) for row, ok in zip(visits, within, strict=True)]
            assert found == [list(np.flatnonzero(row)) for row in met]


def test_the_mask_is_that_of_attention():
    places = jnp.arange(64)[None]
    ones = jnp.ones_like(places)
    for window in (None, 1, 7):
        expected = attention_mask(Masks.of_rows(places, ones), window)[0]
        np.testing.assert_array_equal(splash.seen_by(window)(places.T, places), expected)


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"whole rows.*context.attention=ulysses or mesh.context=1"):
        sharded_splash(cases.layout_of(context=2))
    q, k, v, _ = make_inputs(1)
    one = jnp.ones((2, LENGTH), jnp.int32)
    masks, scores = Masks.of_rows(one, one), Scores(scale=1.0)
    with pytest.raises(ValueError, match=r"queries and keys of one row, not 256 and 128 positions"):
        splash.splash_attention(q, k[:, :128], v[:, :128], masks, scores)
    with pytest.raises(ValueError, match="in multiples of 128, not data.seq_len=100; use data.seq_len=128"):
        splash.splash_attention(q[:, :100], k[:, :100], v[:, :100], masks, scores)
    monkeypatch.setattr(splash, "INTERPRET", False)
    with pytest.raises(ValueError, match="splash needs TPUs, not cpu; use training.attention=chunked"):
        sharded_splash(SimpleNamespace(mesh=SimpleNamespace(devices=np.array(jax.devices()[:1]))))
