"""Every name that `--help` lists composes into a checked config, with every other one that it may meet."""

import dataclasses
import inspect
import itertools
import re

import pytest
import yaml
from hydra import compose
from omegaconf import OmegaConf

from configs import schema
from configs.explain import known_keys
from configs.groups import CONFIG_DIR, groups, options
from optim.config import OPTIMIZERS, SCHEDULES
from tests.configs.composing import composer, config, raw
from training.config import Config
from training.legal.check import check

EXPERIMENTS = options("experiment")
# A group's file that has no value of its own to stand on, and the value that a person gives with it.
NEEDS = {
    "data=folder": "data.path=texts",
    "data=tfds": "data.name=wiki40b/en:1.3.0",
    "data=fineweb": "data.path=texts",
    "data=hf": "data.path=saved",
    "data=filtered": "data.path=texts",
    "tokenizer=file": "tokenizer.path=tokenizer.json",
    "tokenizer=inherit": "init_from=quickstart",
}


def test_the_experiments_are_those_that_the_readme_promises():
    promised = "debug gemma2_9b gpt2_124m llama3_70b llama3_8b llama_1b quickstart qwen3_8b".split()
    assert set(promised) <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_into_checked_dataclasses_under_its_own_name(name):
    made = config(f"+experiment={name}")
    check(made, None)
    check(made, made.training.global_batch_size)  # the most devices that plain data parallelism can use
    assert made.run.name == name
    assert made.run.dir == f"runs/{name}"
    assert type(made.optim) in OPTIMIZERS
    assert type(made.schedule) in SCHEDULES


PAIRS = list(itertools.product(options("optim"), options("schedule")))


def pairs_of(name):
    """Pairs in which each optimizer and each schedule is; over all experiments, each pair is in some."""
    turn, schedules = EXPERIMENTS.index(name), options("schedule")
    return [(o, schedules[(turn + i) % len(schedules)]) for i, o in enumerate(options("optim"))]


def test_every_optimizer_meets_every_schedule_in_some_experiment():
    """Composing compares two groups at a time: an experiment with each, and the two with one another."""
    assert {pair for name in EXPERIMENTS for pair in pairs_of(name)} == set(PAIRS)
    for name in EXPERIMENTS:
        assert {schedule for _, schedule in pairs_of(name)} == set(options("schedule"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_with_every_optimizer_and_schedule(name):
    with composer():
        for optim, schedule in pairs_of(name):
            words = [f"+experiment={name}", f"optim={optim}", f"schedule={schedule}"]
            made = schema.from_hydra(compose("config", overrides=words))
            check(made, None)
            assert (made.optim.name, made.schedule.name) == (optim.split("_")[0], schedule)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_leaves_the_optimizer_its_own_values(name):
    """Otherwise `optim=lion` over the experiment would fail, or keep another optimizer's learning rate."""
    values = yaml.safe_load((CONFIG_DIR / "experiment" / f"{name}.yaml").read_text())
    assert "optim" not in values
    assert set(values.get("schedule", {})) <= {"warmup_steps"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_begins_with_command_hardware_time_and_expectation(name):
    head = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    comments = [line for line in head.splitlines() if line.startswith("# ")]
    for word in ("command:", "hardware:", "time:", "expected:"):
        assert any(line.startswith(f"# {word}") for line in comments), word
    assert f"+experiment={name}" in head


@pytest.mark.parametrize("group", [group for group in groups() if group != "experiment"])
def test_every_option_of_a_group_composes(group):
    with composer():
        for name in options(group):
            words = ["run.name=any", f"{group}={name}"]
            if extra := NEEDS.get(f"{group}={name}"):
                words.append(extra)
            check(schema.from_hydra(compose("config", overrides=words)), None)


@pytest.mark.parametrize("optim", options("optim"))
def test_a_run_has_at_most_163_keys(optim):
    composed = OmegaConf.to_container(raw("+experiment=quickstart", f"optim={optim}", "schedule=wsd"))
    assert len(list(schema.leaves(composed))) <= 163  # 160, and what is frozen, adapted and rounded


def schemas():
    """Every dataclass that holds keys."""
    rooms = [type(value) for value in vars(Config()).values() if dataclasses.is_dataclass(value)]
    return [Config, *rooms, *OPTIMIZERS, *SCHEDULES]


@pytest.mark.parametrize("kind", schemas(), ids=lambda kind: kind.__name__)
def test_every_key_is_documented_where_it_is_declared(kind):
    lines = inspect.getsource(kind).splitlines()
    own = [field.name for field in dataclasses.fields(kind) if field.name in kind.__annotations__]
    undocumented = []
    for name in own:
        (line,) = [line for line in lines if re.match(rf"    {name}: ", line)]
        if "  # " not in line and f"`{name}" not in (kind.__doc__ or ""):
            undocumented.append(name)
    assert not undocumented


def test_every_key_has_a_plain_type():
    """`known_keys` words the type for people; Any or a bare dict would slip through OmegaConf unchecked."""
    words = {key.type for key in known_keys().values()}
    assert {"a whole number", "a number", "true or false", "text", "a number or null"} <= words
    assert not [word for word in words if "Any" in word or word == "a dict"]


def test_past_from_hydra_there_is_no_omegaconf():
    def walk(value):
        assert not OmegaConf.is_config(value)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name))
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)

    walk(config("+experiment=quickstart"))
