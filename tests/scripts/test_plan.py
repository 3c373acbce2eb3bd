"""`scripts/plan.py` as a person calls it: a screen, a file, one line where something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from planner import compiled
from planner.compiled import DoesNotFit
from planner.config import PlanConfig, split_words
from planner.screen import screen
from planner.serving_question import ServingQuestion
from scripts.plan import experiment_text, plan_of, settle, split_question
from tests.configs.composing import config
from training.config import with_vocab

ROOT = Path(__file__).resolve().parent.parent.parent
BIG = ("+experiment=llama3_70b", "hardware=h100", "plan.compile=never")


def plan(*words, **environment):
    """What it prints, its errors, and its status."""
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout, done.stderr, done.returncode


def test_what_compiles_here_is_compiled_and_every_figure_is_in_the_file(tmp_path):
    path = tmp_path / "plan.json"
    said, wrong, status = plan(
        "+experiment=debug", "hardware=cpu", "mesh.data=2", "mesh.tensor=2", f"plan.output={path}"
    )
    assert status == 0, wrong
    assert "compiled in" in said and "2 x cpu" not in said and "4 x cpu" in said
    assert wrong == ""
    found = json.loads(path.read_text())
    assert found["fits"] and found["work"]["how"] == "compiled" and found["beside"]["how"] == "analytic"
    assert found["mesh"]["tensor"] == 2 and found["devices"] == 4
    assert found["total_bytes"] == sum(found["work"]["memory"].values())
    assert len(said.splitlines()) <= 40  # one screen


def test_sixteen_thousand_devices_are_planned_without_compiling():
    mesh = ("mesh=3d", "mesh.pipeline=8", "mesh.tensor=8", "pipeline.microbatches=16")
    asked = ("training.global_batch_size=4096", "plan.price=2.5", "plan.tokens=15000000000000")
    said, wrong, status = plan(*BIG, "hardware.nodes=2048", *mesh, *asked)
    assert status == 0, wrong
    assert "16,384 x h100" in said and "nothing was compiled" in said
    assert "15T tokens" in said and "device-hours" in said and "at 2.5 an hour" in said


def test_what_does_not_fit_is_refused_in_one_line():
    said, wrong, status = plan(*BIG, "hardware.nodes=1", "training.global_batch_size=64")
    assert status == 2
    assert "DOES NOT FIT" in said
    assert wrong.count("\n") == 1 and "GiB on each device" in wrong and "h100 can hold 77.5" in wrong


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["plan.compil=never"], ["plan.compil is not a key", "did you mean plan.compile?"]),
        (["plan.compile=nevr"], ["plan.compile=nevr", "did you mean never?"]),
        (["plan.top=x"], ["plan.top"]),
        (["plan.top=0"], ["plan.top=0", "1 or more"]),
        (["plan.output=plan.txt"], ["plan.output=plan.txt", ".json"]),
        (["plan.search"], ["plan.search is not KEY=VALUE"]),
    ],
)
def test_words_of_the_plan_are_checked_in_one_line(words, wanted):
    with pytest.raises(ValueError) as error:
        split_words(words)
    assert all(word in str(error.value) for word in wanted), error.value
    assert "\n" not in str(error.value)


def test_the_words_of_the_run_are_left_for_it():
    options, words = split_words(["+experiment=debug", "plan.top=3", "seed=1", "+plan.price=2"])
    assert words == ["+experiment=debug", "seed=1"]
    assert options == PlanConfig(top=3, price=2.0, jobs=options.jobs)


def test_what_a_search_finds_is_an_experiment_that_train_takes(tmp_path):
    words = ("+experiment=llama3_8b", "hardware=h100", "hardware.nodes=2", "training.global_batch_size=64")
    folder = tmp_path / "experiment"
    said, wrong, status = plan(*words, "plan.search=true", "plan.compile=never", f"plan.directory={folder}")
    assert status == 0, wrong
    assert "not compiled: plan.compile=never" in said
    assert {path.name for path in folder.iterdir()} == {
        "best.yaml",
        "search.json",
        "pareto.png",
        "pareto.html",
    }
    best = json.loads((folder / "search.json").read_text())["best"]
    command = [sys.executable, "train.py", "--config-dir", str(tmp_path), "+experiment=best", "--cfg", "job"]
    composed = yaml.safe_load(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    for word in (*words[2:], *best["words"]):
        key, _, value = word.partition("=")
        room, name = key.split(".")
        assert str(composed[room][name]) == value
    assert composed["model"]["num_layers"] == 32 and composed["hardware"]["name"] == "h100"


def test_an_experiment_of_a_search_has_the_words_as_hydra_reads_them():
    best = SimpleNamespace(
        candidate=SimpleNamespace(words=("mesh.fsdp=8",)),
        work=SimpleNamespace(memory=SimpleNamespace(total=2**30), how="analytic"),
        seconds=1.0,
    )
    found: Any = SimpleNamespace(best=best, legal=3, machine=SimpleNamespace(devices=8, name="h100"))
    words = ("+experiment=llama3_8b", "hardware=h100", "seed=7", "data.path=2024-01-15", "init_from=yes")
    text = experiment_text("1e3", [*words, "sample.prompts=[1e3,'a b']", "training.ema_decay=null"], found)
    assert "  - llama3_8b\n  - override /hardware: h100\n  - _self_\n" in text
    read = OmegaConf.to_container(OmegaConf.create(text))  # by the rules of Hydra's files
    assert isinstance(read, dict)
    assert read["run"] == {"name": "1e3"} and read["init_from"] == "yes" and read["seed"] == 7
    assert read["data"] == {"path": "2024-01-15"} and read["sample"] == {"prompts": ["1e3", "a b"]}
    assert read["training"] == {"ema_decay": None} and read["mesh"] == {"fsdp": 8}


def test_an_engine_is_planned_and_every_figure_is_in_the_file(tmp_path):
    path = tmp_path / "serving.json"
    words = ("model=llama_1b", "hardware=h200", "serve=true", "plan.compile=never", f"plan.output={path}")
    words += ("max_len=1024", "slots=64")
    said, wrong, status = plan(*words, "slo_gap=0.5")
    assert status == 0, wrong
    assert "slo_gap       0.5 s holds" in said and len(said.splitlines()) <= 40  # one screen
    found = json.loads(path.read_text())
    assert found["fits"] and found["promises"]["slo_gap"]["holds"] and found["slots"] == 64
    assert found["cache_token"] == 32768  # 16 layers, 8 heads of 64, keys and values, bfloat16
    assert plan(*words, "weight_bits=8")[2] == 0
    eight = json.loads(path.read_text())
    assert eight["weights"] < 0.55 * found["weights"]
    assert eight["decode"][-1]["seconds"] < found["decode"][-1]["seconds"]


def test_words_of_an_engine_are_taken_with_serve_alone():
    question, words = split_question(["model=llama_1b", "serve=true", "slots=4", "slo_ttft=0.5"])
    assert words == ["model=llama_1b", "run.name=served"]
    assert split_question(["serve=true", "run.name=mine"])[1] == ["run.name=mine"]
    assert question == ServingQuestion(slots=4, slo_ttft=0.5)
    assert split_question(["slots=4"]) == (None, ["slots=4"])  # Hydra refuses it by its name
    with pytest.raises(ValueError, match="slots=x is not a whole number"):
        split_question(["serve=true", "slots=x"])


def test_a_compiler_that_refuses_is_a_plan_that_does_not_fit(monkeypatch):
    def refuses(config, machine, devices):
        raise DoesNotFit(90 * 2**30, 80 * 2**30, machine.name)

    monkeypatch.setattr(compiled, "compile_step", refuses)
    words = ("run.name=planned", "+experiment=llama3_8b", "hardware=h200", "training.global_batch_size=16")
    asked, machine, notes = settle(with_vocab(config(*words)))
    made = plan_of(asked, machine, PlanConfig(), notes)
    assert made.work.how == "analytic" and made.work.memory.total < made.capacity
    assert not made.fits and not made.json()["fits"]
    assert made.refused == "the compiler refuses the step: it needs 90.00 GiB of the 80.00 GiB of a h200"
    assert "DOES NOT FIT, by the compiler" in screen(made)
