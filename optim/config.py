"""Optimizers and schedules by name. What belongs to one optimizer lives in its own class and its own YAML."""

from dataclasses import dataclass


@dataclass
class OptimConfig:
    """What every optimizer has. `weight_decay` is decoupled and touches matrices and embeddings, never norms or biases."""

    name: str = "???"
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0  # global norm


@dataclass
class AdamWConfig(OptimConfig):
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


@dataclass
class MuonConfig(OptimConfig):
    """Jordan et al. 2024 for hidden matrices; embeddings, head, norms and biases take AdamW at `adam_learning_rate`."""

    name: str = "muon"
    learning_rate: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adam_learning_rate: float = 3e-3
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8


@dataclass
class LionConfig(OptimConfig):
    """Chen et al. 2023, arXiv:2302.06675."""

    name: str = "lion"
    learning_rate: float = 1e-4
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.99


@dataclass
class ScheduleConfig:
    """Learning rate as a share of its peak, over steps: linear warm-up, then the named shape."""

    name: str = "???"
    warmup_steps: int = 100


@dataclass
class ConstantConfig(ScheduleConfig):
    """Flat after the warm-up."""

    name: str = "constant"


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine down to `final_fraction` at the last step."""

    name: str = "cosine"
    final_fraction: float = 0.1


@dataclass
class LinearConfig(ScheduleConfig):
    """A line down to `final_fraction` at the last step."""

    name: str = "linear"
    final_fraction: float = 0.0


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): linear decay over the last `decay_fraction` of the steps."""

    name: str = "wsd"
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
