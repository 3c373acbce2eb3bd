"""The gated delta rule against its recurrence in float64 loops, packed and decoded too."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import DeltaConfig
from models.mixers.gated_delta import EPS, delta_rule, short_convolution, unit_triangular_inverse
from models.ops import Ops
from models.transformer import build_model
from tests.models.decoders import family, lively, make_batch

DELTA = DeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6, chunk=8)
HYBRID = {
    "num_layers": 4,
    "mixer_pattern": ["gated_delta", "gated_delta", "gated_delta", "attention"],
    "delta": DELTA,
    "output_gate": True,
    "rope_fraction": 0.5,
    "qk_norm": True,
    "norm_unit_offset": True,
}


def loops(q, k, v, beta, g, segments, states=None):
    """The recurrence of the module's docstring, one token and one head at a time."""
    rows, length, keys, size = q.shape
    heads = v.shape[2]
    out = np.zeros(v.shape)
    final = np.zeros((rows, heads, size, v.shape[3]))
    for b in range(rows):
        for n in range(heads):
            state = np.zeros(final.shape[2:]) if states is None else states[b, n]
            for t in range(length):
                if t and segments[b, t] != segments[b, t - 1]:
                    state = np.zeros_like(state)
                query, key = (x[b, t, n * keys // heads] for x in (q, k))
                query, key = (x / np.sqrt(x @ x + EPS) for x in (query, key))
                state = np.exp(g[b, t, n]) * state
                state = state + np.outer(key, beta[b, t, n] * (v[b, t, n] - state.T @ key))
                out[b, t, n] = state.T @ query / np.sqrt(size)
            final[b, n] = state
    return out, final


def inputs(length, seed=0, alike=0.0):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 2, length, 2, 8))
    k = k * (1 - alike) + alike
    v = rng.normal(size=(2, length, 4, 6))
    beta = 1 / (1 + np.exp(-rng.normal(size=(2, length, 4)) - 3 * alike))
    g = -np.exp(rng.normal(size=(2, length, 4)) * 2 - 2) * (1 - alike)
    cuts = np.sort(rng.integers(1, length, (2, 2)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    return [q, k, v, beta, g], segments.astype(np.int32)


def rule(chunk, arrays, segments, state=None):
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    return delta_rule(*arrays, jnp.asarray(segments), state, chunk=chunk)


@pytest.mark.parametrize("alike", [0.0, 1.0], ids=["any keys", "equal keys that never fade"])
@pytest.mark.parametrize(("length", "chunk"), [(37, 8), (64, 64), (5, 64), (1, 64), (130, 64), (9, 1)])
def test_chunks_equal_the_recurrence(length, chunk, alike):
    """Also where keys are one and the same: there a series for the inverse would have cancelled binomials."""
    arrays, segments = inputs(length, alike=alike) if length > 2 else inputs(3, alike=alike)
    arrays, segments = [x[:, :length] for x in arrays], segments[:, :length]
    want, last = loops(*arrays, segments)
    out, state = rule(chunk, arrays, segments)
    np.testing.assert_allclose(out, want, atol=1e-5 * max(1, np.abs(want).max()))
    np.testing.assert_allclose(state, last, atol=1e-5 * max(1, np.abs(last).max()))


def recurrence(q, k, v, beta, g, segments):
    """`loops` again, in a form that can be differentiated; in whatever precision its arrays have."""
    group = v.shape[2] // q.shape[2]
    unit = [jnp.repeat(x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + EPS), group, 2) for x in (q, k)]
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments, axis=1)], axis=1) != 0

    def token(state, item):
        q, k, v, beta, g, begins = item
        state = jnp.where(begins[:, None, None, None], 0, state) * jnp.exp(g)[..., None, None]
        found = jnp.einsum("bnh,bnhv->bnv", k, state)
        state = state + k[..., None] * (beta[..., None] * (v - found))[..., None, :]
        return state, jnp.einsum("bnh,bnhv->bnv", q, state) / np.sqrt(q.shape[-1])

    first = jnp.zeros((len(v), v.shape[2], q.shape[-1], v.shape[-1]), v.dtype)
    items = (*unit, v, beta, g, begins)
    _, out = jax.lax.scan(token, first, tuple(jnp.moveaxis(x, 1, 0) for x in items))
    return jnp.moveaxis(out, 0, 1)


def test_gradients_equal_those_of_the_recurrence():
    """Of every input, every element, against autodiff through the recurrence in float64."""
    arrays, segments = inputs(29)
    weights = np.random.default_rng(1).normal(size=arrays[2].shape)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x, jnp.float64) for x in arrays]
        np.testing.assert_allclose(recurrence(*exact, segments), loops(*arrays, segments)[0], atol=1e-12)
        wanted = jax.grad(lambda x: jnp.sum(weights * recurrence(*x, segments)))(exact)
        wanted = [np.asarray(x) for x in wanted]
    single = [jnp.asarray(x, jnp.float32) for x in arrays]
    got = jax.grad(lambda x: jnp.sum(weights.astype(np.float32) * rule(8, x, segments)[0]))(single)
    for name, ours, want in zip(("q", "k", "v", "beta", "g"), got, wanted, strict=True):
        apart = np.linalg.norm(np.asarray(ours, np.float64) - want) / np.linalg.norm(want)
        assert apart < 1e-5, (name, apart)


def test_a_state_goes_on_where_it_was_left():
    arrays, _ = inputs(40)
    segments = np.ones((2, 40), np.int32)
    whole, last = rule(8, arrays, segments)
    first, state = rule(8, [x[:, :23] for x in arrays], segments[:, :23])
    second, state = rule(8, [x[:, 23:] for x in arrays], segments[:, 23:], state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_the_inverse_and_its_gradient():
    a = jnp.tril(jax.random.normal(jax.random.key(0), (3, 16, 16)), -1) * 0.5
    want = np.linalg.inv(np.eye(16) + np.asarray(a, np.float64))
    np.testing.assert_allclose(unit_triangular_inverse(a), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    plain = jax.grad(lambda a: jnp.sum(jnp.sin(jnp.linalg.inv(jnp.eye(16) + jnp.tril(a, -1)))))(a)
    ours = jax.grad(lambda a: jnp.sum(jnp.sin(unit_triangular_inverse(a))))(a)
    np.testing.assert_allclose(ours, plain, rtol=2e-3, atol=1e-3 * float(jnp.abs(plain).max()))


def test_convolutions_end_at_a_document_s_border():
    rng = np.random.default_rng(0)
    x, filters = rng.normal(size=(1, 9, 3)), rng.normal(size=(4, 3))
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2]])
    got, last = short_convolution(
        *(jnp.asarray(a, jnp.float32) for a in (x, filters)), jnp.asarray(segments), segments > 0, None
    )
    want = np.zeros_like(x)
    for t in range(9):
        for back in range(4):
            if t >= back and segments[0, t - back] == segments[0, t]:
                want[0, t] += filters[3 - back] * x[0, t - back]
    np.testing.assert_allclose(got, want / (1 + np.exp(-want)), atol=1e-5)
    np.testing.assert_allclose(last, x[:, -3:], atol=1e-6)


@pytest.fixture(scope="module")
def hybrid():
    model = build_model(family(**HYBRID))
    return model, lively(model)


def test_packed_documents_equal_each_alone(hybrid):
    model, params = hybrid
    packed = make_batch([[11, 3, 6]], 24)
    logits = model.apply(params, packed, Ops())
    start = 0
    for length in (11, 3, 6):
        alone = {name: x[:, start : start + length] for name, x in packed.items()}
        alone["segment_ids"] = np.ones((1, length), np.int32)
        np.testing.assert_allclose(
            model.apply(params, alone, Ops()), logits[:, start : start + length], atol=1e-5
        )
        start += length


@pytest.mark.parametrize("prompt", [1, 7, 13])
def test_decoding_equals_the_forward_pass(hybrid, prompt):
    """Rows of unequal lengths in one batch, each behind its last token."""
    model, params = hybrid
    ops, batch = Ops(), make_batch([[20], [20]], 20)
    want = np.asarray(model.apply(params, batch, ops))
    near = partial(np.testing.assert_allclose, atol=1e-5 * np.abs(want).max())
    cache, step = model.init_cache(2, 20, ops), jax.jit(partial(model.decode, ops=ops))
    layers, counts = model.unstack(params, ops), jnp.asarray([prompt, (prompt + 1) // 2])
    logits, cache = step(layers, batch["tokens"][:, :prompt], cache, counts=counts)
    near(logits, want[[0, 1], counts - 1])
    for _ in range(20 - prompt):
        tokens = batch["tokens"][[0, 1], cache["lengths"]][:, None]
        logits, cache = step(layers, tokens, cache)
        near(logits, want[[0, 1], cache["lengths"] - 1])
    state = cache["segments"]["0"][0]["0"]["state"]
    assert state.dtype == jnp.float32 and state.shape == (2, 4, 8, 6)


def test_padding_behind_a_row_leaves_its_state_as_it_was(hybrid):
    """Rows of unequal lengths are decoded side by side: what is padding there neither writes nor fades."""
    model, params = hybrid
    spec = model.segments[0].period[0]
    block = partial(
        model._block(spec, jax.tree.map(lambda p: p[0], params["segments"]["0"]["0"])), spec=spec, ops=Ops()
    )
    x = jax.random.normal(jax.random.key(0), (1, 12, 32))
    cache = {n: jnp.zeros((1, *a.shape)) for n, a in caches(model, spec).items()}
    positions = jnp.arange(12)[None]
    padded = {"positions": positions, "segment_ids": (positions < 9).astype(jnp.int32)}
    _, got, _ = block(x, padded, cache=cache)
    exact = {"positions": positions[:, :9], "segment_ids": jnp.ones((1, 9), jnp.int32)}
    _, want, _ = block(x[:, :9], exact, cache=cache)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), got, want)
    # A row that begins anew in the same place has forgotten who was there.
    _, again, _ = block(x[:, :9], exact, cache=got)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), again, want)


def caches(model, spec):
    from models.mixer import mixer

    return mixer(spec.mixer).cache_arrays(model.config, spec, 12)


def test_gates_and_rotation_of_the_full_attention_layers(hybrid):
    """Half of a head turns; a gate whose projection is zero lets half of everything through."""
    model, params = hybrid
    layer = params["segments"]["1"]["0"]["attention"]
    spec = model.segments[1].period[0]
    attention = model._block(spec, jax.tree.map(lambda p: p[0], params["segments"]["1"]["0"])).attention
    q = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
    turned, _ = attention.rotate(q, q[:, :, :2], jnp.arange(5)[None], spec, Ops())
    np.testing.assert_array_equal(turned[..., 4:], q[..., 4:])
    assert not np.allclose(turned[:, 1:, :, :4], q[:, 1:, :, :4])
    assert layer["gate"].shape == (1, 32, 4, 8)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"delta": None}, ["gated_delta layers", "model.delta=null"]),
        ({"rope_fraction": 0.3}, ["model.rope_fraction=0.3", "use 1.0"]),
    ],
)
def test_values_that_make_no_hybrid_are_one_clear_line(values, parts):
    with pytest.raises(ValueError) as caught:
        family(**(HYBRID | values))
    assert all(part in str(caught.value) for part in parts)


def test_sizes_that_make_no_rule_are_refused():
    with pytest.raises(ValueError, match="model.delta.num_key_heads=3 must divide .*use one of"):
        dataclasses.replace(DELTA, num_key_heads=3)
    with pytest.raises(ValueError, match="model.delta.chunk=48 must be a power of two"):
        dataclasses.replace(DELTA, chunk=48)
