"""Compose a config in the process, as `train.py` would."""

import contextlib
from collections.abc import Iterator

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from configs import schema
from configs.groups import CONFIG_DIR
from configs.optional_groups import opened
from training.config import Config


@contextlib.contextmanager
def composer() -> Iterator[None]:
    schema.register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield


def raw(*overrides: str) -> DictConfig:
    with composer():
        return compose("config", overrides=opened(overrides, Config))


def config(*overrides: str) -> Config:
    return schema.from_hydra(raw(*overrides))
