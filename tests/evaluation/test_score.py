"""What is read and what is scored, and that a figure is its own document's alone."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from artifacts.config import RunConfig
from evaluation.requests import TaskRequest
from evaluation.score import plan, score, split_tokens, windows
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from serving.generator import Generator
from tests.evaluation.asked import BYTES, REQUESTS, TINY, VOCAB, WORDS
from tests.models.decoders import lively
from tests.parallel.small import RULES
from training.config import Config
from training.program import build_ops
from training.state import is_info


@pytest.fixture(scope="module")
def tiny():
    model = build_model(TINY)
    return model, lively(model, spread=0.1)


@pytest.fixture(scope="module")
def generator(tiny):
    return Generator(*tiny, Ops())


def test_the_cut_is_where_the_one_text_has_it():
    """A space belongs to the next word, and what the cut joins counts to the continuation."""
    pairs = [("the arm", " and the"), ("the arm ", "and the"), ("the arm  ", "and"), ("", "the arm")]
    split = split_tokens(WORDS, pairs)
    assert split[0] == split[1]
    for (context, continuation), (left, right) in zip(pairs, split, strict=True):
        assert [*left, *right] == WORDS.encode(context + continuation).tolist()
        assert WORDS.decode(left) == context.rstrip()
    assert split[3][0] == []
    # One token together: as many as the context has alone would stay on its side, but one is scored.
    whole = WORDS.encode("the")
    assert len(whole) == 1
    assert split_tokens(WORDS, [("t", "he")]) == [([], whole.tolist())]


def test_one_token_is_scored_by_the_one_before_it():
    made = plan(
        [TaskRequest("t", "0", "choice", ("Answer:",), (" A", " B"), gold=0)], WORDS, length=64, bos=True
    )
    ids = WORDS.encode("Answer: A").tolist()
    assert made.texts[0] == [WORDS.bos_id, *ids]
    assert made.starts[0] == 1 + len(WORDS.encode("Answer:")) and made.owners == [(0, 0), (0, 1)]
    alone = plan([replace(REQUESTS[3], bos=False), REQUESTS[3]], BYTES, length=64, bos=True)
    assert alone.texts[1] == [BYTES.bos_id, *alone.texts[0]] and alone.starts == [9, 10]
    assert plan([REQUESTS[3]], BYTES, length=64, bos=False).texts == alone.texts[:1]
    # What begins with nothing has a bos all the same, or its first token would have no likelihood.
    assert plan([REQUESTS[4]], BYTES, length=999, bos=False).texts[0][0] == BYTES.bos_id


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("start", "length"), [(1, 7), (3, 7), (15, 7), (15, 40), (19, 3)])
def test_each_token_is_scored_once_and_by_at_most_length_others(start, length, keep):
    tokens = list(range(100, 120))
    found = windows(tokens, start, length, keep_first=keep)
    assert [t for text, at in found for t in text[at:]] == tokens[start:]
    assert all(1 <= at and len(text) <= length + 1 for text, at in found)
    for text, at in found:
        where = tokens.index(text[at])
        assert text[1:] == tokens[where - at + 1 : where - at + len(text)]
        cut = where - at > 0
        assert text[0] == (100 if keep and cut and at > 1 else tokens[where - at])


def test_contexts_are_cut_from_the_left_and_counted(generator):
    made = plan(REQUESTS, BYTES, length=48, bos=True)
    assert made.cut == 1 and max(map(len, made.texts)) <= 49
    cut = made.texts[-1]
    assert cut[0] == BYTES.bos_id and BYTES.decode(cut[1:]).endswith("long context  the end")
    # A rolling text is not cut: each of its bytes is scored, in windows.
    rolling = [s for s in score(generator, BYTES, made) if s.request.kind == "rolling"]
    assert rolling[0].tokens == (len(REQUESTS[4].continuations[0]),)


def test_scores_are_sums_of_a_plain_forward_pass(tiny, generator):
    model, params = tiny
    (found,) = score(generator, BYTES, plan(REQUESTS[:1], BYTES, length=64, bos=True))
    for text, nats in zip(REQUESTS[0].continuations, found.logprobs, strict=True):
        head = [BYTES.bos_id, *BYTES.encode(REQUESTS[0].contexts[0])]
        ids = np.array([*head, *BYTES.encode(text)])
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids)] = ids
        segments = (np.arange(64) < len(ids)).astype(np.int32)[None]
        batch = {"tokens": row, "positions": np.arange(64, dtype=np.int32)[None], "segment_ids": segments}
        logits = jax.nn.log_softmax(model.apply(params, batch, ops=Ops())[0])
        expected = sum(float(logits[i - 1, ids[i]]) for i in range(len(head), len(ids)))
        assert nats == pytest.approx(expected, rel=1e-5)
    assert found.tokens == tuple(len(text) for text in REQUESTS[0].continuations)


ALONE = (0, 1, 7, 30, 31, 33, 35, 36, 38)
# SmolLM2's width, where a library cuts sums over keys and over features into blocks.
WIDE = ModelConfig(
    vocab_size=VOCAB, num_layers=1, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_ff=128
)


def test_a_score_is_bitwise_its_own_whatever_is_beside_it():
    model = build_model(WIDE)
    layout = build_layout(MeshConfig(data=1, rules=RULES), jax.devices()[:1])
    config = Config(run=RunConfig(name="test"), model=WIDE, mesh=MeshConfig(data=1, rules=RULES))
    generator = Generator(model, lively(model, spread=0.1), build_ops(config, layout), layout)
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(2, 96, 30), 130, 190]
    texts = [rng.integers(0, VOCAB, n).tolist() for n in sizes]
    texts += [[*texts[0][:-1], last] for last in (3, 5, 7)]  # which share all but their last token
    # Which share what they begin with, up to within a block and to its end.
    texts += [texts[1][:size] + rng.integers(0, VOCAB, more).tolist() for size in (8, 13) for more in (5, 60)]
    together = generator.score(texts)
    order = rng.permutation(len(texts))
    shuffled = generator.score([texts[i] for i in order])
    alone = [generator.score([texts[i]])[0] for i in ALONE]
    half = [x for part in (texts[:11], texts[11:]) for x in generator.score(part)]
    tails = generator.score(texts, [len(text) - 1 for text in texts])
    for place, i in enumerate(order):
        assert shuffled[place].tobytes() == together[i].tobytes() == half[i].tobytes()
        assert tails[i].tobytes() == together[i][-1:].tobytes()
    for found, i in zip(alone, ALONE, strict=True):
        assert found.tobytes() == together[i].tobytes()


def test_a_mesh_scores_what_one_device_does(tiny, generator):
    model, params = tiny
    sizes = MeshConfig(data=1, fsdp=4, tensor=2, rules=RULES)
    layout = build_layout(sizes, jax.devices()[:8])
    config = Config(run=RunConfig(name="test"), model=TINY, mesh=sizes)
    placed = jax.device_put(params, layout.tree(model.info, is_info))
    many = Generator(model, placed, build_ops(config, layout), layout)
    made = plan(REQUESTS, BYTES, length=64, bos=True)
    for one, other in zip(score(generator, BYTES, made), score(many, BYTES, made), strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, rel=1e-5)


def test_text_is_written_up_to_its_stop(generator):
    asked = TaskRequest("t", "0", "generate", ("def f(",), answers=("x",), max_new_tokens=12)
    (whole,) = score(generator, BYTES, plan([asked], BYTES, length=64, bos=True))
    stop = whole.text[len(whole.text) // 2]
    others = [replace(asked, doc=str(i), contexts=(f"{i} ",), max_new_tokens=4 + i % 2) for i in range(3)]
    stopped = replace(asked, stop=("never", stop))
    found = score(generator, BYTES, plan([*others, stopped], BYTES, length=64, bos=True))[-1]
    assert whole.text and found.text == whole.text[: whole.text.index(stop)]
    assert found.logprobs == found.tokens == ()
    made = plan([replace(asked, contexts=("long " * 40,))], BYTES, length=64, bos=True)
    assert made.cut == 1 and len(made.prompts[0]) == 64 - 12 and made.prompts[0][0] == BYTES.bos_id
    with pytest.raises(ValueError, match="max_new_tokens=12 leaves no room .* length=13; use at most 11"):
        plan([asked], BYTES, length=13, bos=True)


def test_sums_do_not_depend_on_their_order(generator):
    made = plan(REQUESTS, BYTES, length=48, bos=True)
    assert all(math.isfinite(x) for one in score(generator, BYTES, made) for x in one.logprobs)
    assert made.tokens == sum(map(len, made.texts))
