"""Whole runs of objectives that need other weights, or texts that the run draws itself."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from common.checks import ConfigError
from data.pipeline import prepare
from scripts.make_arithmetic import main as make_arithmetic
from serving.generator import Generator
from tests.objectives.test_forms import LABELS, PAIRS, written
from training.figures.teacher import teacher_scorer
from training.loop import fit
from training.objectives.base import build_objective
from training.objectives.distill import Distill
from training.opening.opened import open_run
from training.rollouts.draw import Rollouts, prompts_of
from training.rollouts.rewards import rewards_of

TINY = (
    *("model.num_layers=1", "schedule=constant", "schedule.warmup_steps=1", "data.validation_fraction=0.2"),
    *("eval.every=100", "eval.batches=2", "checkpoint.every=100", "training.global_batch_size=8"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    written(folder / "pairs.jsonl", PAIRS)
    told = [{**one, "completion": "yes" if one["label"] else "no, never"} for one in LABELS]
    written(folder / "labels.jsonl", told)
    assert make_arithmetic([str(folder / "sums.jsonl"), "count=90", "digits=1"]) == 0
    return folder


@pytest.fixture(scope="module")
def parent(ground, files):
    words = (*TINY, "training.num_steps=4", "data.format=completion", "data.packing=best_fit")
    assert fit(ground.config("parent", *words, f"data.path={files / 'sums.jsonl'}", "objective=sft")) == 0
    return "parent"


def words_of(files, kind, objective, *extra):
    form = {"pairs": "pairs", "labels": "labels", "sums": "completion"}[kind]
    return (
        *(*TINY, f"data.path={files / kind}.jsonl", f"data.format={form}", "data.packing=none"),
        *(f"objective={objective}", "init_from=parent", "tokenizer=inherit", "data.seq_len=64", *extra),
    )


def losses(ground, name):
    return [row["loss"] for row in ground.rows(name) if "loss" in row]


def test_dpo_begins_at_its_reference_learns_the_order_and_resumes_to_the_bit(ground, files, parent):
    words = words_of(files, "pairs", "dpo", "optim.learning_rate=0.003", "objective.beta=0.5")
    assert fit(ground.config("dpo", *words, "training.num_steps=16")) == 0
    assert losses(ground, "dpo")[0] == pytest.approx(math.log(2), abs=1e-5)
    rows = [row for row in ground.rows("dpo") if "loss" in row]
    assert rows[-1]["loss"] < 0.3 and rows[-1]["rewards/accuracy"] == 1
    assert rows[-1]["rewards/margin"] > 0 > rows[-1]["rewards/rejected"]

    # Stopped, and gone on with: the reference is the parent's even so, from the file and made anew.
    for steps in (3, 5):
        assert fit(ground.config("dpo-later", *words, f"training.num_steps={steps}")) == 0
    for damaged in (ground.path / "data/figures").glob("*/reference_logprobs.npy"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert fit(ground.config("dpo-later", *words, "training.num_steps=16")) == 0
    assert losses(ground, "dpo-later") == losses(ground, "dpo")


def test_kto_begins_at_half(ground, files, parent):
    words = words_of(files, "labels", "kto", "optim.learning_rate=0.003")
    assert fit(ground.config("kto", *words, "training.num_steps=8")) == 0
    rows = [row for row in ground.rows("kto") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5) and rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]


@pytest.mark.parametrize(
    "extra",
    [(), ("objective.updates=2", "objective.kl_weight=0.1")],
    ids=["one update", "two, and a reference"],
)
def test_answers_drawn_by_a_run_are_a_function_of_seed_and_step(ground, files, parent, extra):
    """Stopped in the middle of a draw's updates, too."""
    own = ("objective.group=4", "objective.max_new_tokens=4", "objective.reward=number", *extra)
    words = words_of(files, "sums", "grpo", *own, "optim.learning_rate=0.01", "objective.attempts=6")
    name = "drawn" + "-twice" * bool(extra)
    assert fit(ground.config(name, *words, "training.num_steps=6")) == 0
    for steps in (3, 6):
        assert fit(ground.config(f"{name}-again", *words, f"training.num_steps={steps}")) == 0
    known, again = ([row for row in ground.rows(n) if "loss" in row] for n in (name, f"{name}-again"))
    assert known == again and sum(row["kept"] for row in known) > 1
    folders = (ground.run(n) / "rollouts" for n in (name, f"{name}-again"))
    told, told_again = ([path.read_text() for path in sorted(folder.glob("*.jsonl"))] for folder in folders)
    assert told == told_again and len(told) == (3 if extra else 6)
    for line in "".join(told).splitlines():
        group = json.loads(line)
        assert rewards_of("number", [(a, group["wanted"]) for a in group["answers"]]) == group["rewards"]
        assert len(set(group["rewards"])) > 1  # what teaches nothing was left out


@pytest.mark.parametrize(
    ("mesh", "precision", "nats"),
    [
        ((), "float32", 1e-5),
        (("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"), "float32", 1e-5),
        ((), "bfloat16", 2e-3),
    ],
    ids=["one", "fsdp2-tensor2", "bfloat16"],
)
def test_sampler_and_trainer_agree_on_every_token(ground, files, parent, mesh, precision, nats):
    """In nats of every token, whichever of them says it."""
    from parallel.mesh import build_layout
    from training.config import with_vocab
    from training.program import build_program

    own = ("objective.group=4", "objective.max_new_tokens=8", "objective.updates=2", "model.vocab_size=384")
    own = (*own, f"training.precision={precision}")
    config = with_vocab(ground.config("never", *words_of(files, "sums", "grpo", *own, *mesh)), 257)
    program = build_program(config, build_layout(config.mesh, jax.devices()[: 4 if mesh else 1]))
    prepared = prepare(config.data, config.tokenizer.__class__(kind="byte"), progress=False)
    params = program.init_state(3).params
    placed = {name: leaf.sharding for name, leaf in program.batch.items()}

    class Folder:
        path = ground.path / "never"

    Folder.path.mkdir(exist_ok=True)
    rollouts = Rollouts(
        program, config, prepared.train, prepared.tokenizer, Folder, lambda b: jax.device_put(b, placed)
    )
    rollouts.objective.__dict__["reward"] = "number"
    groups = [
        (p, rollouts.drawing.answers(params, [p] * 4, 1.0, 0, list(range(4))), np.arange(4.0))
        for p in rollouts.prompts[:2]
    ]
    batch = rollouts._rows(groups, 0.0)
    trainers = np.asarray(rollouts._score(params, jax.device_put(batch, placed)))
    texts = [[*prompt.ids, *answer] for prompt, answers, _ in groups for answer in answers]
    starts = [len(prompt.ids) for prompt, answers, _ in groups for _ in answers]
    generator = Generator(program.model, program.to_canonical(params), program.ops, program.layout)
    for row, (scores, start) in enumerate(zip(generator.score(texts, starts), starts, strict=True)):
        counted = batch["loss_weights"][row] > 0
        assert counted.sum() == len(scores) and counted.argmax() == start - 1
        np.testing.assert_allclose(trainers[row][counted], scores, rtol=0, atol=nats)
    shutil.rmtree(Folder.path)


def test_a_teacher_is_asked_once_and_one_that_is_the_model_teaches_nothing(ground, files, parent):
    teacher = ("objective.teacher=" + str(ground.run("parent")), "objective.targets=6")
    words = words_of(files, "sums", "distill", *teacher)
    assert fit(ground.config("pupil", *words, "training.num_steps=2")) == 0
    rows = [row for row in ground.rows("pupil") if "loss" in row]
    assert abs(rows[0]["loss"]) < 1e-5 and rows[0]["nll"] > 1
    assert rows[0]["grad_norm"] < 1e-3


def test_what_a_teacher_says_is_its_distribution(ground, parent):
    opened = open_run(str(ground.run("parent")))
    model, params, ops, _ = opened.trained
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, (2, 12)).astype(np.int32)
    batch = {
        **{"tokens": tokens, "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))},
        "segment_ids": np.ones((2, 12), np.int32),
    }
    known = np.asarray(jax.nn.log_softmax(model.apply(params, batch, ops)))
    top = Distill(teacher="any", targets=5)
    said = teacher_scorer(opened, top, 0)(batch)
    ids = np.moveaxis(said["soft_targets"], 0, -1)
    np.testing.assert_array_equal(ids, np.argsort(-known, -1, kind="stable")[..., :5])
    wanted = np.take_along_axis(known, ids, -1)
    np.testing.assert_allclose(np.moveaxis(said["teacher_logprobs"], 0, -1), wanted, atol=1e-6)

    drawn = teacher_scorer(opened, Distill(teacher="any", targets=4000, support="sampled"), 0)(batch)
    share = np.stack([(drawn["soft_targets"] == token).mean(0) for token in range(known.shape[-1])], -1)
    # Four deviations of a share of 4,000.
    assert (np.abs(share - np.exp(known)) < 4 * np.sqrt(np.exp(known) / 4000) + 1e-3).all()
    np.testing.assert_allclose(drawn["teacher_logprobs"], -np.log(4000), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "objective", "extra", "message"),
    [
        ("pairs", "dpo", ("init_from=null", "tokenizer=byte"), "give init_from=RUN"),
        ("sums", "dpo", (), "objective=dpo needs data.format=pairs, not completion"),
        ("pairs", "next_token", (), "would learn from the worse answers"),
        (
            "pairs",
            "dpo",
            ("training.global_batch_size=7", "mesh.data=1", "mesh.tensor=8"),
            "use a multiple of 2",
        ),
        ("sums", "grpo", ("objective.group=3",), "objective.group=3; use 9"),
        ("sums", "grpo", ("data.seq_len=16", "objective.group=4"), "use data.seq_len="),
        ("sums", "grpo", ("guard.rollback_batches=2",), "draws its own"),
        ("sums", "grpo", ("objective.reward=numbre",), "objective.reward=numbre"),
        ("sums", "distill", (), "needs objective.teacher=RUN"),
        ("sums", "distill", ("objective.teacher=nobody",), "nobody"),
    ],
)
def test_what_does_not_fit_is_said_beforehand(ground, files, parent, kind, objective, extra, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        fit(ground.config("refused", *words_of(files, kind, objective, *extra), "training.num_steps=2"))
    assert not (ground.run("refused") / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "answer", "wanted", "worth"),
    [
        ("number", "so it is 1,234.", "1234", 1),
        ("number", "12 or 13", "12", 0),
        ("number", "none", "12", 0),
        ("number", "-5", "5", 0),
        ("text", " a b ", "a b", 1),
        ("text", "a  b", "a b", 0),
    ],
)
def test_rewards(name, answer, wanted, worth):
    assert rewards_of(name, [(answer, wanted)]) == [worth]


def test_prompts_are_what_stands_before_the_answer(ground, files, parent):
    config = ground.config("never", *words_of(files, "sums", "grpo"))
    prepared = prepare(config.data, config.tokenizer.__class__(kind="byte"), progress=False)
    for prompt in prompts_of(prepared.train, prepared.tokenizer, 20):
        text = prepared.tokenizer.decode(list(prompt.ids))
        a, sign, b = text[0], text[1], text[2]
        assert text[3:] == "=" and int(prompt.wanted) == int(a) + (1 if sign == "+" else -1) * int(b)
    assert build_objective({"name": "grpo"}).draws
