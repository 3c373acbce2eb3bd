"""Checks of what a person wrote: a ValueError in one line with key, value, limit and remedy."""

import difflib
import math
from collections.abc import Iterable

INT32 = 2**31 - 1


class ConfigError(ValueError):
    """The person who typed the command can put it right; the message is one line."""


def require(ok: bool, key: str, value: object, limit: str) -> None:
    """Raise ValueError unless `ok`, which is False for nan as well: every comparison with it is."""
    if not ok:
        raise ValueError(f"{key}={value} must be {limit}")


def within(key: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise ValueError unless least <= value <= most; None, of a key that may be null, passes."""
    limit = f"{least} or more" if most == math.inf else f"from {least} to {most}"
    require(value is None or least <= value <= most, key, value, limit)


def choice(key: str, value: object, options: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the options."""
    options = list(options)
    if value not in options:
        near = nearest(str(value), options)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"{key}={value} is not one of {', '.join(options)}{hint}")


def as_text(key: str, value: str) -> str:
    """A command line's value as text: its bytes are UTF-8 in any locale. ValueError where they are not."""
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        shown = value.encode("utf-8", "backslashreplace").decode("utf-8")
        raise ValueError(f"{key}={shown} is not UTF-8; type it in a terminal that is") from None


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, by the whole or by its last part (`num_layers` → `model.num_layers`)."""
    options = list(options)
    if close := difflib.get_close_matches(word, options, n=1):
        return close[0]
    last = {option.rsplit(".", 1)[-1]: option for option in options}
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.75)
    return last[close[0]] if close else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The remedy for a word that is not among the options: the nearest, or all of them."""
    options = list(options)
    near = nearest(word, options)
    return f"did you mean {near}?" if near else f"use one of {', '.join(options)}"
