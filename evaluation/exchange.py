"""Plain data between a generated program and its tests, which share nothing but two pipes of JSON lines.

Plain data goes through as copies; any other object stays in the program, and the tests hold a `Proxy` of it.
With the standard library alone, as `evaluation.confine`, which calls it.
"""

import builtins
import contextlib
import importlib
import json
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

SPECIAL = ("iter", "next", "len", "str", "bool", "getitem", "setitem", "contains")
SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(builtins, name) for name in ("getattr", "setattr", "iter", "next", "len", "str", "bool")
    },
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "contains")},
}


def pack(value: Any, handle: Callable[[Any], Any]) -> Any:
    """A value as JSON can say it; `handle` gives what stands for any that is not plain data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [pack(item, handle) for item in value]
    if isinstance(value, dict):
        return {"dict": [[pack(key, handle), pack(item, handle)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [pack(item, handle) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    return {"handle": handle(value)}


def unpack(value: Any, handle: Callable[[int], Any]) -> Any:
    """The inverse: of none but plain types, whoever wrote it."""
    if isinstance(value, list):
        return [unpack(item, handle) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind == "dict":
        return {unpack(key, handle): unpack(item, handle) for key, item in inner}
    if kind in SEQUENCES:
        return SEQUENCES[kind](unpack(item, handle) for item in inner)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "complex":
        return complex(*inner)
    if kind == "module":  # the tests' own copy of it: the program may have changed what is in its
        return importlib.import_module(inner) if inner.split(".")[0] in sys.stdlib_module_names else None
    return handle(int(inner))


def answer(module: types.ModuleType, requests: TextIO, answers: TextIO) -> None:
    """Give the tests the program's names, then what they ask for, until they end."""
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def handle(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    def say(*message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    say({name: pack(value, handle) for name, value in vars(module).items() if not name.startswith("__")})
    for line in requests:
        name, given, named = json.loads(line)
        given, named = (unpack(part, objects.__getitem__) for part in (given, named))
        try:
            result = OPERATIONS[name](*given) if name in OPERATIONS else given[0](*given[1:], **named)
            # What the program did to lists and dicts that it was given comes back too.
            say("value", pack(result, handle), pack(given[1:], handle))
        except Exception as error:
            say("error", type(error).__name__, str(error)[:1000])


class Gone(Exception):
    """The program ended before its tests did."""


class Proxy:
    """An object of the program in the tests' hands: called, looked into or iterated, it asks the program."""

    ask: Callable[..., Any]
    numbers: dict["Proxy", int] = {}

    def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: D102
        return Proxy.ask("call", self, *given, **named)

    def __getattr__(self, name: str) -> Any:
        return Proxy.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        Proxy.ask("setattr", self, name, value)


for _name in SPECIAL:
    setattr(Proxy, f"__{_name}__", lambda self, *given, _name=_name: Proxy.ask(_name, self, *given))


def remote_names(requests: TextIO, answers: TextIO) -> dict[str, Any]:
    """The program's names, as the tests get them. Raises Gone where the program has ended."""
    remotes: dict[int, Proxy] = {}

    def handle(number: int) -> Proxy:
        if number not in remotes:
            remotes[number] = Proxy()
            Proxy.numbers[remotes[number]] = number
        return remotes[number]

    def heard() -> Any:
        line = answers.readline()
        if not line.endswith("\n"):
            raise Gone("the program ended before its tests did")
        return json.loads(line)

    def number(value: Any) -> int:
        if not isinstance(value, Proxy):
            raise TypeError(f"the tests give the program a {type(value).__name__}, which is not plain data")
        return Proxy.numbers[value]

    def ask(name: str, *given: Any, **named: Any) -> Any:
        message = [name, pack(list(given), number), pack(named, number)]
        with contextlib.suppress(BrokenPipeError):  # `heard` says so
            requests.write(json.dumps(message) + "\n")
            requests.flush()
        kind, result, rest = heard()
        if kind == "error":
            error = getattr(builtins, result, Exception)
            raise (error if isinstance(error, type) and issubclass(error, Exception) else Exception)(rest)
        for old, new in zip(given[1:], unpack(rest, handle), strict=True):
            if type(old) in (list, dict, set) and type(new) is type(old) and new != old:
                old.clear()
                (old.extend if isinstance(old, list) else old.update)(new)
        return unpack(result, handle)

    Proxy.ask = staticmethod(ask)
    return {name: unpack(value, handle) for name, value in heard()[0].items()}
