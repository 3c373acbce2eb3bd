"""A corpus that drifts at a known place: named; a planted regression refused, a sound candidate in use."""

import json
import os
import random
import shutil

import pytest

import scripts.retrain as errand
from scripts.retrain import REFUSED, main
from tests.training.ground import WORDS, make_ground
from training.loop import fit

LATER = "zinc yacht xenon waxes vivid umbra tulip sonar rhino quartz pixel onyx nymph mango lilac".split()
BASE = ("data.validation_fraction=0.3", "eval.every=1000", "checkpoint.every=10", "schedule=constant")
CHANGES = ("training.num_steps=40", "optim.learning_rate=0.003")


def write_texts(folder, words, prefix, count):
    rng = random.Random(prefix)
    for number in range(count):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(30, 60)))
        (folder / f"{prefix}{number}.txt").write_text(text)


@pytest.fixture(scope="module")
def line(tmp_path_factory, compile_cache):
    """A run on texts of before, and a folder that has others since."""
    ground = make_ground(tmp_path_factory.mktemp("line"), compile_cache)
    write_texts(ground.path / "texts", WORDS, "old", 60)
    words = (*BASE, "training.num_steps=40", "optim.learning_rate=0.003", "model.num_layers=1")
    assert fit(ground.config("base", *words)) == 0
    assert retrained(ground) == 0  # nothing is new
    assert os.readlink(ground.path / "runs/base.live") == "base"
    write_texts(ground.path / "texts", LATER, "new", 90)
    return ground


def retrained(ground, *words):
    return main(["base", f"runs={ground.path / 'runs'}", "documents=64", *words])


def decision(ground, name):
    return json.loads((round_of(ground, name) / "decision.json").read_text())


def round_of(ground, name):
    return ground.path / "runs/base.rounds" / name.rpartition(".")[2]


@pytest.mark.slow
def test_a_regression_is_refused_kills_change_nothing_and_a_sound_one_is_in_use(line, monkeypatch, capsys):
    # 1. What would lose on everything stays out.
    assert (
        retrained(line, "optim.learning_rate=3.0", "training.num_steps=12", "optim.grad_clip=null") == REFUSED
    )
    refused = decision(line, "base.1")
    assert not refused["promoted"] and "worse on old documents" in refused["reasons"][0]
    drift = json.loads((round_of(line, "base.1") / "drift.json").read_text())
    assert drift["verdict"].startswith("drift in") and drift["loss"]["difference"] > 0.05
    assert os.readlink(line.path / "runs/base.live") == "base"

    # 2. Killed before training, in its middle, behind the comparison, and between the link and the decision.
    def killed(*_, **__):
        raise KeyboardInterrupt

    class Half:
        def __call__(self, config):
            config.training.num_steps = 20
            assert errand_train(config) == 0
            raise KeyboardInterrupt

    errand_train, decide, compare = errand.train, errand.decide, errand.compare
    with monkeypatch.context() as patched:
        for name, replacement in (
            ("train", killed),
            ("train", Half()),
            ("compare", killed),
            ("decide", killed),
        ):
            patched.setattr(errand, "train", errand_train)
            patched.setattr(errand, name, replacement)
            with pytest.raises(KeyboardInterrupt):
                retrained(line, *CHANGES)
        patched.setattr(errand, "train", errand_train)
        patched.setattr(errand, "compare", compare)
        patched.setattr(errand, "decide", decide)
        patched.setattr(
            errand.Round,
            "once",
            lambda one, name, make, once=errand.Round.once: (
                killed() if name == "decision" else once(one, name, make)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            retrained(line, *CHANGES)
    assert os.readlink(line.path / "runs/base.live") == "base.2"  # whoever follows it sees a whole run
    assert not (round_of(line, "base.2") / "decision.json").exists()
    assert retrained(line, *CHANGES) == 0
    made = decision(line, "base.2")
    assert made["promoted"] and made["new"]["interval"][1] < 0 and made["old"]["interval"][0] <= 0
    assert (
        json.loads((line.run("base.2") / "manifest.json").read_text())["parent"]["path"].split("/")[-2]
        == "base"
    )
    assert [row["step"] for row in line.rows("base.2") if "loss" in row] == list(range(1, 41))

    # 3. Undisturbed it comes to the same.
    os.rename(line.run("base.2"), line.run("kept"))
    shutil.rmtree(round_of(line, "base.2"))
    errand.point(line.path / "runs/base.live", "base")
    assert retrained(line, *CHANGES) == 0
    steps, kept = ([row for row in line.rows(name) if "loss" in row] for name in ("base.2", "kept"))
    assert decision(line, "base.2") == made and steps == kept

    # 4. The next round begins at what is in use, and has nothing to learn.
    capsys.readouterr()
    assert retrained(line, *CHANGES) == 0
    assert "nothing is new" in capsys.readouterr().out and not line.run("base.3").exists()


def test_a_server_follows_the_line(line):
    from scripts.serve import LINE, follower, parse_options

    class Engine:
        version = "40-abc"
        served = None

        def update(self, params, version):
            self.served = version

    link = line.path / "runs/linked.live"
    link.symlink_to("base")
    follow = follower(parse_options([str(link), "follow=true"]), Engine())
    assert not follow.look() and follow.followed.step == 40
    shutil.copytree(line.run("base"), line.run("linked.7"))
    shutil.rmtree(line.run("linked.7") / "checkpoints/40")
    errand.point(link, "linked.7")
    assert follow.look() and follow.followed.step == 7 * LINE + 30  # fewer steps than the run before it
    assert follow._engine.served.startswith("30-")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "run=nobody is no run"),
        (["base", "documents=few"], "documents=few is not a whole number"),
        (["base", "optim.learning_rat=1"], "learning_rat"),
    ],
)
def test_bad_words_are_one_line(line, words, message, capsys):
    assert main([*words, f"runs={line.path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
