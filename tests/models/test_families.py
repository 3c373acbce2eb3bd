from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import chunked_attention
from models.config import ModelConfig, MoEConfig
from models.ops import Ops
from models.transformer import build_model
from tests.models.decoders import FAMILIES, LoopDecoder, decoded, lively, make_batch, slope

OPS = {"reference": Ops(), "chunked": Ops(attention=partial(chunked_attention, block=4), loss_chunk=7)}
PACKED = [[5, 7], [3, 1, 6]]  # 12 positions a row, the second with padding


def run_layers(model, params, x, batch, ops):
    """Every layer in order, one scan a segment."""
    for s, segment in enumerate(model.segments):

        def period(x, places, segment=segment):
            for p, spec in enumerate(segment.period):
                x, _ = model.layer(spec, places[str(p)], x, batch, None, ops)
            return x, None

        x, _ = jax.lax.scan(period, x, params["segments"][str(s)])
    return x


def loss_of(model, params, batch, ops):
    """Embed, layers, head: the way `parallel` puts a model together."""
    x = run_layers(model, params, model.embed(params, batch, ops), batch, ops)
    return model.head(params, x, batch, ops)[0]


@cache
def forward(name: str):
    """A family's parameters, a full batch of two rows, and its logits by the plain forward pass."""
    model = build_model(FAMILIES[name])
    params, batch = lively(model), make_batch([[12], [12]], 12)
    return params, batch, jax.jit(partial(model.apply, ops=Ops()))(params, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_loops_in_logits_loss_and_gradient(name):
    config = FAMILIES[name]
    model, loops = build_model(config), LoopDecoder(config)
    params, batch, logits = forward(name)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    np.testing.assert_allclose(logits, loops.logits(exact, batch), atol=2e-4)

    batch = make_batch(PACKED, 12)
    ops = OPS["reference" if name in ("gemma2", "llama3") else "chunked"]
    loss, grads = jax.jit(jax.value_and_grad(partial(loss_of, model, batch=batch, ops=ops)))(params)
    np.testing.assert_allclose(loss, loops.loss(exact, batch), rtol=1e-5)
    leaves, tree = jax.tree.flatten(exact)
    for place, grad in enumerate(jax.tree.leaves(grads)):
        direction, expected = slope(lambda *x: loops.loss(jax.tree.unflatten(tree, x), batch), leaves, place)
        scale = np.linalg.norm(grad) * np.linalg.norm(direction)
        np.testing.assert_allclose(np.vdot(grad, direction), expected, atol=1e-4 * scale + 1e-6)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("gpt2", "chunked"), ("llama3", "reference"), ("gemma2", "reference"), ("gemma3", "chunked")],
)
def test_packed_equals_unpacked(name, backend):
    model, lengths = build_model(FAMILIES[name]), [5, 7, 4]
    params, packed = lively(model), make_batch([lengths], 16)
    apart = make_batch([[length] for length in lengths], 8)
    starts = np.cumsum([0, *lengths])
    for row, length in enumerate(lengths):
        apart["tokens"][row, :length] = packed["tokens"][0, starts[row] : starts[row + 1]]
    run = jax.jit(partial(model.apply, ops=OPS[backend]))
    together, alone = run(params, packed), run(params, apart)
    for row, length in enumerate(lengths):
        got = together[0, starts[row] : starts[row + 1]]
        np.testing.assert_allclose(got, alone[row, :length], atol=2e-5)


@pytest.mark.parametrize("backend", OPS)
def test_no_gradient_flows_across_documents_nor_to_the_past(backend):
    model = build_model(FAMILIES["gemma2"])
    params, batch = lively(model), make_batch([[5, 7]], 16)
    ops = OPS[backend]
    x = model.embed(params, batch, ops)

    @jax.jit
    @jax.grad
    def influence(x, position):
        x = run_layers(model, params, x, batch, ops)
        return model.logits(params, x, ops)[0, position].sum()

    for position, start in ((3, 0), (9, 5)):
        touched = np.any(np.asarray(influence(x, position)) != 0, axis=(0, 2))
        np.testing.assert_array_equal(touched, [start <= t <= position for t in range(16)])


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_equals_full_forward(name):
    model, (params, batch, full) = build_model(FAMILIES[name]), forward(name)
    prompt = 8 if name in ("gpt2", "gemma3") else 0
    np.testing.assert_allclose(decoded(model, params, batch["tokens"], prompt), full[:, prompt:], atol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_info_describes_the_parameters(name):
    model = build_model(FAMILIES[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    born = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.info)
    assert born == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    for info in jax.tree.leaves(model.info):
        assert len(info.axes) == len(info.shape)
        assert (info.role == "matrix") == bool(info.reduction) == bool(info.output)
        assert not set(info.reduction) & set(info.output)
    assert model.num_params()["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
def test_the_first_loss_is_that_of_a_guess(name):
    model, batch = build_model(FAMILIES[name]), make_batch(PACKED, 12)
    params = jax.jit(model.init)(jax.random.key(0))
    loss = jax.jit(partial(loss_of, model, ops=Ops()))(params, batch) / batch["loss_weights"].sum()
    assert abs(loss - np.log(model.config.vocab_size)) < 0.15


def test_a_layers_values_do_not_depend_on_how_layers_are_grouped():
    plain = FAMILIES["qwen3"]
    grouped = replace(plain, window=4, window_pattern=["local", "global"])
    one, two = (jax.jit(build_model(config).init)(jax.random.key(3)) for config in (plain, grouped))
    for place in (0, 1):
        expected = jax.tree.map(lambda leaf, place=place: leaf[place::2], one["segments"]["0"]["0"])
        jax.tree.map(np.testing.assert_array_equal, two["segments"]["0"][str(place)], expected)
    q = one["segments"]["0"]["0"]["attention"]["q"]
    assert not np.array_equal(q[0], q[1])


def test_repeated_kv_heads_change_nothing():
    model = build_model(FAMILIES["qwen3"])
    params, batch = lively(model), make_batch(PACKED, 12)
    gradient = jax.jit(jax.value_and_grad(partial(loss_of, model)), static_argnums=2)
    once, twice = (gradient(params, batch, Ops(repeat_kv=n)) for n in (1, 2))
    np.testing.assert_allclose(once[0], twice[0], rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4), once[1], twice[1])


def test_bfloat16_compute_keeps_float32_gradients_close():
    model = build_model(FAMILIES["llama3"])
    params, batch = lively(model, spread=0.05), make_batch(PACKED, 12)
    rough = Ops(compute_dtype=jnp.bfloat16)
    assert model.embed(params, batch, rough).dtype == jnp.bfloat16
    gradient = jax.jit(jax.value_and_grad(partial(loss_of, model)), static_argnums=2)
    (loss, grads), (exact, expected) = gradient(params, batch, rough), gradient(params, batch, Ops())
    np.testing.assert_allclose(loss, exact, rtol=1e-2)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_zero_init_starts_with_layers_that_change_nothing():
    model = build_model(replace(FAMILIES["modern"], zero_init=True))
    batch, key = make_batch(PACKED, 12), jax.random.key(0)
    params = jax.tree.map(lambda info: info.init(key, info.shape, info.dtype), model.info)
    x = model.embed(params, batch, Ops())
    np.testing.assert_array_equal(run_layers(model, params, x, batch, Ops()), x)


def published(**values) -> ModelConfig:
    return ModelConfig(
        **({"tie_embeddings": False, "head_dim": 128, "d_model": 4096, "num_heads": 32} | values)
    )


GEMMA = dict(norm_unit_offset=True, post_norms=True, activation="geglu", tie_embeddings=True, head_dim=256)
PUBLISHED = {
    "gpt2_124m": (
        published(
            vocab_size=50257,
            num_layers=12,
            d_model=768,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            d_ff=3072,
            max_seq_len=1024,
            norm="layernorm",
            bias=True,
            position="learned",
            activation="gelu",
            tie_embeddings=True,
        ),
        124_439_808,
    ),
    "llama2_7b": (published(vocab_size=32000, num_layers=32, num_kv_heads=32, d_ff=11008), 6_738_415_616),
    "llama3_8b": (published(vocab_size=128256, num_layers=32, num_kv_heads=8, d_ff=14336), 8_030_261_248),
    "mistral_7b": (published(vocab_size=32000, num_layers=32, num_kv_heads=8, d_ff=14336), 7_241_732_096),
    "qwen2_7b": (
        published(
            vocab_size=152064,
            num_layers=28,
            d_model=3584,
            num_heads=28,
            num_kv_heads=4,
            d_ff=18944,
            qkv_bias=True,
        ),
        7_615_616_512,
    ),
    "qwen3_8b": (
        published(vocab_size=151936, num_layers=36, num_kv_heads=8, d_ff=12288, qk_norm=True),
        8_190_735_360,
    ),
    "gemma2_9b": (
        published(
            vocab_size=256000,
            num_layers=42,
            d_model=3584,
            num_heads=16,
            num_kv_heads=8,
            d_ff=14336,
            window=4096,
            window_pattern=["local", "global"],
            **GEMMA,
        ),
        9_241_705_984,
    ),
    "smollm3_3b": (
        published(
            vocab_size=128256,
            num_layers=36,
            d_model=2048,
            num_heads=16,
            num_kv_heads=4,
            d_ff=11008,
            window_pattern=["global"] * 3 + ["nope"],
            tie_embeddings=True,
        ),
        3_075_098_624,
    ),
    "olmo2_7b": (
        published(
            vocab_size=100352,
            num_layers=32,
            num_kv_heads=32,
            d_ff=11008,
            post_norms="only",
            qk_norm="joint",
        ),
        7_298_617_344,
    ),
    "gpt_oss_20b": (
        published(
            vocab_size=201088,
            num_layers=24,
            d_model=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            qkv_bias=True,
            biases=["o", "experts"],
            attention_sinks=True,
            activation="clamped_swiglu",
            moe=MoEConfig(num_experts=32, experts_per_token=4, d_expert=2880),
        ),
        20_914_757_184,
    ),
    "gemma3_1b": (
        published(
            vocab_size=262144,
            num_layers=26,
            d_model=1152,
            num_heads=4,
            num_kv_heads=1,
            d_ff=6912,
            qk_norm=True,
            window=512,
            window_pattern=["local"] * 5 + ["global"],
            **GEMMA,
        ),
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, total = PUBLISHED[name]
    assert build_model(config).num_params()["total"] == total
