"""One line that says what is wrong with an override and how to put it right, since Hydra's words do not."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from common.checks import ConfigError, did_you_mean, nearest
from configs.groups import CONFIG_DIR, groups, options
from data.config import component_keys
from kernels.names import LOGICAL_AXES
from optim.config import OPTIMIZERS, SCHEDULES
from parallel.config import MESH_AXES
from training.config import Config

OPTIONAL = ("autoscale",)  # groups that a run need not have: ~NAME leaves them out
NAME_IT = "add +experiment=NAME (--help lists them) or run.name=NAME"
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


@dataclass
class Key:
    """A key's type, and the optimizers or schedules that have it where not all do."""

    type: str
    owners: list[str] = field(default_factory=list)


def known_keys() -> dict[str, Key]:
    """Every key that a command may set."""
    keys = _keys(Config, "")
    for group, schemas in (("optim", OPTIMIZERS), ("schedule", SCHEDULES)):
        common = {key for key in keys if key.startswith(f"{group}.")}
        for schema in schemas:
            for sub in fields(schema):
                key = f"{group}.{sub.name}"
                if key not in common:
                    keys.setdefault(key, Key(_type(sub.type))).owners.append(schema.name)
    return keys


def _keys(room: type, prefix: str) -> dict[str, Key]:
    """Of a dataclass and of those in it; one that may be null is a key itself as well."""
    keys: dict[str, Key] = {}
    for name, kind in get_type_hints(room).items():
        parts = [part for part in (kind, *get_args(kind)) if is_dataclass(part)]
        if not parts or kind is not parts[0]:
            keys[prefix + name] = Key(_type(kind))
        for part in parts:
            keys |= _keys(part, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def _type(annotation: Any) -> str:
    for part in get_args(annotation):
        if is_dataclass(part):
            first = fields(part)[0]
            return f"keys in braces, such as {{{first.name}: {first.default}}}, or null"
    name = annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
    base = name.removesuffix(" | None")
    words = TYPES.get(base, f"a {base}")
    return f"{words} or null" if base != name else words


def check_overrides(words: Sequence[str], root: Path, *, strict: bool) -> None:
    """Raise ConfigError for the first word that names no key, group or option.

    `strict=False` leaves unknown names to Hydra, since other directories may hold more of them than `root`.
    """
    keys = known_keys()
    for word in words:
        override = _parse(word, root)
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")) or override.package is not None:
            continue
        if key in groups(root):
            _check_sign(override, word)
            if strict and not override.is_delete():
                _check_options(override, root)
        elif strict and not _known(key, keys):
            raise ConfigError(f"{key} is not a key; {_suggest(key, [*keys, *groups(root)])}")
        elif override.is_add() and key in keys:
            raise ConfigError(f"{word}: {key} exists already; drop the +: {word.lstrip('+')}")


def _parse(word: str, root: Path) -> Override:
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException as error:
        if "=" not in word:
            homes = [
                f"{'+' if g == 'experiment' else ''}{g}={word}" for g in groups(root) if word in options(g)
            ]
            flag = nearest(word, ["--help", "--cfg", "--multirun", "--resolve"])
            homes += [flag] if flag and word.startswith("-") else []
            hint = f"; did you mean {homes[0]}?" if homes else "; for example training.num_steps=100"
            raise ConfigError(f"{word} is not KEY=VALUE{hint}") from error
        quoted = "; quote the value if it has spaces, commas, brackets or = in it: KEY='\"VALUE\"'"
        raise ConfigError(f"{word} cannot be read as KEY=VALUE{quoted}") from error


def _known(key: str, keys: Iterable[str]) -> bool:
    if key.startswith("mesh.rules."):
        axis = key.removeprefix("mesh.rules.")
        if axis not in LOGICAL_AXES:
            raise ConfigError(f"{key} names no logical axis; {did_you_mean(axis, LOGICAL_AXES)}")
        return True
    if key.startswith("mesh.dcn."):
        axis = key.removeprefix("mesh.dcn.")
        if axis not in MESH_AXES:
            raise ConfigError(f"{key} names no mesh axis; {did_you_mean(axis, MESH_AXES)}")
        return True
    if key.startswith("objective."):
        # By what the files set: an objective's own class says more, and would load all of JAX for a message.
        settings = objective_keys()
        if key not in settings:
            raise ConfigError(f"{key} is not a key of any objective; {did_you_mean(key, settings)}")
        return True
    if key.startswith("data.mixture."):
        name, _, rest = key.removeprefix("data.mixture.").partition(".")
        inner = component_keys()
        if rest and rest not in inner and rest.split(".")[0] not in inner:
            raise ConfigError(f"{key} is not a key of a component; {did_you_mean(rest, inner)}")
        return bool(name)
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside and key not in keys:
        raise ConfigError(f"{key} holds several keys; set one of them, such as {inside[0]}")
    return key in keys


def objective_keys(root: Path = CONFIG_DIR) -> list[str]:
    """The keys that the files of `configs/objective` set, `objective.` before them."""
    files = sorted((root / "objective").glob("*.yaml"))
    return sorted({f"objective.{key}" for path in files for key in yaml.safe_load(path.read_text("utf-8"))})


def _suggest(key: str, candidates: list[str]) -> str:
    near = nearest(key, candidates)
    return f"did you mean {near}?" if near else "--cfg job prints all of them"


def _check_sign(override: Override, word: str) -> None:
    group, bare = override.key_or_group, word.lstrip("+~")
    if override.is_delete() and group not in OPTIONAL:
        raise ConfigError(f"{word}: a run needs its {group}; choose one with {group}=NAME")
    if group == "experiment" and not (override.is_add() or override.is_force_add()):
        raise ConfigError(f"{word}: an experiment comes on top; did you mean +{bare}?")
    if group != "experiment" and (override.is_add() or override.is_force_add()):
        raise ConfigError(f"{word}: a run has one {group} already; drop the +: {bare}")


def _check_options(override: Override, root: Path) -> None:
    group = override.key_or_group
    legal = options(group, root)
    for name in _values(override):
        if name is None and group in OPTIONAL:
            raise ConfigError(f"{group}=null: leave a part out with ~{group}")
        if name not in legal:
            near = nearest(str(name), legal)
            sign = "+" if group == "experiment" else ""
            hint = f"; did you mean {sign}{group}={near}?" if near else ""
            raise ConfigError(f"{sign}{group}={name} is not one of {', '.join(legal)}{hint}")


def _values(override: Override) -> Iterator[Any]:
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        yield from value if isinstance(value, list) else [value]


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf, in terms of the key that it is about."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, InterpolationToMissingValueError):
            return f"run.name is not set; {NAME_IT}" if "run.name" in str(link) else _first_line(link)
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return _explain_key(link)
    for link in chain:
        if isinstance(link, HydraException):
            return " ".join(str(link).split())
    return " ".join(str(error).split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _explain_key(error: OmegaConfBaseException) -> str:
    key, keys = str(error.full_key), known_keys()
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is not set; {NAME_IT if key == 'run.name' else f'give {key}=VALUE'}"
    base = re.sub(r"\[.*", "", key)
    if isinstance(error, ValidationError) and base in keys:
        match = re.search(r"Value '(.*?)' (of type|is not)", str(error))
        value = f"={match.group(1)}" if match else ""
        return f"{key}{value} has the wrong type; it takes {keys[base].type}"
    if key in keys and keys[key].owners:
        group = key.split(".")[0]
        return f"{key} belongs to {group}={' or '.join(keys[key].owners)} only; choose that, or drop the key"
    if key.startswith("objective."):
        return f"{key} is not a key of this objective; choose another with objective=NAME, or drop the key"
    if key.startswith("mesh.rules."):
        return f"{key} has no rule yet; add one with +{key}=[AXIS]"
    if key.startswith("data.mixture."):
        return f"{key} is not there yet; begin its keys with +, as in +{key}.weight=1.0"
    if key.startswith("mesh.dcn."):
        return f"{key} has no factor yet; add one with +{key}=SLICES"
    if key not in keys:
        return f"{key} is not a key; {_suggest(key, list(keys))}"
    return f"{key}: {_first_line(error)}"
