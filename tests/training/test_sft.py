"""Fine-tuning on conversations: only the assistant's tokens teach, from a parent's weights and tokenizer."""

import json
import math
import shutil
from functools import cache

import jax
import numpy as np
import pytest

from data.config import DataConfig, TokenizerConfig
from data.loading.loader import Loader
from data.pipeline import prepare
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from parallel.schedules.accumulate import GradientAccumulation
from scripts.generate import main as generate
from training.evaluate import evaluate
from training.loop import fit
from training.objectives.next_token import NextToken

ANSWERS = ("red as a brick", "blue as the sea", "green as grass")
MODEL = ModelConfig(
    num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32, vocab_size=384
)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with path.open("w") as file:
        for i in range(60):
            turns = [f"what colour is thing {i}?", ANSWERS[i % 3], "sure?", f"yes, thing {i} is"]
            messages = [
                {"role": ("user", "assistant")[n % 2], "content": said} for n, said in enumerate(turns)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def batch(conversations, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    data = DataConfig(
        source="folder", path=str(conversations), cache_dir=str(cache), format="chat", seq_len=64, workers=1
    )
    prepared = prepare(data, TokenizerConfig(kind="byte"), progress=False)
    return Loader(prepared, data, global_batch_size=4, seed=0).batch(0)


@pytest.fixture(scope="module")
def gradients():
    model = build_model(MODEL)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model.init(jax.random.key(0)))

    @cache
    def compiled(steps):
        plain = GradientAccumulation(accumulation_steps=steps)
        return jax.jit(
            lambda b: plain.value_and_grad(NextToken(), model, params, b, jax.random.key(0), Ops())
        )

    def of(batch, steps=1):
        means, grads = compiled(steps)(batch)
        return float(means["nll"]), [np.asarray(g) for g in jax.tree.leaves(grads)]

    return model, params, of


def test_what_others_say_teaches_nothing_as_a_target(batch, gradients):
    """Their tokens are context alone: other targets in their place give the same gradients, bit by bit."""
    of = gradients[2]
    others = batch["loss_weights"] == 0
    assert 0.2 < others.mean() < 0.9
    scrambled = np.where(others, (batch["targets"] + 17) % 257, batch["targets"])
    loss, grads = of(batch)
    same_loss, same = of({**batch, "targets": scrambled})
    assert loss == same_loss and all(np.array_equal(a, b) for a, b in zip(grads, same, strict=True))
    taught, changed = of({**batch, "loss_weights": np.ones_like(batch["loss_weights"]), "targets": scrambled})
    assert taught != loss and any(np.abs(a - b).max() > 1e-4 for a, b in zip(grads, changed, strict=True))


def test_microbatches_of_unequal_weight_add_up_and_none_is_nan(batch, gradients):
    of = gradients[2]
    weights = batch["loss_weights"].copy()
    weights[::2] = 0  # rows 0 and 2, which are the first microbatch of two: it has nothing to learn
    uneven = {**batch, "loss_weights": weights}
    loss, grads = of(uneven)
    split_loss, split = of(uneven, 2)
    assert math.isclose(loss, split_loss, rel_tol=1e-5)
    for a, b in zip(grads, split, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3)
    loss, grads = of({**batch, "loss_weights": np.zeros_like(weights)})
    assert loss == 0 and all(np.array_equal(g, np.zeros_like(g)) for g in grads)


def test_evaluation_divides_by_the_weight_of_all_batches(batch, gradients):
    model, params, _ = gradients
    step = jax.jit(lambda p, b: GradientAccumulation().evaluate(model, p, b, Ops()))
    silent = {**batch, "loss_weights": np.zeros_like(batch["loss_weights"])}
    one, two = (evaluate(step, params, batches, 100) for batches in ([batch], [silent, batch]))
    assert one == two and math.isfinite(one["eval/loss"])


def test_a_finished_run_learns_to_answer_and_goes_on_without_its_parent(ground, conversations, capsys):
    tiny = (
        "model.num_layers=1",
        "eval.every=20",
        "checkpoint.every=20",
        "schedule=constant",
        "schedule.warmup_steps=1",
    )
    assert fit(ground.config("taught", *tiny, "training.num_steps=2")) == 0
    words = (
        *(*tiny, "init_from=taught", "tokenizer=inherit", f"data.path={conversations}", "data.format=chat"),
        *("data.packing=best_fit", "optim.learning_rate=0.01", "data.seq_len=64", "eval.every=20"),
        *("data.validation_fraction=0.2", "sample.prompts=['what colour is thing 7?']"),
    )
    assert fit(ground.config("answers", *words, "training.num_steps=40")) == 0
    held_out = {row["step"]: row["eval/loss"] for row in ground.rows("answers") if "eval/loss" in row}
    assert held_out[40] < 0.7 * held_out[20] < 4
    # Before it learns it is as good as the weights that it begins with.
    assert 5 < held_out.pop(0) and list(held_out) == [20, 40]
    manifest = json.loads((ground.run("answers") / "manifest.json").read_text())
    assert (
        manifest["parent"]["step"] == 2
        and manifest["data"]["description"]["chat_template"]["name"] == "default"
    )
    tokenizer = (ground.run("answers") / "tokenizer.json").read_bytes()
    assert tokenizer == (ground.run("taught") / "tokenizer.json").read_bytes()

    # Its own tokenizer and template from here on.
    shutil.rmtree(ground.run("taught"))
    assert fit(ground.config("answers", *words, "training.num_steps=42")) == 0
    assert [row["step"] for row in ground.rows("answers") if "loss" in row] == list(range(1, 43))
    capsys.readouterr()
    command = [str(ground.run("answers")), "prompt=what colour is thing 7?", "max_new_tokens=8"]
    assert generate([*command, "temperature=0"]) == 0
    said = capsys.readouterr().out.strip("\n").split("\n")
    assert said[0] == "what colour is thing 7?" and len(said) >= 1
    assert generate([*command, "temperature=0", "chat=never"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tokenizer=inherit",), "give init_from=RUN"),
        (("tokenizer.chat_template=x.jinja",), "has no effect on data.format=text"),
    ],
    ids=["no parent", "no conversations"],
)
def test_what_conversations_need_is_said_beforehand(ground, words, message):
    from common.checks import ConfigError
    from training.legal.check import check

    with pytest.raises(ConfigError, match=message):
        check(ground.config("never", *words), 8)
