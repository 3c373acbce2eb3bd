"""A run goes out and comes in again: the same held-out loss, on one device and on a mesh."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from data.tokens.tokenizer import load_tokenizer
from interop.safetensors import Tensors
from scripts.export import main as export
from training.loop import fit
from training.opening.initial_weights import with_parent_model

STEPS = ("training.num_steps=4", "eval.every=2", "checkpoint.every=4", "schedule.warmup_steps=1")


@pytest.fixture(scope="module")
def published(ground):
    """A small run's weights as a directory that transformers would open."""
    assert fit(ground.config("first", *STEPS)) == 0
    output, run = ground.path / "published", str(ground.run("first"))
    assert export([run, f"output={output}", "trim=false"]) == 0
    assert export([run, f"output={output}.gguf", "format=gguf", "trim=false"]) == 0
    return output


SPLIT = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.pipeline=2")


@pytest.mark.parametrize(("ending", "mesh"), [("", ()), ("", SPLIT), (".gguf", SPLIT)])
def test_a_run_that_begins_at_published_weights_begins_at_their_loss(ground, published, ending, mesh):
    name, published = f"second{len(mesh)}{ending}", f"{published}{ending}"
    words = ("model=parent", "tokenizer=inherit", "optim.learning_rate=1e-12", "pipeline.microbatches=4")
    config = ground.config(name, *STEPS, f"init_from={published}", *words, *mesh)
    assert fit(with_parent_model(config)) == 0
    # Not a step has moved them: what is measured is what was read.
    first, second = (ground.summary(run)["eval/loss"] for run in ("first", name))
    assert second == pytest.approx(first, rel=1e-5)
    manifest = json.loads((ground.run(name) / "manifest.json").read_text())
    kind, file = ("gguf", "published.gguf") if ending else ("hf", "model.safetensors")
    assert manifest["parent"]["format"] == kind and file in manifest["parent"]["files"]


def test_another_model_than_theirs_is_refused(ground, published):
    config = ground.config(
        "other", *STEPS, f"init_from={published}", "model.num_layers=1", "tokenizer=inherit"
    )
    with pytest.raises(ValueError, match="model.num_layers=1 is not .*config.json says; use model=par"):
        fit(config)
    with pytest.raises(ValueError, match="model=parent is that of init_from, which is null"):
        with_parent_model(ground.config("none", *STEPS, "model=parent"))


def test_what_goes_out_is_trimmed_to_the_tokenizer_and_begins_texts_as_training_did(ground, published):
    run, output = ground.run("first"), ground.path / "trimmed"
    assert export([str(run), f"output={output}", "dtype=bfloat16"]) == 0
    tokenizer = load_tokenizer(run / "tokenizer.json")
    size, padded = tokenizer.vocab_size, Tensors(published)["model.embed_tokens.weight"]
    table = Tensors(output)["model.embed_tokens.weight"]
    assert len(padded) > size and json.loads((output / "config.json").read_text())["vocab_size"] == size
    np.testing.assert_array_equal(table, padded[:size].astype(table.dtype))
    ids = Backend.from_file(str(output / "tokenizer.json")).encode("a text").ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode("a text")]
    said = json.loads((output / "generation_config.json").read_text())
    assert said == {
        "bos_token_id": ids[0],
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def test_export_refuses_what_no_class_of_theirs_computes(ground, published, capsys):
    assert fit(ground.config("squared", *STEPS, "model=modern", "model.num_layers=2")) == 0
    assert export([str(ground.run("squared")), f"output={ground.path}/nowhere"]) == 2
    assert "no class of transformers computes this model" in capsys.readouterr().err
    assert not (ground.path / "nowhere").exists()
    assert export([str(ground.run("first")), f"output={published}"]) == 2
    assert "is there already" in capsys.readouterr().err
