"""An answer is a function of weights and request: nothing else of what an engine does is seen in it."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifacts.config import RunConfig
from benchmarks.serving.purity import differing
from models.config import DeltaConfig, MTPConfig
from models.ops import Ops
from models.transformer import build_model
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from serving.engine import Engine
from serving.generator import Generator
from serving.offline import complete, show_purity
from serving.request import Draw, Failed, Finished, Refused, Request, Written
from serving.sampling import Sampling, sample_keys
from serving.schedule import Seat
from serving.settings import ServeConfig
from serving.speculate import guess
from serving.texts import Pace, Queued, Text
from tests.parallel.small import RULES
from tests.serving.test_generate import CONFIG, MODELS, OPS, make, make_forward
from training.config import Config
from training.program import build_ops
from training.state import is_info

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ServeConfig(slots=3, page=4, chunk=8, max_len=64, queue_seconds=1e6)
DELTA = DeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8, chunk=8)
FAMILIES = {
    **MODELS,
    "sinks": replace(CONFIG, attention_sinks=True, window=6, window_pattern=["local", "global"]),
    "softcap": replace(CONFIG, attention_softcap=5.0, logit_softcap=5.0),
    "hybrid": replace(CONFIG, delta=DELTA, mixer_pattern=["gated_delta", "attention"]),
}
FURTHER = {
    "plain and further": replace(CONFIG, mtp=MTPConfig()),
    "moe and further": replace(MODELS["moe"], mtp=MTPConfig()),
    "latent and further": replace(MODELS["latent"], mtp=MTPConfig(2, normed_stream=False)),
}
DRAFTING = replace(SETTINGS, guesses=3, speculate="mtp")
LONG = tuple((7 * i) % 64 for i in range(30))


def lively(name):
    model = build_model((FAMILIES | FURTHER)[name])
    params = model.init(jax.random.key(0))
    return model, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def engine():
    made = Engine(*make("plain"), OPS, SETTINGS)
    made.warm()
    return made


def tokens(answer):
    return [event.token for event in answer[0]]


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        *((name, "float32", None) for name in FAMILIES),
        *((name, "bfloat16", None) for name in ("plain", "moe", "hybrid")),
        *(("latent", "float32", 8), ("window", "bfloat16", 8), ("hybrid", "bfloat16", 8)),
    ],
)
def test_an_answer_does_not_depend_on_the_load(name, dtype, bits):
    """Whatever the cache's numbers are: with what others have in common in it, and without."""
    ops, settings = Ops(compute_dtype=jnp.dtype(dtype)), replace(SETTINGS, cache_bits=bits)
    found = differing(*lively(name), ops, settings, schedules=6, count=9)
    assert found == {kind: (18, 0) for kind in found}


@pytest.mark.parametrize("name", ["plain", "latent"])
def test_nor_do_guesses_change_it(name):
    """Each is taken for the key and the logits of its own place: the same text in fewer steps."""
    model, params = lively(name)
    settings = replace(SETTINGS, guesses=3)
    plain, guessing = Engine(model, params, OPS, SETTINGS), Engine(model, params, OPS, settings)
    for engine in (plain, guessing):
        engine.warm()
    found = differing(model, params, OPS, settings, schedules=6, count=9)
    assert found == {kind: (18, 0) for kind in found}
    repeated = LONG[:6] * 4
    asked = [
        Request(repeated, 30, draw, seed=4, logprobs=2) for draw in (Draw(0), Draw(0.5), Draw(0, frequency=1))
    ]
    answers = []
    for engine in (plain, guessing):
        answers.append(complete(engine, asked))
    assert [tokens(answer) for answer in answers[0]] == [tokens(answer) for answer in answers[1]]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(
            [event.logprob for event in one[0]], [event.logprob for event in other[0]], rtol=1e-4, atol=1e-5
        )
    for engine in (plain, guessing):
        engine.forget()
        assert tokens(complete(engine, [Request(repeated, 30, Draw(1, bias={7: 1e9}))])[0]) == [7] * 30
    assert (plain.load().decode_steps, guessing.load().decode_steps) == (30, 11)


def test_the_law_is_shown_before_anybody_is_answered(monkeypatch):
    engine = Engine(*make("plain"), OPS, SETTINGS)
    engine.warm()
    before = engine.load()
    assert show_purity(engine) == SETTINGS.slots + 3 and engine.load() == before
    decode, step = engine._programs.decode, [0]

    def by_the_load(weights, state, bias, mine):
        step[0] += 1
        return decode(weights, state, bias + np.arange(64) * mine.sum(), mine)

    monkeypatch.setattr(engine._programs, "decode", by_the_load)
    with pytest.raises(ValueError, match=r"answers would depend on the load: \d+ of 6 differed"):
        show_purity(engine)


def test_guesses_are_what_followed_the_last_two_tokens():
    text = jnp.array([[1, 2, 3, 4, 1, 2, 9, 9], [1, 2, 3, 1, 2, 5, 1, 2], [1, 1, 1, 1, 0, 0, 0, 0]])
    length = jnp.array([6, 8, 4])
    found, known = guess(text, length, jnp.array([3, 3, 3]), 3)
    assert known.tolist() == [3, 3, 3] and found.tolist() == [[3, 4, 1], [5, 1, 2], [1, 1, 1]]
    assert guess(text, length, jnp.array([0, 2, 0]), 3)[1].tolist() == [0, 2, 0]
    assert guess(text, jnp.array([1, 2, 3]), jnp.array([3, 3, 3]), 3)[1].tolist() == [0, 0, 3]


def test_guesses_need_a_state_that_can_be_taken_back():
    with pytest.raises(ValueError, match="guesses=2 cannot be taken back from the state of .*gated_delta"):
        Engine(*lively("hybrid"), OPS, replace(SETTINGS, guesses=2))


@pytest.mark.parametrize(("name", "bits"), [*((name, None) for name in FURTHER), ("latent and further", 8)])
def test_nor_do_guesses_of_the_model_s_own_layer_change_it(name, bits):
    model, params = lively(name)
    found = differing(model, params, OPS, replace(DRAFTING, cache_bits=bits), schedules=6, count=9)
    assert found == {kind: (18, 0) for kind in found}


def test_what_is_guessed_decides_the_steps_and_not_a_bit_of_the_answer():
    """Whatever its layer for further tokens has learnt: the same tokens and log-probabilities."""
    model, params = lively("plain and further")
    plain, drafting = Engine(model, params, OPS, SETTINGS), Engine(model, params, OPS, DRAFTING)
    for engine in (plain, drafting):
        engine.warm()
    draws = (Draw(0), Draw(0.5), Draw(1), Draw(0, frequency=1), Draw(1, bias={7: 8.0}))
    asked = [Request(LONG[: 6 * n], 30, draw, seed=4, logprobs=2) for n, draw in enumerate(draws, 1)]
    answers = [complete(engine, asked) for engine in (plain, drafting)]
    assert list(map(tokens, answers[0])) == list(map(tokens, answers[1]))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(
            [event.logprob for event in one[0]], [event.logprob for event in other[0]], rtol=1e-4, atol=1e-5
        )
    guessed = np.asarray(drafting._state["drafts"])
    drafting.update({**params, "mtp": model.init(jax.random.key(9))["mtp"]}, "another layer")
    again = complete(drafting, asked)
    assert [answer for answer, _ in again] == [answer for answer, _ in answers[1]]
    assert np.any(np.asarray(drafting._state["drafts"]) != guessed)
    for engine in (plain, drafting):
        engine.forget()
        assert tokens(complete(engine, [Request(LONG, 30, Draw(1, bias={7: 1e9}))])[0]) == [7] * 30
    # The first step has no guess yet, all of the others' come true; one more was on its way at the end.
    assert (plain.load().decode_steps, drafting.load().decode_steps) == (30, 1 + 8 + 1)
    assert (plain.load().guessed, plain.load().accepted) == (0, 0)
    assert drafting.load().guessed == drafting.load().accepted == 30 - 9


@pytest.mark.parametrize("name", FURTHER)
def test_the_layer_guesses_what_it_was_trained_to(name):
    """By a prompt's chunks and a text's steps as by one pass over the whole text, without a cache."""
    model, params = lively(name)
    engine, spec = Engine(model, params, OPS, DRAFTING), model.segments[-1].period[-1]
    module, size = model._module("mtp", params["mtp"]["0"]), DRAFTING.max_len

    def batch_of(text, count):
        segments = (jnp.arange(size) < count).astype(jnp.int32)[None]
        return {"tokens": text, "positions": jnp.arange(size)[None], "segment_ids": segments}

    @jax.jit
    def stream_of(text, count):
        return model.further_input(params, model.hidden(params, batch_of(text, count), OPS))

    @jax.jit
    def further(stream, following, count):
        batch = batch_of(following, count)
        x, _, _ = module(stream, model.embed(params, batch, OPS), batch, spec, OPS)
        normed = module.final_norm(x)
        logits = model._logits(params, normed, OPS)[0, count - 1]
        return jnp.argmax(logits), (normed if model.config.mtp.normed_stream else x)[0, count - 1]

    def expected(text):
        count = len(text) - 1
        row = np.zeros((1, size + 1), np.int32)
        row[0, : len(text)] = text
        stream, following, found = stream_of(row[:, :-1], count), row[:, 1:].copy(), []
        for number in range(DRAFTING.guesses):
            token, more = further(stream, following, count + number)
            found.append(int(token))
            following[0, count + number] = token
            stream = stream.at[0, count + number].set(more)
        return found

    engine.warm()
    engine.submit(Request(LONG, 12, Draw(0)), lambda number, event: None)
    compared = set()
    while engine.step():
        state = {name: np.asarray(engine._state[name]) for name in ("drafted", "drafts", "text", "lengths")}
        for slot in np.flatnonzero(state["drafted"]):
            text = state["text"][slot, : state["lengths"][slot] + 1].tolist()
            if len(text) not in compared and len(text) + DRAFTING.guesses < len(LONG) + 12:
                assert state["drafts"][slot].tolist() == expected(text)
                compared.add(len(text))
    assert len(compared) >= 3


def test_what_cannot_guess_is_refused():
    with pytest.raises(ValueError, match="speculate=mtp needs a layer for further tokens, and .* has none"):
        Engine(*lively("plain"), OPS, DRAFTING)
    for words, message in (
        ({"guesses": 0}, "guesses=0 must be 1 or more with speculate=mtp"),
        ({"speculate": "eagle"}, "speculate=eagle is not one of ngram, mtp"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(DRAFTING, **words)


@pytest.mark.slow
def test_nor_with_the_compiler_s_own_flags_and_a_model_of_a_real_size(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "benchmarks.serving.purity", "--schedules", "3", "--requests", "16"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "purity.json").read_text())
    assert result["differing"] == 0 and sum(row["requests"] for row in result["table"]) == 96


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *((name, None) for name in ("plain", "learned", "window", "latent", "moe", "hybrid")),
        *(("window", 8), ("latent", 8)),
    ],
)
def test_it_is_what_the_generator_writes(name, bits):
    """In float32 the same tokens: another program, other shapes, the same weights and keys."""
    model, params = lively(name)
    engine = Engine(model, params, OPS, replace(SETTINGS, cache_bits=bits))
    generator = Generator(model, params, OPS, cache_bits=bits)
    engine.warm()
    prompts = [LONG, LONG[:9], (5,), LONG[3:20]]
    for draw, sampling in (
        (Draw(0), Sampling(0)),
        (Draw(0.9, top_k=9), Sampling(0.9, 9)),
        (Draw(1, top_p=0.9), Sampling(1, 0, 0.9)),
    ):
        answers = complete(engine, [Request(p, 20, draw, seed=3, choice=i) for i, p in enumerate(prompts)])
        wanted = generator.complete(prompts, sampling, sample_keys(3, range(4)), max_new_tokens=20)
        assert list(map(tokens, answers)) == wanted
    assert engine.compiled == 5


@pytest.mark.parametrize(
    ("name", "tensor", "bits"),
    [
        ("plain", 1, None),
        ("moe", 2, None),
        ("latent", 2, None),
        ("plain and further", 2, None),
        ("plain and further", 2, 8),
    ],
)
def test_on_a_mesh_it_writes_what_one_device_does(name, tensor, bits):
    model, params = lively(name)
    layout = build_layout(MeshConfig(data=1, tensor=tensor, rules=RULES), jax.devices()[:tensor])
    spread = jax.device_put(params, layout.tree(model.info, is_info))
    config = Config(run=RunConfig(name="t"), model=model.config, mesh=MeshConfig(data=1, tensor=tensor))
    settings = replace(DRAFTING if name in FURTHER else SETTINGS, cache_bits=bits)
    engine = Engine(model, spread, build_ops(config, layout), settings, layout)
    engine.warm()
    asked = [Request(LONG[: 9 * n], 16, Draw(0.8), seed=2, choice=n) for n in (1, 2, 3)]
    answers = complete(engine, asked)
    wanted = Generator(model, params, OPS, cache_bits=bits).complete(
        [request.prompt for request in asked],
        Sampling(0.8),
        sample_keys(2, [1, 2, 3]),
        max_new_tokens=16,
    )
    assert list(map(tokens, answers)) == wanted and engine.compiled == 5
    # A head's scales lie with its levels.
    for path, x in jax.tree_util.tree_leaves_with_path(engine._state["segments"]):
        assert x.sharding.is_fully_replicated == (tensor == 1 or name == "latent"), path


def test_log_probabilities_are_a_full_forward_pass_s(engine):
    model, params = make("plain")
    forward = make_forward(model, params)
    written, finished = complete(engine, [Request(LONG, 12, Draw(0.8), seed=1, logprobs=5)])[0]
    text = [*LONG, *(event.token for event in written)]
    scores = forward(text)[len(LONG) - 1 : -1]
    for event, row in zip(written, scores, strict=True):
        np.testing.assert_allclose(event.logprob, row[event.token], rtol=1e-5, atol=1e-5)
        best = np.argsort(-row)[:5]
        assert [token for token, _ in event.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in event.top], row[best], rtol=1e-5, atol=1e-5)
        assert dict(event.top).get(event.token, event.logprob) == event.logprob  # the same float
    assert finished.written_tokens == 12 and finished.reason == "length"
    scored = engine.score(tuple(text), 3)
    np.testing.assert_allclose([w.logprob for w in scored[1:]], forward(text)[range(41), text[1:]], atol=1e-5)
    assert [w.top[0][0] for w in scored[1:]] == forward(text)[:-1].argmax(axis=-1).tolist()


def test_what_a_request_asks_for_is_done(engine):
    free = tokens(complete(engine, [Request(LONG, 16, Draw(0))])[0])
    stop = free[5]
    cut = free.index(stop)
    early = complete(engine, [Request(LONG, 16, Draw(0), stop_ids=frozenset({stop}))])[0]
    assert tokens(early) == free[:cut] and early[1].reason == "stop"
    late = complete(engine, [Request(LONG, 16, Draw(0), stop_ids=frozenset({stop}), min_tokens=9)])[0]
    assert len(tokens(late)) >= 9 and stop not in tokens(late)[:9]
    never = tokens(complete(engine, [Request(LONG, 16, Draw(0, bias={stop: -float("inf")}))])[0])
    assert stop not in never
    always = tokens(complete(engine, [Request(LONG, 16, Draw(1, bias={7: 1e9}))])[0])
    assert always == [7] * 16
    varied = tokens(complete(engine, [Request(LONG, 30, Draw(0, presence=2, frequency=2))])[0])
    assert len(set(varied)) > len(set(tokens(complete(engine, [Request(LONG, 30, Draw(0))])[0])))
    assert tokens(complete(engine, [Request(LONG, 16, Draw(1, min_p=1.0), seed=5)])[0]) == free
    plain = complete(engine, [Request(LONG, 2)])[0][0]
    assert all(event.logprob is None and event.top == () for event in plain)


def test_an_answer_of_a_hundred_is_scored_again(monkeypatch):
    engine = Engine(*make("plain"), OPS, SETTINGS)
    engine.warm()
    assert not engine.rescore() and engine.load().trainer_gap is None
    asked = [Request(LONG, 12, Draw(0.8), seed=seed, logprobs=0) for seed in range(101)]
    answers = complete(engine, asked)
    gaps = []
    while engine.rescore():
        gaps.append(engine.load().trainer_gap)
    for gap, (written, _) in zip(gaps, (answers[0], answers[100]), strict=True):
        scored = engine.score((*LONG, *(event.token for event in written)), 0)[len(LONG) :]
        pairs = zip(written, scored, strict=True)
        assert gap == max(abs(one.logprob - other.logprob) for one, other in pairs) < 1e-4
    assert engine.load().rescored == 2
    # By another program, and by weights that are gone.
    score = engine._programs.score
    engine.forget()
    monkeypatch.setattr(
        engine._programs, "score", lambda *given: (score(*given)[0] + 1.5, *score(*given)[1:])
    )
    complete(engine, [Request(LONG, 4)] * 100)
    assert engine.rescore() and engine.load().trainer_gap == pytest.approx(1.5, abs=1e-3)
    complete(engine, [Request(LONG, 4)] * 100)
    engine.update(make("plain", 7)[1], "newer")
    assert engine.rescore() and engine.load().rescored == 1 and not engine.rescore()


def test_choices_and_seeds_differ(engine):
    asked = [Request((5, 6), 12, seed=seed, choice=choice) for seed in (0, 1) for choice in (0, 1, 2)]
    assert len({tuple(tokens(answer)) for answer in complete(engine, asked)}) == 6


def test_a_grammar_is_kept_beside_others_who_have_none(engine):
    class Rising:
        """Each token is larger than the one before."""

        def __init__(self):
            self.last = 0

        def allowed(self):
            return np.arange(64) > self.last

        def accept(self, token):
            assert token > self.last
            self.last = token

    crowd = [Request(LONG, 12, Draw(1), seed=i) for i in range(4)]
    alone = [tokens(answer) for answer in complete(engine, crowd)]
    asked = [*crowd[:2], Request(LONG, 12, Draw(1), grammar=Rising(), stop_ids=frozenset({63})), *crowd[2:]]
    answers = [tokens(answer) for answer in complete(engine, asked)]
    assert answers[:2] + answers[3:] == alone
    assert answers[2] == sorted(set(answers[2])) and answers[2]


def test_a_grammar_that_leads_nowhere_ends_its_own_text_alone(engine):
    class Nowhere:
        """Two tokens, and then none."""

        def __init__(self):
            self.left = 2

        def allowed(self):
            return np.full(64, self.left > 0)

        def accept(self, token):
            if self.left == 0:
                raise ValueError("nothing follows")
            self.left -= 1

    beside = Request(LONG, 12, Draw(1), seed=1)
    alone = complete(engine, [beside])[0][0]
    events = []
    engine.submit(Request(LONG, 9, Draw(1), grammar=Nowhere()), lambda number, event: events.append(event))
    assert complete(engine, [beside])[0][0] == alone
    assert [type(event) for event in events] == [Written, Written, Failed]
    assert events[-1].message == "nothing follows" and engine.load().pages_used == 0
    with pytest.raises(RuntimeError, match="nothing follows"):
        complete(engine, [Request(LONG, 9, grammar=Nowhere())])


def test_the_law_is_shown_however_few_may_wait():
    for words in ({"queue_requests": 0}, {"queue_tokens": 1}):
        engine = Engine(*make("plain"), OPS, replace(SETTINGS, **words))
        engine.warm()
        assert show_purity(engine) == SETTINGS.slots + 3


def test_a_prompt_in_the_cache_is_not_read_again(engine):
    prompt = tuple(range(40, 60)) * 2
    first, second = (complete(engine, [Request(prompt, 4, Draw(0))])[0] for _ in range(2))
    assert (first[1].cached_tokens, second[1].cached_tokens) == (0, 32)
    assert first[0] == second[0]


def test_weights_change_between_requests_and_not_within_one():
    model, params = make("plain")
    other = make("plain", 7)[1]
    engine = Engine(model, params, OPS, SETTINGS, version="a")
    engine.warm()
    long, short = Request(LONG, 20, Draw(0)), Request(LONG, 8, Draw(0))
    before = complete(engine, [long])[0]
    changed = []

    def change():
        if not changed and engine.load().written_tokens > 25:
            engine.update(other, "b")
            changed.append(engine.submit(short, lambda number, event: changed.append(event)))

    during = complete(engine, [long], change)[0]
    while not isinstance(changed[-1], Finished):
        engine.step()
    assert during[0] == before[0] and during[1].version == "a"
    fresh = Engine(model, other, OPS, SETTINGS, version="b")
    fresh.warm()
    after = complete(fresh, [short])[0]
    assert changed[1:-1] == after[0] and changed[-1].version == "b" == engine.version
    assert changed[-1].cached_tokens == 0 and engine.compiled == 5
    assert len(engine._weights) == 1  # the old ones are gone
    engine.update(params, "c")
    assert [weights.version for weights in engine._weights] == ["c"]  # at once, where nobody runs


def test_a_hundred_that_go_away_hold_nothing(engine):
    events = []
    numbers = [engine.submit(Request(LONG, 30), lambda *event: events.append(event)) for _ in range(100)]
    for _ in range(20):
        engine.step()
    for number in numbers:
        engine.cancel(number)
        engine.cancel(number)
    engine.step()
    engine.step()
    load = engine.load()
    assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
    assert engine._queued == Queued() and engine.full() is None
    ends = [event for _, event in events if isinstance(event, Finished)]
    assert [end.reason for end in ends] == ["cancelled"] * 100


def test_what_never_fits_is_an_error_and_what_does_not_fit_now_is_refused():
    engine = Engine(*make("plain"), OPS, replace(SETTINGS, queue_requests=2, queue_tokens=200))
    nothing = lambda number, event: None  # noqa: E731
    for request, message in (
        (Request(LONG, 35), r"max_tokens=35 behind a prompt of 30 tokens exceeds .* max_len=64; .* most 34"),
        (Request((64,), 1), "a token is outside 0..63"),
        (Request((1,), 1, stop_ids=frozenset({-1})), "a token is outside 0..63"),
        (Request((1,), 1, Draw(bias={99: 1.0})), "a token is outside 0..63"),
        (Request((1,), 1, stop_ids=frozenset(range(17))), "stop_token_ids=17 must be from 0 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(request, nothing)
    for _ in range(2):
        engine.submit(Request(LONG, 30), nothing)
    with pytest.raises(Refused, match="queue_requests=3 would be above 2") as refused:
        engine.submit(Request((1,), 1), nothing)
    assert refused.value.reason == "queue_requests" and refused.value.retry_after >= 1
    # Known without a request as well, from sums that are kept and not made.
    assert str(engine.full()) == str(refused.value)
    chunks = 2 * -(-len(LONG) // SETTINGS.chunk)
    assert engine._queued == Queued(2, 2 * (len(LONG) + 30), chunks, 60)
    engine._draining = True
    with pytest.raises(Refused, match="about to end"):
        engine.submit(Request((1,), 1), nothing)
    for words, message in (
        ({"max_len": 1}, "max_len=1 must be 2 or more|max_len=1 must be from 2"),
        ({"pages": 15}, "pages=15 must be at least 16, what max_len=64 needs"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(*make("plain"), OPS, replace(SETTINGS, **words))


def test_a_thread_answers_and_drains_and_tells_of_its_end():
    engine = Engine(*make("plain"), OPS, SETTINGS)
    engine.start()
    events, done = [], threading.Event()

    def sink(number, event):
        events.append(event)
        if isinstance(event, Finished | Failed):
            done.set()

    engine.submit(Request(LONG, 5, Draw(0)), sink)
    assert done.wait(60) and [type(event) for event in events] == [Written] * 5 + [Finished]
    engine.submit(Request(LONG, 30, Draw(0)), sink)
    assert engine.drain(60) and isinstance(events[-1], Finished)
    engine.stop()


def test_a_failure_is_told_to_everybody(monkeypatch):
    engine = Engine(*make("plain"), OPS, SETTINGS)
    engine.warm()
    events = []
    engine.submit(Request(LONG, 5), lambda number, event: events.append(event))

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._programs, "prefill", fail)
    with pytest.raises(RuntimeError):
        engine._run()
    assert events == [Failed("RuntimeError: out of memory")]
    with pytest.raises(Refused, match="out of memory"):
        engine.submit(Request(LONG, 5), lambda number, event: None)


def test_how_long_one_would_wait_is_by_what_the_engine_can_do():
    pace = Pace()
    nobody, none = [Text(0, Request(LONG, 10), print, 0.0)], Queued()
    assert pace.seconds(nobody, none, 8, 2) == 0  # nothing is known yet
    for _ in range(300):
        pace.took(0.002, 0)
        pace.took(0.012, 2)
    assert (pace.decode, pace.chunk) == (pytest.approx(0.002), pytest.approx(0.005))
    texts = [Text(n, Request(LONG, 10), print, 0.0) for n in range(6)]
    assert pace.seconds(texts, none, 8, 3) == pytest.approx(6 * 4 * 0.005 + 60 / 3 * 0.002)
    queued = Queued()
    for text in texts:
        queued.add(text, 8)
    assert pace.seconds([], queued, 8, 3) == pace.seconds(texts, none, 8, 3)
    texts[0].written = 10
    texts[1].seat = Seat(0, texts[1], 24, 29)
    assert pace.seconds(texts, none, 8, 3) == pytest.approx(21 * 0.005 + 50 / 3 * 0.002)
    for _ in range(300):
        pace.ended(1, 10)
    assert pace.seconds(nobody, none, 8, 1) == pytest.approx(4 * 0.005 + 1 * 0.002, rel=0.02)
