"""What lm-evaluation-harness is told, against full forward passes, and against its own HFLM where that is.

An environment of its own has lm-eval, torch and transformers; CAMBRIAN_LMEVAL_PYTHON names its Python.
"""

import json
import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from evaluation.harness import HarnessMethods, harness_model
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from scripts.export import main as export
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from training.loop import fit

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("CAMBRIAN_LMEVAL_PYTHON")
CONFIG = ModelConfig(
    vocab_size=257, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=48
)
TEXTS = ["a quick brown fox", "x", "é" * 20]


@dataclass(frozen=True)
class Request:
    """The part of lm-eval's Instance that a model reads."""

    args: tuple


@pytest.fixture(scope="module", params=["rope", "learned"])
def subject(request):
    """(methods, log-probabilities of a text's tokens behind each of its tokens)."""
    model = build_model(replace(CONFIG, position=request.param))
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, model.init(jax.random.key(1)))
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    apply = jax.jit(partial(model.apply, ops=Ops()))

    def forward(text):
        row = np.zeros((1, 48), np.int32)
        row[0, : len(text)] = text
        segments = (np.arange(48) < len(text)).astype(np.int32)[None]
        batch = {"tokens": row, "positions": np.arange(48, dtype=np.int32)[None], "segment_ids": segments}
        return np.asarray(jax.nn.log_softmax(apply(params, batch)[0, : len(text)]))

    return HarnessMethods(Generator(model, params, Ops()), tokenizer, add_bos=True), forward


def pairs(methods):
    """Contexts with continuations: drawn ones, and each time what the model itself would write."""
    rng = np.random.default_rng(0)
    found = []
    for size in (1, 2, 6):
        context = rng.integers(0, 257, 10 + size).tolist()
        keys = sample_keys(0, [0])
        own = methods.generator.complete([context], Sampling(0), keys, max_new_tokens=size)[0]
        near = [*own[:-1], (own[-1] + 1) % 257]
        found += [(None, context, rest) for rest in (own, near, rng.integers(0, 257, size).tolist())]
    return found


def test_log_likelihoods_and_what_is_greedy_are_a_forward_pass_s(subject):
    methods, forward = subject
    requests = pairs(methods)
    answers = methods._loglikelihood_tokens(requests)
    assert {same for _, same in answers} == {True, False}
    for (_, context, rest), (total, same) in zip(requests, answers, strict=True):
        scores = forward([*context, *rest])[len(context) - 1 : -1]
        assert math.isclose(total, sum(scores[range(len(rest)), rest]), rel_tol=1e-4, abs_tol=1e-4)
        assert same == (scores.argmax(axis=-1).tolist() == rest)
    order = np.random.default_rng(1).permutation(len(requests))
    again = methods._loglikelihood_tokens([requests[i] for i in order])
    np.testing.assert_allclose(again, [answers[i] for i in order], rtol=1e-6)  # in the order asked


def test_a_context_too_long_loses_its_beginning(subject):
    methods, _ = subject
    context = np.random.default_rng(2).integers(0, 257, 90).tolist()
    limit = methods.max_length + 1
    short, long = (
        methods._loglikelihood_tokens([(None, c, [7, 8])])[0] for c in (context[2 - limit :], context)
    )
    assert short == long


def test_a_rolling_text_is_every_token_once_from_bos(subject):
    methods, forward = subject
    texts = ["", "short", "0123456789" * 11]
    wanted = []
    for text in texts:
        tokens = [methods.prefix_token_id, *text.encode()]  # of a byte tokenizer
        tokens = [tokens[0], *methods.tok_encode(text, add_special_tokens=False)]
        total, size = 0.0, methods.max_length
        for at in range(1, len(tokens)):
            window = (at - 1) // size  # windows predict `size` tokens each; the last one reads further back
            end = min((window + 1) * size + 1, len(tokens))
            begin = max(0, end - 1 - size)
            total += float(forward(tokens[begin:at])[-1][tokens[at]])
        wanted.append(total)
    got = methods.loglikelihood_rolling([Request((text,)) for text in texts])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_texts_end_where_they_are_told(subject):
    methods, _ = subject
    settings = {"until": [], "max_gen_toks": 40, "do_sample": False}
    whole = methods.generate_until([Request((text[:5], settings)) for text in TEXTS])
    heads = [methods.tok_encode(text[:5]) for text in TEXTS]
    room = methods.max_length - 40
    plain = methods.generator.complete(
        [head[-room:] for head in heads],
        Sampling(0, vocab_size=257),
        sample_keys(0, range(3)),
        max_new_tokens=40,
        stop_id=methods.eot_token_id,
    )
    assert whole == [methods._tokens.decode(tail) for tail in plain] and all(whole)
    ends = [text[3:5] for text in whole]
    cut = methods.generate_until(
        [
            Request((text[:5], {**settings, "until": [end, "\0none"]}))
            for text, end in zip(TEXTS, ends, strict=True)
        ]
    )
    assert cut == [text[: text.index(end)] for text, end in zip(whole, ends, strict=True)]
    drawn = [
        Request((text[:5], {"temperature": 1.0, "max_gen_toks": 9 - i % 2})) for i, text in enumerate(TEXTS)
    ]
    assert methods.generate_until(drawn) == methods.generate_until(drawn) != whole
    assert methods.generate_until([]) == []


def test_bad_settings_are_refused(subject):
    methods, _ = subject
    for words, message in (
        ({"num_beams": 4}, "generation_kwargs.num_beams=4 must be left out; known are until"),
        ({"max_gen_toks": 99}, "generation_kwargs.max_gen_toks=99 must be 1 to 4[67], so that"),
        ({"do_sample": True, "top_p": 7, "max_gen_toks": 4}, "top_p=7"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.generate_until([Request(("a", words))])


def test_bos_is_said_and_asked_for(subject, capsys):
    methods, _ = subject
    plain = HarnessMethods(methods.generator, methods._tokens, add_bos=False)
    assert "'<|endoftext|>' (256) begins an empty context and each rolling text" in capsys.readouterr().out
    assert plain.tok_encode("ab") == methods.tok_encode("ab")[1:] == methods.tok_encode("ab", False)
    assert methods.tok_encode("ab")[0] == methods.prefix_token_id == plain.tok_encode("ab", True)[0]
    assert plain.tokenizer_name != methods.tokenizer_name


def test_without_lm_eval_the_command_that_installs_it_is_named(subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-eval is not installed .*; pip install '.\[lm-eval\]'"):
        harness_model(subject[0].generator, subject[0]._tokens)


CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST_WORD = """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITE = """
output_type: generate_until
doc_to_text: "the {{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [" a", "\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path) -> None:
    """Sixteen documents of drawn words, and four tasks over them."""
    rng = np.random.default_rng(5)
    words = "the quick brown fox jumps over lazy dogs and returns to import a class of def".split()

    def some(count):
        return " ".join(rng.choice(words, count))

    rows = [
        {
            "question": some(3 + i % 9) if i else "",
            "choices": [" " + some(1 + (i + j) % 4) for j in range(4)],
            "gold": i % 4,
            "text": some(8 + 6 * i),
        }
        for i in range(16)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in {"choice": CHOICE, "last_word": LAST_WORD, "rolling": ROLLING, "write": WRITE}.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        data = f"dataset_kwargs: {{data_files: {{test: {folder}/rows.json}}}}\n"
        (folder / f"{name}.yaml").write_text(head + data + text)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="CAMBRIAN_LMEVAL_PYTHON names no Python with lm-eval and torch")
def test_the_harness_s_own_model_answers_the_same(ground, tmp_path):
    """The same run, ours and exported, through `simple_evaluate`: log-likelihoods 1e-3, the same answers."""
    words = ("training.num_steps=4", "eval.every=4", "checkpoint.every=4", "schedule.warmup_steps=1")
    # No padded rows: transformers would write them, where so little was learnt.
    bpe = (
        "tokenizer=bpe",
        "tokenizer.vocab_size=280",
        "model.vocab_size=280",
        "data.seq_len=64",
        "model.max_seq_len=64",
        "model.tie_embeddings=false",
    )
    assert fit(ground.config("harness", *words, *bpe)) == 0
    assert export([str(ground.run("harness")), f"output={tmp_path}/out"]) == 0
    write_tasks(tmp_path)
    site = sysconfig.get_paths()["purelib"]
    for bos in (False, True):
        for kind, source in (("ours", ground.run("harness")), ("theirs", tmp_path / "out")):
            command = [PYTHON, "tests/evaluation/harness_oracle.py", kind, source, tmp_path, str(bos), site]
            subprocess.run(command if kind == "ours" else command[:-1], cwd=ROOT, check=True)
        got, wanted = (
            json.loads((tmp_path / f"{kind}-{bos}.json").read_text()) for kind in ("ours", "theirs")
        )
        assert got["about"] == wanted["about"]
        for task, answers in wanted["samples"].items():
            for ours, theirs in zip(got["samples"][task], answers, strict=True):
                same_answers(ours, theirs)
        print(bos, got["results"], wanted["results"])


def same_answers(ours, theirs):
    """Numbers to 1e-3, everything else exactly."""
    if isinstance(theirs, list):
        for pair in zip(ours, theirs, strict=True):
            same_answers(*pair)
    elif isinstance(theirs, float):
        assert abs(ours - theirs) < 1e-3, (ours, theirs)
    else:
        assert ours == theirs
