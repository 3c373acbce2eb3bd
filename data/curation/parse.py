"""`data.steps` as a person writes it → dataclasses of `data.curation.config`, or one line on what is
wrong.
"""

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

from common.checks import choice, did_you_mean
from data.curation.config import STEPS, Compress, FilterQuality, Shard, Step


def parse_steps(entries: Iterable[Any]) -> tuple[Step, ...]:
    """Turn `data.steps` into dataclasses, in its order.

    Raises ValueError, one line that names the entry, for an unknown step or parameter and a value of the
    wrong type or out of range.
    """
    steps = tuple(_parse(f"data.steps[{number}]", entry) for number, entry in enumerate(entries))
    for kind in (Compress, Shard):
        if sum(isinstance(step, kind) for step in steps) > 1:
            raise ValueError(f"data.steps has two steps {kind.step}, but is written once; leave one out")
    return steps


def as_dict(step: Step) -> dict[str, Any]:
    """Return a step with all its parameters, json-able: what a digest and a report hold."""
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    named = {name: dict(value) for name, value in values.items() if _is_mapping(step, name)}
    return {"step": step.step, **values, **named}


def _is_mapping(step: Step, name: str) -> bool:
    return isinstance(step, FilterQuality) and name in ("min", "max")


def _parse(where: str, entry: Any) -> Step:
    if not isinstance(entry, Mapping) or "step" not in entry:
        raise ValueError(f"{where}={entry} names no step; write it as {{step: dedup_exact}}")
    name = str(entry["step"])
    try:
        choice("step", name, STEPS)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    kind = STEPS[name]
    hints = {key: hint for key, hint in get_type_hints(kind).items() if key != "step"}
    given = {str(key): value for key, value in entry.items() if key != "step"}
    for key in given:
        if key not in hints:
            raise ValueError(f"{where}.{key} is no parameter of {name}; {did_you_mean(key, hints)}")
    missing = [f.name for f in fields(kind) if f.name not in given and f.default is MISSING]
    if missing:
        raise ValueError(f"{where} ({name}) needs {' and '.join(missing)}; add it")
    try:
        made = kind(**{key: _typed(key, value, hints[key]) for key, value in given.items()})
    except ValueError as error:
        raise ValueError(f"{where} ({name}): {error}") from None
    return made


WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text, in quotes where it looks like a number",
}


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the dataclass holds it. Raises ValueError where it is of another type."""
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _typed(key, value, get_args(hint)[0])
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return _pairs(key, value) if get_origin(inner) is tuple else _words(key, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{key}={value} must be {WANTED[hint]}")
    return value


def _words(key: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(word, str) for word in listed):
        raise ValueError(f"{key}={value} must be a list of words, such as [en]")
    return tuple(listed)


def _pairs(key: str, value: Any) -> tuple[tuple[str, float | None], ...]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={value} must map features to numbers, as {{digits: 0.2}} does")
    return tuple(
        (str(name), _typed(f"{key}.{name}", number, float | None)) for name, number in sorted(value.items())
    )
