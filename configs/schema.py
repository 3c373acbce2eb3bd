"""Hydra's side of the configuration: which schema each file inherits from, and a composed config made plain.

Past `from_hydra` there is no OmegaConf. The root dataclass stands in `training.config`, what several of its
values must agree on in `training.legal`.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from common.checks import INT32, ConfigError
from configs.optional_groups import register_rooms
from optim.config import OPTIMIZERS, SCHEDULES
from training.config import Config


@functools.cache
def register() -> None:
    """Put the schemas in Hydra's store, once a process; the YAML files inherit from them by name."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for schema in OPTIMIZERS:
        store.store(group="schema/optim", name=schema.name, node=schema)
    for schedule in SCHEDULES:
        store.store(group="schema/schedule", name=schedule.name, node=schedule)
    register_rooms(Config)


def from_hydra(cfg: DictConfig) -> Config:
    """The composed config as plain dataclasses, each value checked by itself.

    Raises ConfigError for a value out of range, and OmegaConf's own errors for missing or mistyped ones.
    """
    for key, value in leaves(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)):
        # OmegaConf takes nan and inf for floats, and no comparison below would catch every one.
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not a finite number; give an ordinary one, such as 0.1")
        if isinstance(value, int) and abs(value) > INT32:  # counters and seeds on devices
            raise ConfigError(f"{key}={value} is too large; use at most {INT32}")
    try:
        config = OmegaConf.to_object(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert isinstance(config, Config)
    return config


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts; a list is one leaf."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
