"""A run goes out and comes in again: the same held-out loss, on one device and on a mesh."""

import json

import pytest

from scripts.export import main as export
from training.initial_weights import with_parent_model
from training.loop import fit

STEPS = ("training.num_steps=4", "eval.every=2", "checkpoint.every=4", "schedule.warmup_steps=1")


@pytest.fixture(scope="module")
def published(ground):
    """A small run's weights as a directory that transformers would open."""
    assert fit(ground.config("first", *STEPS)) == 0
    output = ground.path / "published"
    assert export([str(ground.run("first")), f"output={output}"]) == 0
    return output


@pytest.mark.parametrize("mesh", [(), ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.pipeline=2")])
def test_a_run_that_begins_at_published_weights_begins_at_their_loss(ground, published, mesh):
    name = f"second{len(mesh)}"
    words = ("model=parent", "tokenizer=inherit", "optim.learning_rate=1e-12", "pipeline.microbatches=4")
    config = ground.config(name, *STEPS, f"init_from={published}", *words, *mesh)
    assert fit(with_parent_model(config)) == 0
    # Not a step has moved them: what is measured is what was read.
    first, second = (ground.summary(run)["eval/loss"] for run in ("first", name))
    assert second == pytest.approx(first, rel=1e-5)
    manifest = json.loads((ground.run(name) / "manifest.json").read_text())
    assert manifest["parent"]["format"] == "hf" and "model.safetensors" in manifest["parent"]["files"]


def test_another_model_than_theirs_is_refused(ground, published):
    config = ground.config(
        "other", *STEPS, f"init_from={published}", "model.num_layers=1", "tokenizer=inherit"
    )
    with pytest.raises(ValueError, match="model.num_layers=1 is not .*config.json says; use model=par"):
        fit(config)
    with pytest.raises(ValueError, match="model=parent is that of init_from, which is null"):
        with_parent_model(ground.config("none", *STEPS, "model=parent"))


def test_export_refuses_what_no_class_of_theirs_computes(ground, published, capsys):
    assert fit(ground.config("squared", *STEPS, "model=modern", "model.num_layers=2")) == 0
    assert export([str(ground.run("squared")), f"output={ground.path}/nowhere"]) == 2
    assert "no class of transformers computes this model" in capsys.readouterr().err
    assert not (ground.path / "nowhere").exists()
    assert export([str(ground.run("first")), f"output={published}"]) == 2
    assert "is there already" in capsys.readouterr().err
