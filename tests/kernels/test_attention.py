import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Masks, Scores, chunked_attention, reference_attention, xla_attention
from kernels.attention_cpu import fused_attention
from tests.models.decoders import loop_attention, make_batch, slope

BACKENDS = {
    "reference": reference_attention,
    "chunked": partial(chunked_attention, block=4),
    "fused": partial(fused_attention, block=4),
    "fused_whole": fused_attention,
    "xla": xla_attention,
}
FEATURES = {
    "causal": dict(kv_heads=4),
    "gqa": dict(kv_heads=2),
    "one_kv_head": dict(kv_heads=1),
    "window": dict(kv_heads=4, window=3),
    "softcap": dict(kv_heads=4, softcap=1.5),
    "packing": dict(kv_heads=4, documents=[[3, 5], [4, 1, 2]]),
    "all": dict(kv_heads=2, window=2, softcap=1.5, documents=[[3, 5], [4, 1, 2]]),
    "sinks": dict(kv_heads=2, window=3, sinks=(0.5, -1.0, 2.0, 9.0), documents=[[3, 5], [4, 1, 2]]),
}


def make_inputs(kv_heads: int, documents: list, length: int = 8, heads: int = 4, size: int = 4):
    keys = jax.random.split(jax.random.key(1), 4)
    B = len(documents)
    q = 2 * jax.random.normal(keys[0], (B, length, heads, size))
    k, v = (jax.random.normal(key, (B, length, kv_heads, size)) for key in keys[1:3])
    return (q, k, v), jax.random.normal(keys[3], q.shape), make_batch(documents, length)


def masks(batch: dict) -> Masks:
    return Masks.of_rows(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))


# What xla cannot do, it refuses.
PAIRS = [(b, f) for b in BACKENDS for f in FEATURES if b != "xla" or f not in ("softcap", "all", "sinks")]


def test_scores_that_xla_cannot_bound_are_refused():
    (q, k, v), _, batch = make_inputs(2, [[8]])
    with pytest.raises(ValueError, match=r"training.attention=xla cannot bound scores .* use training.att"):
        xla_attention(q, k, v, masks(batch), Scores(softcap=5.0, scale=0.5))
    with pytest.raises(
        ValueError, match=r"training.attention=xla has no attention sinks .* use training.att"
    ):
        xla_attention(q, k, v, masks(batch), Scores(scale=0.5), jnp.zeros(4))


@pytest.mark.parametrize(("backend", "feature"), PAIRS)
def test_attention_equals_loops_in_forward_and_gradient(backend, feature):
    values = {"documents": [[8], [8]], "window": None, "softcap": None, "sinks": None} | FEATURES[feature]
    inputs, cotangent, batch = make_inputs(values["kv_heads"], values["documents"])
    if values["sinks"]:
        inputs = (*inputs, jnp.asarray(values["sinks"]))
    window, softcap = values["window"], values["softcap"]

    @partial(jax.grad, argnums=tuple(range(len(inputs))), has_aux=True)
    def run(q, k, v, *sinks):
        scores = Scores(window=window, softcap=softcap, scale=0.5)
        out = BACKENDS[backend](q, k, v, masks(batch), scores, *sinks)
        return jnp.vdot(out, cotangent), out

    def loops(q, k, v, *sinks):
        return loop_attention(q, k, v, batch, window, softcap, 0.5, *sinks)

    grads, out = jax.jit(run)(*inputs)
    exact = [np.asarray(x, np.float64) for x in inputs]
    np.testing.assert_allclose(out, loops(*exact), atol=2e-6)
    for place, grad in enumerate(grads):
        direction, expected = slope(lambda *x: np.vdot(loops(*x), cotangent), exact, place)
        np.testing.assert_allclose(np.vdot(grad, direction), expected, atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gives_zeros_and_finite_gradients(backend):
    (q, k, v), cotangent, batch = make_inputs(2, [[3], []])

    def run(q):
        out = BACKENDS[backend](q, k, v, masks(batch), Scores(scale=0.5))
        return jnp.vdot(out, cotangent), out

    grad, out = jax.jit(jax.grad(run, has_aux=True))(q)
    assert not np.any(out[batch["segment_ids"] == 0])
    assert np.all(np.isfinite(grad))


def shapes_in(jaxpr) -> set:
    """Shapes of every intermediate array, also inside loops and checkpoints."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(getattr(var.aval, "shape", ())) for var in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


@pytest.mark.parametrize(
    ("backend", "quadratic"), [("reference", True), ("chunked", False), ("fused", False)]
)
def test_only_the_reference_holds_a_square_buffer(backend, quadratic):
    length = 24
    (q, k, v), _, batch = make_inputs(2, [[length]], length)

    def run(q, k, v):
        return BACKENDS[backend](q, k, v, masks(batch), Scores(scale=0.5)).sum()

    shapes = shapes_in(jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)))(q, k, v).jaxpr)
    assert any(shape.count(length) >= 2 for shape in shapes) == quadratic


@pytest.mark.parametrize("attention", [chunked_attention, fused_attention])
def test_blocks_need_not_divide_the_length(attention):
    (q, k, v), _, batch = make_inputs(2, [[7], [3, 4]], 7)
    got = jax.jit(partial(attention, scores=Scores(scale=0.5), block=4))(q, k, v, masks(batch))
    expected = loop_attention(q, k, v, batch, None, None, 0.5)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_fused_attention_refuses_rows_out_of_order_by_nan():
    (q, k, v), _, batch = make_inputs(2, [[8], [3, 5]])
    order = np.array([4, 5, 6, 7, 0, 1, 2, 3])
    batch["positions"][0] = order  # a query sees keys that lie behind it
    out = fused_attention(q, k, v, masks(batch), Scores(scale=0.5), block=4)
    assert np.all(np.isnan(out[0])) and np.all(np.isfinite(out[1]))


def test_fused_attention_refuses_keys_of_another_row():
    (q, k, v), _, batch = make_inputs(2, [[8], [3, 5]])
    with pytest.raises(ValueError, match="not 4 and 8 positions; use training.attention=chunked"):
        fused_attention(q[:, :4], k, v, masks(batch), Scores(scale=0.5))


def test_fused_attention_in_bfloat16_rounds_factors_alone():
    (q, k, v), cotangent, batch = make_inputs(2, [[8], [3, 5]])

    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def run(q, k, v, dtype):
        out = fused_attention(q, k, v, masks(batch), Scores(scale=0.5), dtype=dtype)
        return jnp.vdot(out, cotangent), out

    rough, exact = run(q, k, v, jnp.bfloat16), run(q, k, v, None)
    for x, y in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert x.dtype == jnp.float32
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert 1e-4 < error < 2e-2


def test_masks_of_blocks_are_not_kept_for_all_layers():
    """They hang on positions alone, so that JAX would move them out of a loop over layers, T² of them."""
    x, positions = jnp.ones((1, 64, 4, 8)), jnp.arange(64)[None]
    rows = Masks.of_rows(positions, positions)

    def loss(x):
        def layer(x, scale):
            x = x * scale
            return x + chunked_attention(x, x, x, rows, Scores(scale=1.0), block=16), None

        return jnp.sum(jax.lax.scan(layer, x, jnp.ones(3))[0])

    program = str(jax.make_jaxpr(jax.grad(loss))(x))
    masks = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"bool\[([\d,]+)\]", program)}
    assert max(map(math.prod, masks)) == 4 * 16 * 64  # of one block, all heads
