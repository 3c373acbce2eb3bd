"""Adapters and `freeze` as a run's config: what trains, what a checkpoint holds, and who opens it again."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training.loop
from artifacts.checkpoints.record import named_leaves
from artifacts.load import load
from common.checks import ConfigError
from models.transformer import build_model
from models.weights import QTensor, dequantize, merged
from optim.config import AdamWConfig, MuonConfig
from scripts.checkpoint import main as checkpoint
from scripts.export import main as export
from scripts.generate import main as generate
from tests.configs.composing import config as composed
from tests.parallel.small import make_config, make_program, packed_batch, place
from tests.training.states import assert_equal
from tests.training.test_frozen import SMALL, program_of, started, trained
from training.config import AdapterConfig, from_stored, with_vocab
from training.legal.check import check
from training.loop import fit
from training.opening.initial_weights import with_parent_model
from training.opening.opened import open_run
from training.param_layout import param_layout
from training.state import shardings

DORA = AdapterConfig(kind="dora", rank=2, alpha=1.0)
MESHES = {
    "fsdp_tensor": ({"fsdp": 2, "tensor": 2}, {}),
    "accumulation": ({}, {"accumulation_steps": 2}),
    "1f1b": ({"pipeline": 2}, {}),
}


# -- what trains -------------------------------------------------------------------------------------------


def test_magnitudes_begin_at_the_base_and_learn_on_every_mesh_alike():
    one = program_of(adapters=DORA)
    first = one.init_state(0)
    base = one.model.init(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(merged(first.weights)), jax.tree.leaves(base), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)
    state, seen = trained(one)
    for path, leaf in named_leaves(state.params).items():
        before = named_leaves(first.params)[path]
        assert np.any(leaf != before), path
    assert_equal(first.frozen, state.frozen)
    for mesh, values in MESHES.values():
        program = program_of(mesh, DORA, **values)
        other, losses = trained(program)
        np.testing.assert_allclose(losses, seen, rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves(program.to_canonical(other).params), jax.tree.leaves(state.params), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_of_magnitudes_is_that_of_its_merged_weights():
    program = program_of(adapters=DORA)
    state, _ = trained(program)
    sums = program.compile_eval()(state.weights, place(program, packed_batch(5)))
    plain = make_program(make_config(model=SMALL))
    whole = jax.device_put(merged(state.weights), shardings(plain.state.params))
    expected = plain.compile_eval()(whole, place(plain, packed_batch(5)))
    np.testing.assert_allclose(sums["nll"], expected["nll"], rtol=1e-6)


def test_integers_below_are_what_they_stand_for():
    """QLoRA is LoRA over the dequantized base, loss by loss."""
    qlora = program_of()
    lora = program_of(adapters=AdapterConfig(rank=2, alpha=1.0))
    begun = started(qlora)
    frozen = jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, QTensor) else leaf,
        begun.frozen,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    like = jax.tree.structure(lora.state.params)  # without what holds the integers' parts
    params = jax.tree.unflatten(like, jax.tree.leaves(jax.device_get(begun.params)))
    other = lora.init_state(0).replace(
        params=jax.device_put(params, shardings(lora.state.params)),
        frozen=jax.device_put(frozen, shardings(lora.state.frozen)),
    )
    _, expected = trained(qlora)
    train = lora.compile_train()
    for i in range(2):
        other, metrics = train(other, place(lora, packed_batch(i)))
        found = [float(metrics[name]) for name in ("loss", "grad_norm")]
        np.testing.assert_allclose(found, expected[i], rtol=1e-5)


@pytest.mark.parametrize("optim", [AdamWConfig(), MuonConfig(learning_rate=0.01)], ids=["adamw", "muon"])
def test_all_but_what_is_named_learns(optim):
    outcomes = []
    for mesh in ({}, {"pipeline": 2, "fsdp": 2}):
        config = dataclasses.replace(
            make_config(mesh, model=SMALL, optim=optim, ema_decay=0.5), freeze=["embed", "*norm*"]
        )
        program = make_program(config)
        before = jax.device_get(program.init_state(0))
        state, train = program.init_state(0), program.compile_train()
        for i in range(2):
            state, metrics = train(state, place(program, packed_batch(i)))
        assert_equal(jax.device_get(state.frozen), before.frozen)
        names = named_leaves(before.frozen)
        assert "embed.table" in names and all("embed" in n or "norm" in n for n in names)
        for name, leaf in named_leaves(jax.device_get(state.params)).items():
            assert "norm" not in name and np.any(leaf != named_leaves(before.params)[name])
        assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)
        outcomes.append(float(metrics["loss"]))
    np.testing.assert_allclose(outcomes[1], outcomes[0], rtol=1e-5)


def test_a_checkpoint_is_a_hundredth_of_one_of_all_weights():
    config = with_vocab(composed("+experiment=llama_1b", "run.name=x", "model.vocab_size=32000"))

    def size(config):
        program = param_layout(config, build_model(config.model))
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(_values, program.trained)))

    lora = size(dataclasses.replace(config, adapter=AdapterConfig()))
    assert 0.002 < lora / size(config) < 0.01


def _values(infos):
    return jax.tree.map(lambda info: jnp.zeros(info.shape, info.dtype), infos)


REFUSED = {
    "rank": (("adapter.rank=65",), r"adapter.rank=65 of a matrix \[64, 32\] must be from 1 to 32"),
    "target": (("adapter.targets=[experts]",), r"targets=experts is no projection of .* \[down,kv,o,q,up\]"),
    "group": (("adapter.bits=4", "adapter.group=48"), "adapter.group=48 does not divide"),
    "name": (
        ("freeze=[embedding]",),
        "freeze=embedding names no parameter of this model; did you mean embed",
    ),
    "all": (("freeze=['*']",), r"freeze=\[\*\] leaves nothing to train"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_the_model_is_said_in_one_line(why, ground):
    words, says = REFUSED[why]
    config = with_vocab(ground.config("never", *words))
    with pytest.raises(ConfigError, match=says) as caught:
        param_layout(config, build_model(config.model))
    assert "\n" not in str(caught.value)


def test_adapters_stand_on_weights_that_are_there(ground):
    with pytest.raises(ConfigError, match="adapter.rank=8 learns beside weights .* give init_from=RUN"):
        check(ground.config("never", "adapter.rank=8"), 1)
    with pytest.raises(ConfigError, match=r"freeze=\[embed\] beside adapter.rank=8"):
        check(ground.config("never", "adapter.rank=8", "init_from=x", "freeze=[embed]"), 1)
    with pytest.raises(ValueError, match="adapter.targets=dawn .*; did you mean down"):
        ground.config("never", "adapter.targets=[q,dawn]")


# -- runs --------------------------------------------------------------------------------------------------

TINY = (
    *("eval.every=4", "checkpoint.every=2", "schedule=constant", "schedule.warmup_steps=1"),
    *("tokenizer=inherit", "optim.learning_rate=0.01", "training.num_steps=6", "eval.batches=1"),
    *("model.num_layers=1", "model.d_model=32", "model.d_ff=64", "training.scan_layers=false"),
)
KINDS = {
    "qdora": ("adapter={kind: dora, rank: 2, bits: 8}", "training.ema_decay=0.5"),
    "frozen": ("freeze=[embed,'*norm*']", "optim=muon_small"),
}


@pytest.fixture(scope="module")
def base(ground):
    """The run that all others begin at."""
    words = ("training.num_steps=4", "tokenizer=byte", "data.seq_len=32")
    assert fit(ground.config("below", *TINY, *words)) == 0
    return ground.run("below")


@pytest.fixture(scope="module")
def tuned(ground, base):
    """Of each kind a run that nobody disturbed."""
    for kind, words in KINDS.items():
        assert fit(ground.config(kind, *TINY, f"init_from={base}", *words)) == 0
    return ground.run


def plain_weights(path):
    return jax.device_get(open_run(str(path)).trained[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_trains_and_names_the_rest(kind, ground, base, tuned):
    record = ground.record(kind, 6)
    manifest = json.loads((tuned(kind) / "manifest.json").read_text())
    assert record["parent"] == manifest["parent"] and record["parent"]["step"] == 4
    items = {name.split(".")[0] for name in record["types"]}
    assert "frozen" not in items and {"params", "opt_state"} <= items
    names = [name for name in record["types"] if name.startswith("params.")]
    if kind == "frozen":
        assert not any("embed" in name or "norm" in name for name in names) and names
    else:
        assert {name.rpartition(".")[2] for name in names} == set("abm")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_it_ends_bitwise_the_same(kind, ground, base, tuned, monkeypatch):
    words = (*TINY, f"init_from={base}", *KINDS[kind])
    again = f"{kind}_again"

    class Killed(Exception):
        pass

    def kill(job, step):
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "in_trouble", kill)
        with pytest.raises(Killed):
            fit(ground.config(again, *words))
    assert fit(ground.config(again, *words)) == 0
    assert ground.record(again, 6)["digests"] == ground.record(kind, 6)["digests"]
    assert ground.rows(again)[-1] == ground.rows(kind)[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_who_opens_it_gets_the_weights_that_it_measured(kind, ground, base, tuned, capsys):
    """Arrays, on one device and split; what did not train is the parent's to the bit."""
    config = load(str(tuned(kind)), from_stored).config
    words = (*TINY, f"init_from={tuned(kind)}", "optim.learning_rate=1e-12", "training.num_steps=4")
    assert fit(ground.config(f"{kind}_on", *words)) == 0  # all of it trains
    measured = ground.summary(kind)["eval/loss"]
    assert ground.summary(f"{kind}_on")["eval/loss"] == pytest.approx(measured, rel=1e-5)
    mine, below = plain_weights(tuned(kind)), plain_weights(base)
    table = np.array_equal(mine["embed"]["table"], below["embed"]["table"])
    assert table == (config.adapter is None or config.adapter.bits is None)
    up = [tree["segments"]["0"]["0"]["mlp"]["up"] for tree in (mine, below)]
    assert np.any(up[0] != up[1])
    split_over = open_run(str(tuned(kind)), fsdp=2, tensor=2).trained[1]
    for a, b in zip(jax.tree.leaves(split_over), jax.tree.leaves(mine), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert generate([str(tuned(kind)), "prompt=the", "max_new_tokens=2"]) == 0
    assert checkpoint(["export", str(tuned(kind)), f"output={ground.path}/nowhere"]) == 2
    assert "export.py" in capsys.readouterr().err and not (ground.path / "nowhere").exists()


def test_the_average_and_the_mean_of_the_last_ones_are_opened_too(ground, base, tuned):
    raw, ema, mean = (
        jax.device_get(open_run(str(tuned("qdora")), weights=weights).trained[1])
        for weights in ("raw", "ema", "mean")
    )
    for other in (ema, mean):
        assert np.array_equal(raw["embed"]["table"], other["embed"]["table"])
        kv = [tree["segments"]["0"]["0"]["attention"]["kv"] for tree in (raw, other)]
        assert np.any(kv[0] != kv[1]) and np.allclose(*kv, atol=0.1)


def test_a_frozen_run_without_a_parent_keeps_all_of_it(ground):
    words = (*TINY, "tokenizer=byte", "freeze=[embed]", "training.num_steps=2")
    assert fit(ground.config("alone", *words)) == 0
    assert "frozen.embed.table" in ground.record("alone", 2)["types"]
    whole = plain_weights(ground.run("alone"))
    config = with_vocab(load(str(ground.run("alone")), from_stored).config, 257)
    first = build_model(config.model).init(jax.random.key(0))
    np.testing.assert_allclose(whole["embed"]["table"], first["embed"]["table"], rtol=1e-6)
    assert fit(ground.config("alone", *words, "training.num_steps=4")) == 0


def test_in_stages_it_begins_at_its_parent_and_goes_on_on_another_mesh(ground):
    two = (*TINY, "model.num_layers=2", "optim.learning_rate=1e-12")
    assert fit(ground.config("two", *two, "tokenizer=byte", "training.num_steps=2")) == 0
    words = (*two, f"init_from={ground.run('two')}", "adapter={rank: 2, bits: 4}")
    stages = ("mesh.data=1", "mesh.fsdp=4", "mesh.pipeline=2", "pipeline.microbatches=2")
    assert fit(ground.config("staged", *words, *stages, "training.num_steps=2")) == 0
    staged = ground.summary("staged")["eval/loss"]
    assert staged == pytest.approx(ground.summary("two")["eval/loss"], rel=1e-2)  # but for four bits
    assert fit(ground.config("staged", *words, "training.num_steps=4")) == 0
    assert ground.summary("staged")["eval/loss"] == pytest.approx(staged, rel=1e-6)


def test_another_parent_than_the_one_it_began_at_is_refused(ground, base, tuned, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(base, runs / "below")
    words = (*TINY, f"run.dir={runs}/mine", f"init_from={runs}/below", "adapter.rank=2")
    assert fit(ground.config("mine", *words, "training.num_steps=2")) == 0
    assert plain_weights(runs / "mine") is not None
    shutil.rmtree(runs / "below")
    with pytest.raises(ValueError, match="holds only what trains beside step 4 of .*below/checkpoints"):
        plain_weights(runs / "mine")
    other = ("training.num_steps=4", "tokenizer=byte", "seed=1", f"run.dir={runs}/below")
    assert fit(ground.config("below", *TINY, *other)) == 0
    with pytest.raises(ValueError, match="stands on step 4 of .* with digest .* put the former back") as said:
        plain_weights(runs / "mine")
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="mine began from step 4 of .*, which is not there any more"):
        fit(ground.config("mine", *words))


# -- other formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "again"), [("lora", "merged"), ("dora", "factors")])
def test_peft_gets_the_factors_and_gives_them_back_to_a_run(kind, again, ground, base):
    """Where init_from names them they are merged, or with `adapter.*` go on learning."""
    folder = ground.path / f"out_{kind}"
    words = ("model=parent", f"adapter.kind={kind}", "adapter.rank=2", "adapter.alpha=3")
    published = ground.path / f"published_{kind}"
    assert export([str(base), f"output={published}", "trim=false"]) == 0
    first = (*TINY, *words, f"init_from={published}")
    assert fit(with_parent_model(ground.config(f"{kind}_out", *first))) == 0
    record = ground.record(f"{kind}_out", 6)
    assert len(record["parent"]["weights"]) == 64
    run = str(ground.run(f"{kind}_out"))
    assert export([run, f"output={folder}", "format=peft"]) == 0
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(published) and said["use_dora"] == (kind == "dora")
    measured = ground.summary(f"{kind}_out")["eval/loss"]

    still = (*TINY, "model=parent", "optim.learning_rate=1e-12", "training.num_steps=4")
    more = words[1:] if again == "factors" else ()
    config = ground.config(f"{kind}_on", *still, *more, f"init_from={folder}")
    assert fit(with_parent_model(config)) == 0
    assert ground.summary(f"{kind}_on")["eval/loss"] == pytest.approx(measured, rel=1e-5)
    if again == "factors":
        began, found = (named_leaves(factors_of(ground.run(f"{kind}_{end}"))) for end in ("out", "on"))
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, began[name], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="adapter.rank is 3 and in .* 2; take that, or adapter=null"):
        other = ("adapter.rank=3", f"init_from={folder}")
        fit(with_parent_model(ground.config("never", *still, *words[1:], *other)))

    altered = published / "model.safetensors"
    raw = bytearray(altered.read_bytes())
    raw[-1] ^= 1
    altered.write_bytes(raw)
    with pytest.raises(ValueError, match="with weights .* put the former back"):
        plain_weights(run)


def factors_of(path: Path):
    """What a run's last checkpoint holds of what trains."""
    loaded = load(str(path), from_stored)
    config = with_vocab(loaded.config, 257)
    trained = param_layout(config, build_model(config.model)).trained
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda i: jax.ShapeDtypeStruct(i.shape, i.dtype, sharding=device), trained)
    return jax.device_get(loaded.weights(like))


def test_adapters_over_a_run_name_the_base_that_peft_is_to_open(ground, base, tuned, capsys):
    run, folder = str(tuned("qdora")), ground.path / "named"
    assert export([run, f"output={folder}", "format=peft"]) == 2
    assert "stand on the run" in capsys.readouterr().err
    assert export([run, f"output={folder}", "format=peft", "base=someone/base"]) == 0
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "someone/base"
    assert export([str(base), f"output={folder}2", "format=peft"]) == 2
    assert "has no adapters (adapter=null)" in capsys.readouterr().err
    assert export([run, f"output={folder}3", "base=x"]) == 2
    assert export([run, f"output={folder}3"]) == 0  # merged
