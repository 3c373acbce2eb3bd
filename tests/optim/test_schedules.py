"""Schedules against their closed formulas."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from optim.config import (
    OPTIMIZERS,
    SCHEDULES,
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    MuonConfig,
    ScheduleConfig,
    WSDConfig,
)
from optim.schedules import make_schedule

NUM_STEPS, WARMUP = 50, 8


def constant(t, s):
    return 1.0


def cosine(t, s):
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t))


def linear(t, s):
    return 1 + t * (0.25 - 1)


def wsd(t, s):
    return 1.0 if s < 40 else 1 - (s - 40) / 10 * (1 - 0.5)


SHAPES = [
    (ConstantConfig, {}, constant),
    (CosineConfig, {"final_fraction": 0.1}, cosine),
    (LinearConfig, {"final_fraction": 0.25}, linear),
    (WSDConfig, {"decay_fraction": 0.2, "final_fraction": 0.5}, wsd),
]


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize(("config", "values", "formula"), SHAPES)
def test_schedule_equals_its_formula_at_every_step(config, values, formula, warmup):
    schedule = make_schedule(config(warmup_steps=warmup, **values), num_steps=NUM_STEPS)
    steps = np.arange(NUM_STEPS + 1)
    expected = [
        (s + 1) / warmup if s < warmup else formula((s - warmup) / (NUM_STEPS - warmup), s) for s in steps
    ]
    np.testing.assert_allclose([schedule(int(s)) for s in steps], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(steps), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "warmup"),
    [(ConstantConfig, 20), (CosineConfig, 20), (LinearConfig, 20), (LinearConfig, 5), (WSDConfig, 16)],
)
def test_every_update_has_a_positive_multiplier_of_at_most_one(config, warmup):
    schedule = make_schedule(config(warmup_steps=warmup), num_steps=20)
    values = [float(schedule(s)) for s in range(20)]
    assert min(values) > 0 and max(values) == 1.0


@pytest.mark.parametrize("config", [ConstantConfig, WSDConfig])
def test_a_longer_run_repeats_the_steps_before_the_decay(config):
    short = make_schedule(config(warmup_steps=5), num_steps=40)
    long = make_schedule(config(warmup_steps=5), num_steps=80)
    assert [float(short(s)) for s in range(32)] == [float(long(s)) for s in range(32)]


def test_a_schedule_that_does_not_fit_names_both_numbers():
    with pytest.raises(ValueError, match="schedule.warmup_steps=11 .* training.num_steps=10; use at most 10"):
        make_schedule(CosineConfig(warmup_steps=11), num_steps=10)
    with pytest.raises(ValueError, match="schedule.decay_fraction=0.5 .* schedule.warmup_steps=6 leaves 4"):
        make_schedule(WSDConfig(warmup_steps=6, decay_fraction=0.5), num_steps=10)
    with pytest.raises(ValueError, match="schedule.name=.* is unknown"):
        make_schedule(ScheduleConfig(warmup_steps=1), num_steps=10)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (AdamWConfig, "learning_rate", -1.0),
        (AdamWConfig, "learning_rate", math.nan),
        (AdamWConfig, "weight_decay", -0.1),
        (AdamWConfig, "grad_clip", 0.0),
        (AdamWConfig, "b2", 1.0),
        (AdamWConfig, "eps", 0.0),
        (MuonConfig, "ns_steps", 0),
        (MuonConfig, "adam_learning_rate", math.inf),
        (ConstantConfig, "warmup_steps", -1),
        (CosineConfig, "final_fraction", 1.5),
        (WSDConfig, "decay_fraction", -0.5),
    ],
)
def test_a_value_out_of_range_is_named(config, key, value):
    room = "schedule" if issubclass(config, ScheduleConfig) else "optim"
    with pytest.raises(ValueError, match=f"{room}.{key}={value} must be "):
        config(**{key: value})


@pytest.mark.parametrize("config", [*OPTIMIZERS, *SCHEDULES], ids=lambda config: config.name)
def test_every_number_has_a_range(config):
    open_fields = [one.name for one in dataclasses.fields(config) if not one.metadata]
    assert set(open_fields) <= {"name", "nesterov"}
