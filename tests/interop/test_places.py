"""Published weights under a URL, and adapters beside their base: what `init_from` reads of them.

These laws hold of any file system that fsspec speaks: here of a folder, of S3 in
`extras/test_published_s3.py`.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from interop.adapted import is_published, published
from interop.peft import WEIGHTS, factor_reader, write_adapter
from interop.places import RemotePath, path_of
from interop.read import Published
from interop.write import export, reader
from interop.write_gguf import export_gguf
from models.config import ModelConfig
from models.transformer import build_model
from models.weights import merged
from scripts.export import main as export_run
from tests.interop.test_gguf import NAMES
from tests.interop.test_peft import ADAPTERS, adapted, base_weights, rewrite
from tests.interop.test_round_trip import MODELS, placed, random_weights
from training.loop import fit
from training.opening.initial_weights import with_parent_model

STEPS = ("training.num_steps=4", "eval.every=2", "checkpoint.every=4", "schedule.warmup_steps=1")


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket"


def weights_at(path):
    there = published(path)
    model = build_model(there.config)
    return jax.device_get(there.weights(placed(model), model))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_url_has_the_weights_of_its_files(name, tmp_path, monkeypatch):
    """Each byte of an array is fetched once, in ranges of any size."""
    config = ModelConfig(**MODELS[name])
    model = build_model(config)
    params = random_weights(model)
    export(tmp_path / "a", config, model, reader(params), shard=1 << 14)
    fetched = []
    take = RemotePath._range
    monkeypatch.setattr("interop.places.CHUNK", 1000)
    monkeypatch.setattr(
        RemotePath, "_range", lambda self, at, count: fetched.append(count) or take(self, at, count)
    )
    remote = path_of(f"file://{tmp_path}/a/")
    same(weights_at(remote), params)
    local, there = Published(tmp_path / "a"), Published(remote)
    files = [f for f in there.facts()["files"]]
    assert len(files) > 1 and sum(fetched) == sum(
        int(np.prod(e[2])) * e[1].itemsize for e in local.tensors.entries.values()
    )
    assert {**local.facts(), "path": ""} == {**there.facts(), "path": ""}


def test_a_gguf_file_under_a_url_too(tmp_path):
    config = ModelConfig(**NAMES["qwen3"])
    model = build_model(config)
    export_gguf(tmp_path / "a.gguf", config, model, reader(random_weights(model)), kind="Q8_0")
    remote = path_of(f"file://{tmp_path}/a.gguf")
    assert is_published(remote)
    same(weights_at(remote), weights_at(tmp_path / "a.gguf"))


@pytest.fixture(scope="module")
def exported(ground):
    """A small run, and its weights as others open them."""
    assert fit(ground.config("begun", *STEPS)) == 0
    assert export_run([str(ground.run("begun")), f"output={ground.path}/opened", "trim=false"]) == 0
    return ground.path / "opened"


def begin(ground, name, source, *words):
    config = ground.config(name, *STEPS, f"init_from={source}", "model=parent", "tokenizer=inherit", *words)
    return fit(with_parent_model(config))


def test_a_run_begins_at_the_weights_of_a_url(ground, exported):
    """With model and tokenizer, on a mesh; the manifest says where it began."""
    source, split = f"file://{exported}", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert begin(ground, "remote", source, "optim.learning_rate=1e-12", *split) == 0
    first, second = (ground.summary(run)["eval/loss"] for run in ("begun", "remote"))
    assert second == pytest.approx(first, rel=1e-5)
    assert json.loads((ground.run("remote") / "manifest.json").read_text())["parent"]["path"] == source


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("file:///nowhere/at/all", "init_from=file:///nowhere/at/all holds no config.json"),
        ("ftp://a/b", "init_from=ftp://a/b has the scheme ftp; use s3://"),
        ("s3://bucket/model", "needs s3fs"),
    ],
)
def test_a_url_with_nothing_to_begin_at_is_refused(ground, source, said, monkeypatch):
    monkeypatch.setitem(
        __import__("common.buckets").buckets.SCHEMES, "s3", ("no_such_s3fs", "s3", "AWS_PROFILE")
    )
    said = said.replace("s3fs", "no_such_s3fs")
    with pytest.raises(ValueError, match=said) as caught:
        begin(ground, "none", source)
    assert "\n" not in str(caught.value) and not ground.run("none").exists()


def test_what_comes_short_is_refused(tmp_path, monkeypatch):
    config = ModelConfig(**MODELS["llama"])
    model = build_model(config)
    export(tmp_path / "a", config, model, reader(random_weights(model)))
    there = published(path_of(f"file://{tmp_path}/a"))
    (tmp_path / "a" / "model.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ bytes came of \d+ from byte"):
        there.weights(placed(model), model)
    with pytest.raises(ValueError, match="model.safetensors is damaged or no safetensors file"):
        published(path_of(f"file://{tmp_path}/a"))


@pytest.fixture
def adapter(tmp_path):
    """(folder of base and adapter, the sum of both)."""
    model, rules, weights = adapted("llama")
    export(tmp_path / "base", ModelConfig(**MODELS["llama"]), model, reader(base_weights(model)))
    write_adapter(tmp_path / "adapter", model, rules, ADAPTERS, factor_reader(weights))
    return tmp_path, jax.device_get(merged(weights))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("base", ["{}/base", "../base", "someone/base"])
def test_an_adapter_is_merged_into_the_base_that_it_names(base, remote, adapter):
    folder, whole = adapter
    name = base.format(folder)
    rewrite(folder / "adapter", base_model_name_or_path=name)
    asked = path_of(f"file://{folder}/adapter") if remote else folder / "adapter"
    assert is_published(asked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), weights_at(asked), whole)
    assert published(asked).facts()["adapter"]["path"] == str(asked)


def test_an_adapter_without_its_base_or_of_another_is_refused(adapter):
    folder, _ = adapter
    with pytest.raises(ValueError, match="base_model_name_or_path=null is no published model here; put it"):
        published(folder / "adapter")
    rewrite(folder / "adapter", base_model_name_or_path="someone/base", lora_bias=True)
    there = published(folder / "adapter")
    model = build_model(there.config)
    with pytest.raises(ValueError, match="lora_bias=True is not supported"):
        there.weights(placed(model), model)
    shutil.rmtree(folder / "base")
    with pytest.raises(ValueError, match="=someone/base is no published model here; put it beside adapter"):
        published(folder / "adapter")
    assert (folder / "adapter" / WEIGHTS).is_file()


def test_adapters_are_written_in_float32_alone(capsys):
    assert export_run(["any", "output=nowhere", "format=peft", "dtype=bfloat16"]) == 2
    assert "dtype=bfloat16 is not one of float32" in capsys.readouterr().err
