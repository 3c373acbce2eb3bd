"""One form for the command lines of scripts, `python scripts/NAME.py RUN key=value ...`, and for their ends.

A script's dataclass says its words: `parse` gives positional ones to the fields that are named, any other as
key=value; `--key value` and `--flag` of before are taken too. `run` says what is wrong in one line. Scripts
that compose a config take train.py's words instead, which are Hydra's.
"""

import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "command":
    # A script imports this file so from its own directory: the clone may never have been installed, and
    # `slurm` or `kubernetes` here would be taken for the packages of those names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.checks import did_you_mean
from common.errors import RunFault
from common.terminal import steady_streams

OptionsT = TypeVar("OptionsT")
TRUTH = {"true": True, "false": False}


def parse(words: Sequence[str], options: type[OptionsT], positional: Sequence[str] = ("run",)) -> OptionsT:
    """The words as that dataclass. Raises ValueError, in one line, for what it has no place for."""
    types = typing.get_type_hints(options)
    free, values = list(positional), dict[str, Any]()
    rest = iter(words)
    for word in rest:
        key, equals, text = word.partition("=")
        if key.startswith("--"):
            key = key[2:].replace("-", "_")
            if key in types and not equals:
                following = "true" if types[key] is bool else next(rest, None)
                if following is None:
                    raise ValueError(f"{word} is without a value; as in {key}=VALUE")
                text = following
        elif not equals or not key.isidentifier():  # a run's name may hold "=", as those of a sweep do
            free = [name for name in free if name not in values]
            if not free:
                raise ValueError(f"{word!r} is no key=value; --help lists the keys")
            key, text = free[0], word
        if key not in types:
            raise ValueError(f"{key} is no key of this command; {did_you_mean(key, types)}")
        values[key] = _typed(key, text, types[key])
    for item in fields(options):  # type: ignore[arg-type]
        if item.default is MISSING and not values.get(item.name):
            name = item.name.upper() if item.name in positional else f"{item.name}=..."
            raise ValueError(f"{name} is missing; --help shows the whole command")
    return options(**values)


def _typed(key: str, text: str, kind: Any) -> Any:
    kinds = typing.get_args(kind) or (kind,)
    if text == "null" and type(None) in kinds:  # as every help says it
        return None
    (kind,) = (k for k in kinds if k is not type(None))
    if kind is bool:
        if text not in TRUTH:
            raise ValueError(f"{key}={text} is not true or false")
        return TRUTH[text]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text} is not {'a whole number' if kind is int else 'a number'}") from None


def run(action: Callable[[Sequence[str]], int], words: Sequence[str], purpose: str | None) -> int:
    """Do it, or print the purpose where help is asked for; the exit status: the action's, 2 for bad input.

    HYDRA_FULL_ERROR=1 shows the traceback, as it does for train.py.
    """
    if "--help" in words or "-h" in words:
        print(purpose, end="")
        return 0
    try:
        return action(words)
    except (ValueError, OSError, RunFault) as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        return refuse(error)


def refuse(error: BaseException | str) -> int:
    """Print an error in one line; the exit status that goes with it."""
    print("error: " + "; ".join(str(error).split("\n")), file=sys.stderr)
    return error.status if isinstance(error, RunFault) else 2


def start(main: Callable[[Sequence[str]], int]) -> None:
    """Be the process of this command, from its streams to its exit status."""
    steady_streams()
    sys.exit(main(sys.argv[1:]))
