"""Optimizers and schedules by name. What belongs to one optimizer lives in its own class and its own YAML."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from common.checks import require

MOMENT_DTYPES = ("float32", "bfloat16")


def _ruled(ok: Callable[[Any], bool], limit: str) -> Callable[[Any], Any]:
    """Make fields, from their defaults, whose values must be `ok`."""
    return lambda default: field(default=default, metadata={"ok": ok, "limit": limit})


_above_zero = _ruled(lambda x: 0 < x < math.inf, "a finite number above 0")
_decay_rate = _ruled(lambda x: 0 <= x < 1, "at least 0 and below 1")
_fraction = _ruled(lambda x: 0 <= x <= 1, "between 0 and 1")
_not_negative = _ruled(lambda x: 0 <= x < math.inf, "at least 0")
_count = _ruled(lambda x: x >= 1, "at least 1")
_norm = _ruled(lambda x: x is None or 0 < x < math.inf, "above 0, or null for no clipping")
_dtype = _ruled(MOMENT_DTYPES.__contains__, " or ".join(MOMENT_DTYPES))


def _check(group: Any, room: str) -> None:
    for rule in fields(group):
        if rule.metadata:
            value = getattr(group, rule.name)
            require(rule.metadata["ok"](value), f"{room}.{rule.name}", value, rule.metadata["limit"])


@dataclass
class OptimConfig:
    """What every optimizer has.

    `weight_decay` is decoupled, multiplied by the learning rate, and touches matrices and embeddings, never
    norms or biases.
    """

    name: str = "???"  # adamw | muon | lion | sgd, chosen with optim=NAME
    learning_rate: float = _above_zero(3e-4)  # the peak; schedule= shapes it
    weight_decay: float = _not_negative(0.1)  # per step, times the learning rate
    grad_clip: float | None = _norm(1.0)  # largest global gradient norm; null: no clipping
    moment_dtype: str = _dtype("float32")  # float32 | bfloat16, of what it remembers (docs/optimizers.md)

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        _check(self, "optim")


@dataclass
class AdamWConfig(OptimConfig):
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""

    name: str = "adamw"  # chosen with optim=adamw
    b1: float = _decay_rate(0.9)  # decay of the mean of gradients
    b2: float = _decay_rate(0.95)  # decay of the mean of their squares
    eps: float = _above_zero(1e-8)  # added to the root


@dataclass
class MuonConfig(OptimConfig):
    """Jordan et al. 2024 for hidden matrices; everything else takes AdamW at `adam_learning_rate`.

    Everything else is embeddings, head, norms and biases. An orthogonalised update is multiplied by
    sqrt(max(1, fan_out / fan_in)), Jordan's scaling: it bounds what one step does to a layer's output
    whatever the width, so a learning rate found on a small model keeps its meaning on a wide one.
    `weight_decay` is multiplied by the learning rate of the group that a parameter is in.
    """

    name: str = "muon"  # chosen with optim=muon
    learning_rate: float = _above_zero(0.02)  # peak for hidden matrices
    momentum: float = _decay_rate(0.95)  # decay of the mean of gradients
    nesterov: bool = True  # look one momentum step ahead
    ns_steps: int = _count(5)  # Newton–Schulz iterations
    adam_learning_rate: float = _above_zero(3e-3)  # peak for everything that is not a hidden matrix
    adam_b1: float = _decay_rate(0.9)  # AdamW's b1
    adam_b2: float = _decay_rate(0.95)  # AdamW's b2
    adam_eps: float = _above_zero(1e-8)  # AdamW's eps


@dataclass
class LionConfig(OptimConfig):
    """Chen et al. 2023, arXiv:2302.06675."""

    name: str = "lion"  # chosen with optim=lion
    learning_rate: float = _above_zero(1e-4)  # the peak; a third to a tenth of AdamW's
    weight_decay: float = _not_negative(1.0)  # larger than AdamW's by what the learning rate is smaller
    b1: float = _decay_rate(0.9)  # share of the old mean in the step
    b2: float = _decay_rate(0.99)  # share of the old mean in the new one


@dataclass
class SGDConfig(OptimConfig):
    """Gradient descent with momentum (Sutskever et al. 2013); the mean of such steps is such a step."""

    name: str = "sgd"  # chosen with optim=sgd
    learning_rate: float = _above_zero(0.1)  # the peak
    weight_decay: float = _not_negative(0.0)  # per step, times the learning rate
    momentum: float = _decay_rate(0.9)  # share of the last step that goes on; 0: off
    nesterov: bool = False  # look one momentum step ahead


@dataclass
class ScheduleConfig:
    """Learning rate as a share of its peak, over steps: linear warm-up, then the named shape."""

    name: str = "???"  # constant | cosine | linear | wsd, chosen with schedule=NAME
    warmup_steps: int = _not_negative(100)  # linear from 0 to the peak

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        _check(self, "schedule")


@dataclass
class ConstantConfig(ScheduleConfig):
    """Flat after the warm-up."""

    name: str = "constant"  # chosen with schedule=constant


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine from the end of the warm-up down to `final_fraction` at `training.num_steps`."""

    name: str = "cosine"  # chosen with schedule=cosine
    final_fraction: float = _fraction(0.1)  # of the peak


@dataclass
class LinearConfig(ScheduleConfig):
    """A line from the end of the warm-up down to `final_fraction` at `training.num_steps`."""

    name: str = "linear"  # chosen with schedule=linear
    final_fraction: float = _fraction(0.0)  # of the peak


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395).

    The decay is a line over the last `decay_fraction` of the steps. What comes before it does not depend on
    `training.num_steps`, so a run may be lengthened from any checkpoint of the stable part.
    """

    name: str = "wsd"  # chosen with schedule=wsd
    decay_fraction: float = _fraction(0.2)  # share of num_steps
    final_fraction: float = _fraction(0.0)  # of the peak


# What optim=NAME and schedule=NAME may name: a class above is all that a new one needs here.
OPTIMIZERS: tuple[type[OptimConfig], ...] = tuple(OptimConfig.__subclasses__())
SCHEDULES: tuple[type[ScheduleConfig], ...] = tuple(ScheduleConfig.__subclasses__())
