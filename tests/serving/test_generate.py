"""Generated text against a full forward pass for every token, in any batch and on any mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from serving.generator import generate

CONFIG = ModelConfig(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64
)
# A row that is shorter than a prefill block, one that ends on its edge, and two that go beyond it.
PROMPTS = [[5], [(7 * i) % 64 for i in range(16)], [3, 1, 4, 1, 5], [(11 * i) % 64 for i in range(35)]]
OPS = Ops()


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    # Large weights make a peaked, varied distribution; at initialization one token would follow all.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.init(jax.random.key(0)))


def make_forward(model, params, size=64):
    """Logits after a text, by one full forward pass over the text padded to `size`."""
    apply = jax.jit(partial(model.apply, ops=OPS))

    def forward(text):
        row = np.zeros((1, size), np.int32)
        row[0, : len(text)] = text
        segments = (np.arange(size) < len(text)).astype(np.int32)[None]
        batch = {"tokens": row, "positions": np.arange(size, dtype=np.int32)[None], "segment_ids": segments}
        return np.asarray(apply(params, batch)[0, len(text) - 1])

    return forward


def step_by_step(forward, prompt, count, eos_id=None):
    text = list(prompt)
    for _ in range(count):
        token = int(np.argmax(forward(text)))
        if token == eos_id:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "features", [{}, {"position": "learned"}, {"window": 6, "window_pattern": ["local", "global"]}]
)
def test_greedy_equals_a_full_forward_for_every_token(features):
    model = build_model(replace(CONFIG, **features))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.init(jax.random.key(1)))
    texts = generate(model, params, OPS, PROMPTS, max_new_tokens=20, temperature=0)
    forward = make_forward(model, params)
    assert texts == [step_by_step(forward, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == len(PROMPTS)


def test_a_sample_does_not_depend_on_its_batch(model, params):
    go = partial(generate, model, params, OPS, max_new_tokens=12, temperature=0.9, top_k=20, seed=3)
    together = go(PROMPTS)
    assert go(PROMPTS[::-1], sample_ids=[3, 2, 1, 0]) == together[::-1]
    assert [go([prompt], sample_ids=[i])[0] for i, prompt in enumerate(PROMPTS)] == together


def test_samples_of_one_prompt_differ_by_number_and_by_seed(model, params):
    go = partial(generate, model, params, OPS, [[5, 6]] * 3, max_new_tokens=12)
    texts = [tuple(text) for text in (*go(seed=0), *go(seed=1))]
    assert len(set(texts)) == 6


def test_a_text_ends_before_its_eos_and_short_only_there(model, params):
    free = generate(model, params, OPS, PROMPTS, max_new_tokens=20, temperature=0)
    eos = free[3][10]
    stopped = generate(model, params, OPS, PROMPTS, max_new_tokens=20, temperature=0, eos_id=eos)
    expected = [text[: text.index(eos)] if eos in text else text for text in free]
    assert stopped == expected and len(stopped[3]) <= 10


def test_an_eos_inside_a_prompt_does_not_end_it(model, params):
    prompt = [9, 5, 9, 6]
    free = generate(model, params, OPS, [prompt], max_new_tokens=8, temperature=0)[0]
    eos = next(t for t in (9, 5, 6) if t not in free)
    assert generate(model, params, OPS, [prompt], max_new_tokens=8, temperature=0, eos_id=eos) == [free]


def test_the_loop_stops_when_every_row_has_ended(model, params):
    """Counted in calls of the model: one for each token, none after the last row's eos."""
    calls = []

    class Counting:
        config = model.config
        init_cache = staticmethod(model.init_cache)

        @staticmethod
        def decode(params, tokens, cache, ops):
            jax.debug.callback(lambda: calls.append(1))
            logits, cache = model.decode(params, tokens, cache, ops)
            return jnp.where(cache["length"] == 4, 100.0 * jax.nn.one_hot(7, 64), logits), cache

    texts = generate(Counting(), params, OPS, [[1], [2, 3]], max_new_tokens=30, temperature=0, eos_id=7)
    jax.effects_barrier()
    assert [len(text) for text in texts] == [3, 2] and len(calls) == 4


def test_one_compilation_for_lengths_that_share_a_shape(model, params):
    traces = []

    class Counting:
        config = model.config
        init_cache = staticmethod(model.init_cache)

        @staticmethod
        def decode(params, tokens, cache, ops):
            traces.append(tokens.shape)
            return model.decode(params, tokens, cache, ops)

    counting, calls = Counting(), (([[1], [2, 3]], 5), ([[4, 5, 6], [7]], 30), ([[8] * 9, [9] * 12], 3))
    counts = []
    for prompts, count in calls:
        generate(counting, params, OPS, prompts, max_new_tokens=count, seed=count)
        counts.append(len(traces))
    assert counts[0] == counts[-1] > 0


def test_ids_of_a_padded_vocabulary_are_never_drawn(model, params):
    texts = generate(model, params, OPS, [[1]] * 8, max_new_tokens=20, temperature=3.0, vocab_size=10)
    assert max(max(text) for text in texts) < 10


def test_sharded_parameters_write_the_same_text(model, params):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(info, x):
        axes = tuple({"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}.get(a) for a in info.axes)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    sharded = jax.tree.map(place, model.info, params)
    plain = generate(model, params, OPS, PROMPTS[:3], max_new_tokens=6, temperature=0)
    assert generate(model, sharded, OPS, PROMPTS[:3], max_new_tokens=6, temperature=0) == plain


def test_nonsense_is_refused(model, params):
    go = partial(generate, model, params, OPS)
    assert go([], max_new_tokens=3) == []
    with pytest.raises(ValueError, match="max_new_tokens=0 must be "):
        go([[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        go([[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="a token outside 0..63"):
        go([[64]], max_new_tokens=3)
    learned = build_model(replace(CONFIG, position="learned"))
    with pytest.raises(ValueError, match="exceeds model.max_seq_len=64 learned positions; use at most 54"):
        generate(learned, params, OPS, [[1] * 10], max_new_tokens=55)
