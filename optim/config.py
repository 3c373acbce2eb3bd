"""Optimizers and schedules by name. What belongs to one optimizer lives in its own class and its own YAML."""

import math
from dataclasses import dataclass

from common.checks import require

MOMENT_DTYPES = ("float32", "bfloat16")


def _check_positive(key: str, value: float) -> None:
    require(0 < value < math.inf, key, value, "a finite number above 0")


def _check_decay_rate(key: str, value: float) -> None:
    require(0 <= value < 1, key, value, "at least 0 and below 1")


def _check_fraction(key: str, value: float) -> None:
    require(0 <= value <= 1, key, value, "between 0 and 1")


@dataclass
class OptimConfig:
    """What every optimizer has.

    `weight_decay` is decoupled, multiplied by the learning rate, and touches matrices and embeddings, never
    norms or biases.
    """

    name: str = "???"  # adamw | muon | lion | sgd, chosen with optim=NAME
    learning_rate: float = 3e-4  # the peak; schedule= shapes it
    weight_decay: float = 0.1  # per step, times the learning rate
    grad_clip: float | None = 1.0  # largest global gradient norm; null: no clipping
    moment_dtype: str = "float32"  # float32 | bfloat16, of what the optimizer remembers (docs/optimizers.md)

    def __post_init__(self) -> None:
        """ValueError where a value every optimizer has is out of its range."""
        _check_positive("optim.learning_rate", self.learning_rate)
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "at least 0")
        if self.grad_clip is not None:
            valid = 0 < self.grad_clip < math.inf
            require(valid, "optim.grad_clip", self.grad_clip, "above 0, or null for no clipping")
        valid = self.moment_dtype in MOMENT_DTYPES
        require(valid, "optim.moment_dtype", self.moment_dtype, " or ".join(MOMENT_DTYPES))


@dataclass
class AdamWConfig(OptimConfig):
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""

    name: str = "adamw"  # chosen with optim=adamw
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of their squares
    eps: float = 1e-8  # added to the root

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_decay_rate("optim.b1", self.b1)
        _check_decay_rate("optim.b2", self.b2)
        _check_positive("optim.eps", self.eps)


@dataclass
class MuonConfig(OptimConfig):
    """Jordan et al. 2024 for hidden matrices; everything else takes AdamW at `adam_learning_rate`.

    Everything else is embeddings, head, norms and biases. An orthogonalised update is multiplied by
    sqrt(max(1, fan_out / fan_in)), Jordan's scaling: it bounds what one step does to a layer's output
    whatever the width, so a learning rate found on a small model keeps its meaning on a wide one.
    `weight_decay` is multiplied by the learning rate of the group that a parameter is in.
    """

    name: str = "muon"  # chosen with optim=muon
    learning_rate: float = 0.02  # peak for hidden matrices
    momentum: float = 0.95  # decay of the mean of gradients
    nesterov: bool = True  # look one momentum step ahead
    ns_steps: int = 5  # Newton–Schulz iterations
    adam_learning_rate: float = 3e-3  # peak for everything that is not a hidden matrix
    adam_b1: float = 0.9  # AdamW's b1
    adam_b2: float = 0.95  # AdamW's b2
    adam_eps: float = 1e-8  # AdamW's eps

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_decay_rate("optim.momentum", self.momentum)
        require(self.ns_steps >= 1, "optim.ns_steps", self.ns_steps, "at least 1")
        _check_positive("optim.adam_learning_rate", self.adam_learning_rate)
        _check_decay_rate("optim.adam_b1", self.adam_b1)
        _check_decay_rate("optim.adam_b2", self.adam_b2)
        _check_positive("optim.adam_eps", self.adam_eps)


@dataclass
class LionConfig(OptimConfig):
    """Chen et al. 2023, arXiv:2302.06675."""

    name: str = "lion"  # chosen with optim=lion
    learning_rate: float = 1e-4  # the peak; a third to a tenth of AdamW's
    weight_decay: float = 1.0  # larger than AdamW's by what the learning rate is smaller
    b1: float = 0.9  # share of the old mean in the step
    b2: float = 0.99  # share of the old mean in the new one

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_decay_rate("optim.b1", self.b1)
        _check_decay_rate("optim.b2", self.b2)


@dataclass
class SGDConfig(OptimConfig):
    """Gradient descent with momentum (Sutskever et al. 2013); the mean of such steps is such a step."""

    name: str = "sgd"  # chosen with optim=sgd
    learning_rate: float = 0.1  # the peak
    weight_decay: float = 0.0  # per step, times the learning rate
    momentum: float = 0.9  # share of the last step that goes on; 0: off
    nesterov: bool = False  # look one momentum step ahead

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_decay_rate("optim.momentum", self.momentum)


@dataclass
class ScheduleConfig:
    """Learning rate as a share of its peak, over steps: linear warm-up, then the named shape."""

    name: str = "???"  # constant | cosine | linear | wsd, chosen with schedule=NAME
    warmup_steps: int = 100  # linear from 0 to the peak

    def __post_init__(self) -> None:
        """ValueError where the warm-up is negative."""
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "at least 0")


@dataclass
class ConstantConfig(ScheduleConfig):
    """Flat after the warm-up."""

    name: str = "constant"  # chosen with schedule=constant


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine from the end of the warm-up down to `final_fraction` at `training.num_steps`."""

    name: str = "cosine"  # chosen with schedule=cosine
    final_fraction: float = 0.1  # of the peak

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_fraction("schedule.final_fraction", self.final_fraction)


@dataclass
class LinearConfig(ScheduleConfig):
    """A line from the end of the warm-up down to `final_fraction` at `training.num_steps`."""

    name: str = "linear"  # chosen with schedule=linear
    final_fraction: float = 0.0  # of the peak

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_fraction("schedule.final_fraction", self.final_fraction)


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395).

    The decay is a line over the last `decay_fraction` of the steps. What comes before it does not depend on
    `training.num_steps`, so a run may be lengthened from any checkpoint of the stable part.
    """

    name: str = "wsd"  # chosen with schedule=wsd
    decay_fraction: float = 0.2  # share of num_steps
    final_fraction: float = 0.0  # of the peak

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        super().__post_init__()
        _check_fraction("schedule.decay_fraction", self.decay_fraction)
        _check_fraction("schedule.final_fraction", self.final_fraction)


# What optim=NAME and schedule=NAME may name: a class above is all that a new one needs here.
OPTIMIZERS: tuple[type[OptimConfig], ...] = tuple(OptimConfig.__subclasses__())
SCHEDULES: tuple[type[ScheduleConfig], ...] = tuple(ScheduleConfig.__subclasses__())
