"""Recipes by name: YAML files of `configs/compress/` or others, each a list of steps and what they read.

    calibration: {rows: 64, length: 512, seed: 0}     # of the run's own text, or of data=
    held_out: 32                                      # rows that figures are of
    steps:
      - {prune: sparsegpt, pattern: "2:4"}            # magnitude, wanda, sparsegpt
      - {slice: width, mlp: 0.67}                     # width, depth, experts
      - {factorize: whitened, share: 0.5}             # svd, whitened
      - {quantize: gptq, bits: 4, group: 64}          # rtn, gptq, awq, smooth

A step that trains, such as distilling a sliced model, is an ordinary run: what is written is a directory that
`init_from=` takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from common.checks import ConfigError, did_you_mean, within
from compress.low_rank import Factorize
from compress.slice import Slice
from compress.steps import Prune, Quantize, Step

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "compress"
STEPS: dict[str, Any] = {"quantize": Quantize, "prune": Prune, "slice": Slice, "factorize": Factorize}


@dataclass(frozen=True)
class Calibration:
    """Text that steps record: rows of so many tokens, drawn by this seed."""

    rows: int = 64
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        within("calibration.rows", self.rows, 1)
        within("calibration.length", self.length, 2)


@dataclass(frozen=True)
class Recipe:
    """Steps in order, the text they are calibrated by, and rows of held-out text to judge by."""

    name: str
    steps: tuple[Step, ...]
    calibration: Calibration = field(default_factory=Calibration)
    held_out: int = 32

    def __post_init__(self) -> None:
        within("held_out", self.held_out, 1)
        if not self.steps:
            raise ValueError("steps is empty; a recipe has one at least, such as {quantize: rtn, bits: 8}")


def load_recipe(name: str) -> Recipe:
    """A recipe by its name in `configs/compress/`, or by the path of a YAML file. Raises ConfigError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        there = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise ConfigError(f"recipe={name} is no recipe and no YAML file; {did_you_mean(name, there)}")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(values, Mapping):
            raise ValueError("it is no mapping; a recipe has steps, calibration and held_out")
        return recipe(path.stem, values)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"recipe={name}: {' '.join(str(error).split())}") from None


def recipe(name: str, values: Mapping[str, Any]) -> Recipe:
    """Of a file's values. ValueError for a key or a value that is none."""
    known = [one.name for one in fields(Recipe) if one.name != "name"]
    _refuse_others(values, known)
    steps = tuple(_step(step) for step in values.get("steps") or ())
    given = values.get("calibration") or {}
    _refuse_others(given, [one.name for one in fields(Calibration)])
    rest = {"held_out": values["held_out"]} if "held_out" in values else {}
    return Recipe(name, steps, Calibration(**given), **rest)


def _step(values: Mapping[str, Any]) -> Step:
    kind = str(next(iter(values), "nothing"))
    if kind not in STEPS:
        raise ValueError(f"a step begins with {kind}; {did_you_mean(kind, STEPS)}")
    _refuse_others(values, [kind, *(one.name for one in fields(STEPS[kind]) if one.name != "method")])
    return STEPS[kind](values[kind], **{key: value for key, value in values.items() if key != kind})


def _refuse_others(values: Mapping[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{key} is no key there; {did_you_mean(str(key), known)}")
