"""Generated text against a full forward pass for every token, in any batch and on any mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifacts.config import RunConfig
from models.config import MLAConfig, ModelConfig, MoEConfig
from models.ops import Ops
from models.transformer import build_model
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from tests.models.decoders import lively
from tests.parallel.small import RULES
from training.config import Config
from training.program import build_ops
from training.state import is_info

CONFIG = ModelConfig(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64
)
# A row that is shorter than a prefill block, one that ends on its edge, and two that go beyond it.
PROMPTS = [[5], [(7 * i) % 64 for i in range(16)], [3, 1, 4, 1, 5], [(11 * i) % 64 for i in range(35)]]
LATENT = MLAConfig(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MODELS = {
    "plain": CONFIG,
    "learned": replace(CONFIG, position="learned"),
    "window": replace(CONFIG, window=6, window_pattern=["local", "global"]),
    "latent": replace(CONFIG, mla=LATENT, num_kv_heads=4, head_dim=12),
    "moe": replace(CONFIG, moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=16)),
}
OPS, GREEDY = Ops(), Sampling(0)


def make(name, seed=0):
    """A model and weights that make a peaked, varied distribution; at first one token would follow all."""
    model = build_model(MODELS[name])
    return model, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.init(jax.random.key(seed)))


@pytest.fixture(scope="module")
def generator():
    return Generator(*make("plain"), OPS)


def write(generator, prompts, count, sampling=GREEDY, *, seed=0, numbers=None, stop_id=None):
    keys = sample_keys(seed, range(len(prompts)) if numbers is None else numbers)
    return generator.complete(prompts, sampling, keys, max_new_tokens=count, stop_id=stop_id)


def make_forward(model, params, size=64):
    """Log-probabilities behind every token of a text, by one full forward pass over it padded to `size`."""
    apply = jax.jit(partial(model.apply, ops=OPS))

    def forward(text):
        row = np.zeros((1, size), np.int32)
        row[0, : len(text)] = text
        segments = (np.arange(size) < len(text)).astype(np.int32)[None]
        batch = {"tokens": row, "positions": np.arange(size, dtype=np.int32)[None], "segment_ids": segments}
        return np.asarray(jax.nn.log_softmax(apply(params, batch)[0, : len(text)]))

    return forward


def step_by_step(forward, prompt, count):
    text = list(prompt)
    for _ in range(count):
        text.append(int(np.argmax(forward(text)[-1])))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_a_full_forward_for_every_token(name):
    model, params = make(name, 1)
    texts = write(Generator(model, params, OPS), PROMPTS, 20)
    forward = make_forward(model, params)
    assert texts == [step_by_step(forward, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == len(PROMPTS)


@pytest.mark.parametrize("name", ["plain", "moe"])
def test_scores_are_those_of_a_plain_forward_pass(name):
    model = build_model(MODELS[name])
    params = lively(model, spread=0.1)
    texts = [*PROMPTS, [1, 2], [(13 * i) % 64 for i in range(40)], [7]]
    forward, scores = make_forward(model, params), Generator(model, params, OPS).score(texts)
    assert [len(found) for found in scores] == [len(text) - 1 for text in texts]
    for text, found in zip(texts, scores, strict=True):
        expected = forward(text)[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert found.dtype == np.float32


@pytest.mark.parametrize("name", ["window", "latent", "moe"])
def test_a_score_is_its_own_text_s_whatever_the_layers_are(name):
    model = build_model(MODELS[name])
    generator = Generator(model, lively(model, spread=0.1), OPS)
    rng = np.random.default_rng(0)
    context = rng.integers(0, 64, 21).tolist()
    texts = [*PROMPTS, *(context + rng.integers(0, 64, n).tolist() for n in (1, 3, 12, 12))]
    together = generator.score(texts)
    for text, found in zip(texts, together, strict=True):
        assert generator.score([text])[0].tobytes() == found.tobytes()


def test_a_sample_does_not_depend_on_its_batch(generator):
    go = partial(write, generator, count=12, sampling=Sampling(0.9, top_k=20), seed=3)
    together = go(PROMPTS)
    assert go(PROMPTS[::-1], numbers=[3, 2, 1, 0]) == together[::-1]
    assert [go([prompt], numbers=[i])[0] for i, prompt in enumerate(PROMPTS)] == together


def test_samples_of_one_prompt_differ_by_number_and_by_seed(generator):
    go = partial(write, generator, [[5, 6]] * 3, 12, Sampling())
    texts = [tuple(text) for text in (*go(seed=0), *go(seed=1))]
    assert len(set(texts)) == 6


def test_a_text_ends_before_its_stop_and_short_only_there(generator):
    free = write(generator, PROMPTS, 20)
    stop = free[3][10]
    stopped = write(generator, PROMPTS, 20, stop_id=stop)
    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    assert stopped == expected and len(stopped[3]) <= 10


def test_a_stop_inside_a_prompt_does_not_end_it(generator):
    prompt = [9, 5, 9, 6]
    (free,) = write(generator, [prompt], 8)
    stop = next(t for t in (9, 5, 6) if t not in free)
    assert write(generator, [prompt], 8, stop_id=stop) == [free]


def test_a_cache_that_grows_changes_nothing(generator, monkeypatch):
    """Three sizes where there was one, and none of the further ones once every row has ended."""
    expected, sizes = write(generator, PROMPTS, 90), []
    monkeypatch.setattr("serving.generator._capacities", lambda longest, room: [64, 96, room])
    advance = generator._advance

    def counted(*args, capacity, **words):
        sizes.append(capacity)
        return advance(*args, capacity=capacity, **words)

    monkeypatch.setattr(generator, "_advance", counted)
    assert write(generator, PROMPTS, 90) == expected and sizes == [64, 96, 128]
    first = [text[0] for text in write(generator, [[1]], 90)]
    sizes.clear()
    assert write(generator, [[1]], 90, stop_id=first[0]) == [[]] and sizes == [64]


def counting(decode, calls):
    """A model's `decode` that takes down each call, when traced and when run."""

    def counted(params, tokens, cache, ops, counts=None):
        calls.append("traced")
        jax.debug.callback(lambda: calls.append("run"))
        logits, cache = decode(params, tokens, cache, ops, counts)
        return jnp.where((cache["lengths"] == 4)[:, None], 100.0 * jax.nn.one_hot(7, 64), logits), cache

    return counted


def test_the_loop_stops_when_every_row_has_ended():
    """Counted in calls of the model: one for each token, none after the last row's stop."""
    (model, params), calls = make("plain"), []
    object.__setattr__(model, "decode", counting(model.decode, calls))
    texts = write(Generator(model, params, OPS), [[1], [2, 3]], 30, stop_id=7)
    jax.effects_barrier()
    assert [len(text) for text in texts] == [3, 2] and calls.count("run") == 4


def test_one_compilation_for_lengths_that_share_a_shape_and_for_other_weights():
    (model, params), calls, counts = make("plain"), [], []
    object.__setattr__(model, "decode", counting(model.decode, calls))
    generator = Generator(model, params, OPS)
    for prompts, count in (([[1], [2, 3]], 5), ([[4, 5, 6], [7]], 27), ([[8] * 9, [9] * 12], 3)):
        write(generator, prompts, count, seed=count)
        counts.append(calls.count("traced"))
    generator.update(jax.tree.map(lambda x: -x, params))
    write(generator, [[1], [2]], 5)
    assert counts[0] == calls.count("traced") > 0


def test_ids_of_a_padded_vocabulary_are_never_drawn(generator):
    texts = write(generator, [[1]] * 8, 20, Sampling(3.0, vocab_size=10))
    assert max(max(text) for text in texts) < 10


MESHES = {
    "fsdp2-tensor2": dict(fsdp=2, tensor=2),
    "more devices than K/V heads": dict(data=2, tensor=4),
    "context2-pipeline2-fsdp2": dict(context=2, pipeline=2, fsdp=2),
    "expert2-tensor2": dict(expert=2, tensor=2),
}


@pytest.mark.parametrize(
    ("name", "mesh", "bits"),
    [
        ("plain", "fsdp2-tensor2", None),
        ("latent", "fsdp2-tensor2", None),
        ("plain", "more devices than K/V heads", None),
        ("plain", "more devices than K/V heads", 8),
        ("window", "context2-pipeline2-fsdp2", None),
        ("moe", "expert2-tensor2", None),
    ],
)
def test_a_mesh_writes_and_scores_what_one_device_does(name, mesh, bits):
    """Three rows, which no axis divides, by the layout and the operations of training."""
    model, params = make(name, 1)
    sizes = MeshConfig(**{"data": 1, **MESHES[mesh]}, rules=RULES)
    layout = build_layout(sizes, jax.devices()[: int(np.prod(list(MESHES[mesh].values())))])
    config = Config(run=RunConfig(name="test"), model=MODELS[name], mesh=sizes)
    placed = jax.device_put(params, layout.tree(model.info, is_info))
    one = Generator(model, params, OPS, cache_bits=bits)
    many = Generator(model, placed, build_ops(config, layout), layout, cache_bits=bits)
    sampling = Sampling(0.8, top_k=30, top_p=0.9)
    assert write(many, PROMPTS[1:], 8, sampling) == write(one, PROMPTS[1:], 8, sampling)
    for found, expected in zip(many.score(PROMPTS), one.score(PROMPTS), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    kept = many._weights["segments"]["0"][0]["0"]["mlp" if name != "moe" else "attention"]
    assert not any(x.sharding.is_fully_replicated for x in jax.tree.leaves(kept) if x.ndim > 1)


def test_matrices_are_kept_in_the_compute_dtype_and_routers_in_float32():
    model, params = make("moe")
    weights = Generator(model, params, replace(OPS, compute_dtype=jnp.bfloat16))._weights
    layer = weights["segments"]["0"][1]["0"]
    assert layer["attention"]["q"].dtype == layer["mlp"]["experts"]["up"].dtype == jnp.bfloat16
    assert layer["mlp"]["experts"]["router"].dtype == layer["mlp_norm"]["scale"].dtype == jnp.float32


def test_nonsense_is_refused(generator):
    assert write(generator, [], 3) == [] and generator.score([]) == []
    with pytest.raises(ValueError, match="max_new_tokens=0 must be "):
        write(generator, [[1]], 0)
    for call in (partial(write, generator, count=3), generator.score):
        with pytest.raises(ValueError, match="a prompt of 0 tokens"):
            call([[1], []])
        with pytest.raises(ValueError, match=r"a token outside 0\.\.63"):
            call([[64]])
    learned = Generator(*make("learned"), OPS)
    with pytest.raises(ValueError, match=r"exceeds model.max_seq_len=64 learned positions; use at most 54"):
        write(learned, [[1] * 10], 55)
