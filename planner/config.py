"""What is asked of the planner: the `plan.*` words of scripts/plan.py, apart from the run's configuration."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from common.checks import choice, did_you_mean, within

PREFIX = "plan."
COMPILE = ("auto", "always", "never")
MOST_COMPILED = 4096  # devices: above them plan.compile=auto computes


@dataclass
class PlanConfig:
    """What to plan with, what to look for, and where to write it."""

    compile: str = "auto"  # auto: where the compiler is installed, up to 4,096 devices | always | never
    output: str | None = None  # FILE.json with every figure
    price: float | None = None  # of one device for an hour, in any currency
    tokens: int | None = None  # of the whole run; null: training.num_steps times the batch
    fixes: int = 3  # of a plan that does not fit: how many changes to look for
    search: bool = False  # look for the fastest plan on these devices
    top: int = 8  # of a search: how many plans are compiled
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)  # processes that compile side by side
    directory: str | None = None  # of a search's files; null: plans/RUN.NAME
    experiment: str | None = None  # a search's winner, written to configs/experiment/NAME.yaml as well

    def __post_init__(self) -> None:
        """Refuse each value that is out of its range."""
        choice("plan.compile", self.compile, COMPILE)
        for key, least in (("tokens", 1), ("fixes", 0), ("top", 1), ("jobs", 1)):
            within(f"plan.{key}", getattr(self, key), least)
        within("plan.price", self.price, 0)
        if self.output is not None and not self.output.endswith(".json"):
            raise ValueError(f"plan.output={self.output} must end in .json")


def split_words(argv: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """What the `plan.*` words ask for, and the words that are left for the run.

    Raises ValueError where one is no key, has another type, or is out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    own = [word for word in argv if word.lstrip("+").startswith(PREFIX)]
    keys = [f"plan.{f.name}" for f in fields(PlanConfig)]
    pairs = [word.lstrip("+").removeprefix(PREFIX) for word in own]
    for word, pair in zip(own, pairs, strict=True):
        if "=" not in pair:
            raise ValueError(f"{word} is not KEY=VALUE; for example plan.output=plan.json")
    try:
        given = OmegaConf.from_dotlist(list(map(_as_typed, pairs)))
        merged = OmegaConf.merge(OmegaConf.structured(PlanConfig), given)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        name = str(error.full_key)
        raise ValueError(f"plan.{name} is not a key; {did_you_mean(f'plan.{name}', keys)}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"plan.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, PlanConfig)
    return config, [word for word in argv if word not in own]


def _as_typed(pair: str) -> str:
    """`KEY=VALUE`, in quotes where the key takes text, in which YAML might read a number or a date."""
    key, _, value = pair.partition("=")
    text = {f.name for f in fields(PlanConfig) if f.type in (str, str | None)}
    bare = key in text and value not in ("", "null") and value[0] not in "'\""
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if bare else pair
