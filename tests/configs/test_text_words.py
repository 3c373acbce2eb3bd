"""What is typed for text is text, though Hydra reads numbers, truth values or nothing in it."""

from dataclasses import asdict

import pytest
import yaml
from omegaconf import OmegaConf

from configs.cli import main
from configs.explain import known_keys
from configs.text_words import as_typed
from planner.config import split_words
from tests.configs.composing import config, raw
from training.config import Config, from_stored

TYPED = (
    "2024_01_15",
    "12e5678",
    "123e4567",
    "1e3",
    "0.10",
    "0x10",
    "1_000",
    "-.5e-3",
    "5.",
    "True",
    "nan",
    "-inf",
)
OF_ONE = {"optim": "muon", "schedule": "wsd"}  # the parts whose keys are not the same in all


def keys(*kinds):
    """Those of the config that take such a value, in a run that has them all."""
    return [
        name
        for name, key in known_keys().items()
        if key.type in kinds and (not key.owners or OF_ONE[name.split(".")[0]] in key.owners)
        if not name.startswith("hardware.device.links.")  # of which there are several, in a list
    ]


def composed(typed, *kinds, value="{}"):
    """What becomes of the same text under every key of some kinds."""
    groups = [f"{group}={name}" for group, name in OF_ONE.items()]
    made = raw("+experiment=debug", *groups, *(f"{key}={value.format(typed)}" for key in keys(*kinds)))
    return {str(OmegaConf.select(made, key)) for key in keys(*kinds)}


@pytest.mark.parametrize("typed", TYPED)
def test_every_text_of_the_config_is_what_was_typed(typed):
    assert {"run.name", "init_from", "data.path", "checkpoint.directory", "tokenizer.kind"} <= set(
        keys("text", "text or null")
    )
    assert composed(typed, "text", "text or null") == {typed}
    assert {"sample.prompts", "training.full_precision"} <= set(keys("a list[str]"))
    assert composed(typed, "a list[str]", value="[{0},b,{0}]") == {f"['{typed}', 'b', '{typed}']"}


def test_null_is_nothing_where_there_may_be_nothing_and_else_text():
    assert composed("null", "text or null") == composed("NULL", "text or null") == {"None"}
    assert composed("null", "text") == {"null"}
    assert composed("null", "a list[str]", value="[{}]") == {"['null']"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("training.num_steps=10", None),
        ("training.ema_decay=null", None),
        ("model.qk_norm=true", None),
        ("model.qk_norm=joint", None),
        ("run.name='1e3'", None),
        ("run.name=a1e3", None),
        ("run.name=1 000", None),
        ("run.name=[", None),
        ("run.name=${seed}", None),
        ("hydra.job.name=1e3", None),
        ("nonsense.name=1e3", None),
        ("data.steps=[{step: sample, fraction: 0.5}]", None),
        ("init_from=1e3,a,true", "init_from='1e3',a,'true'"),
        ("data.path=choice(1e3,b)", "data.path=choice('1e3',b)"),
        ("data.name=range(1,3)", None),
        ("model.rope_scaling={kind: 1e3, factor: 2}", "model.rope_scaling={kind: '1e3', factor: 2}"),
        ("mesh.rules.embed=[1e3]", "mesh.rules.embed=['1e3']"),
        (
            "hardware.device.links=[{name: 1e3, devices: 8}]",
            "hardware.device.links=[{name: '1e3', devices: 8}]",
        ),
        ("+data.mixture.web.path=2024_01_15", "+data.mixture.web.path='2024_01_15'"),
        ("+data.mixture.web={path: 1e3, weight: 2}", "+data.mixture.web={path: '1e3', weight: 2}"),
        ("optim.moment_dtype=1e3", "optim.moment_dtype='1e3'"),
        ("+experiment=2024_01_15", "+experiment='2024_01_15'"),
        ("autoscale=null", None),
        ("data.path=~/texts", "data.path='~/texts'"),
        ("data.path=~/a,~b/1e3,/c~d", "data.path='~/a','~b/1e3',/c~d"),
        ("+data.mixture.web={path: ~/web, weight: 2}", "+data.mixture.web={path: '~/web', weight: 2}"),
        ("data.path='~/it is'", None),
        ("~optim.weight_decay", None),
    ],
)
def test_quotes_stand_about_text_and_nothing_else(word, told):
    assert as_typed([word], Config) == [told or word]
    assert as_typed(as_typed([word], Config), Config) == as_typed([word], Config)


def test_a_tilde_that_the_shell_left_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = config(
        *("+experiment=debug", "data=folder", "data.path=~/texts", "run.dir=~/runs/a"),
        *("run.compile_cache=~/xla", "checkpoint.directory=~/kept/${run.name}"),
    )
    places = (made.data.path, made.run.dir, made.run.compile_cache, made.checkpoint.directory)
    assert places == tuple(f"{tmp_path}/{name}" for name in ("texts", "runs/a", "xla", "kept/debug"))


def test_a_component_of_a_mixture_gets_its_text(tmp_path):
    words = ("data=folder", "+data.mixture.a.path=2024_01_15", "+data.mixture.a.weight=1.0")
    assert config("+experiment=debug", *words).data.mixture["a"] == {"path": "2024_01_15", "weight": 1.0}


def test_runs_of_a_sweep_have_the_names_that_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    words = ["+experiment=debug", "run.name=2024_01_15", "-m", "init_from=1e3,12e5678", "data.name=7"]
    assert (
        main(lambda config: made.append((config.run.dir, config.init_from, config.data.name)) or 0, words)
        == 0
    )
    assert made == [
        ("runs/2024_01_15-experiment=debug,init_from=1e3,data.name=7", "1e3", "7"),
        ("runs/2024_01_15-experiment=debug,init_from=12e5678,data.name=7", "12e5678", "7"),
    ]


def test_an_option_of_a_group_may_have_such_a_name(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - debug\n  - _self_\nrun:\n  name: mine\n"
    (tmp_path / "experiment" / "2024_01_15.yaml").write_text(text)
    made = []
    words = ["--config-dir", str(tmp_path), "+experiment=2024_01_15"]
    monkeypatch.chdir(tmp_path)
    assert main(lambda config: made.append(config.run.name) or 0, words) == 0
    assert made == ["mine"]


@pytest.mark.parametrize("name", [name for name in TYPED if name[0] != "-"])  # which no directory begins with
def test_a_run_s_config_is_read_as_it_was_written(tmp_path, name):
    made = config("+experiment=debug", f"run.name={name}", f"init_from={name}", f"sample.prompts=[{name}]")
    assert (made.run.name, made.run.dir) == (name, f"runs/{name}")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(made), sort_keys=False))
    assert from_stored(yaml.safe_load(path.read_text())) == made


@pytest.mark.parametrize("name", ("2024_01_15", "2024-01-15", "1e3", "0x10", "yes", "1:30", 'a"b'))
def test_texts_of_the_plan_are_what_was_typed(name):
    options, _ = split_words([f"plan.directory={name}", f"+plan.experiment={name}", "plan.price=1e3"])
    assert (options.directory, options.experiment, options.price) == (name, name, 1000.0)
    assert split_words(["plan.directory=null"])[0].directory is None
