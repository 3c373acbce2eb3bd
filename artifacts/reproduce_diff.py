"""Two manifests beside each other: what is not as it was, by name and with both values; and how far into its
steps a run can be repeated at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.directory import DECIDES_BITS

ABSENT = "(absent)"
# What a resume may change without changing a bit of a step; everything else is another computation of it.
_HARMLESS = (
    *("run.", "logging.", "checkpoint.", "eval.", "sample.", "data.cache_dir", "data.workers", "data.path"),
    *("data.prefetch", "data.download", "tokenizer.path", "profile", "deterministic", "training.num_steps"),
)
# Of JAX's configuration: where compiled programs lie, not what they are.
_PLACES = ("jax_compilation_cache_dir",)
_SHOWN = 70  # characters of a value


@dataclass(frozen=True)
class Difference:
    """One fact with its two values; matters: whether a step may come out otherwise by it."""

    what: str
    then: str
    now: str
    matters: bool


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Of `manifest.surroundings`, the data's digests and the parent's, where `now` has them."""
    found = [*_by_key("package", then, now, "packages"), *_single(then, now), *_code(then, now)]
    for name in ("devices", "threads", "jax"):
        found += _by_key(name, then, now, name)
    found += _by_key("environment", then, now, "environment")
    found += _by_key("lock", then, now, "locks", matters=False)
    for name in ("data", "tokenizer", "parent"):
        if name in now:
            a, b = ((side.get(name) or {}).get("digest") for side in (then, now))
            found += _pair({"data": "dataset"}.get(name, name) + " digest", a, b)
    return found


def _single(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name, matters in (("python", True), ("cpu", True), ("system", False)):
        if name in then:  # the processor's name came into manifests later
            yield from _pair(name, then[name], now.get(name), matters)


def _code(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    a, b = then.get("git") or {}, now.get("git") or {}
    yield from _pair("commit", a.get("sha"), b.get("sha"))
    yield from _pair("uncommitted changes (sha256 of git diff)", a.get("diff_sha256"), b.get("diff_sha256"))
    old, new = set(a.get("untracked") or ()), set(b.get("untracked") or ())
    for name in sorted(old ^ new):
        then_there, now_there = ("there" if name in side else ABSENT for side in (old, new))
        yield Difference(f"untracked file {name}", then_there, now_there, name.endswith(".py"))


def _by_key(
    label: str, then: Mapping[str, Any], now: Mapping[str, Any], name: str, matters: bool = True
) -> Iterator[Difference]:
    a, b = then.get(name) or {}, now.get(name) or {}
    for key in sorted({*a, *b} - set(_PLACES)):
        # The machine's cores say nothing where the process has its own.
        yield from _pair(f"{label} {key}", a.get(key), b.get(key), matters and key != "cpus")


def _pair(what: str, then: Any, now: Any, matters: bool = True) -> Iterator[Difference]:
    if then != now:
        yield Difference(what, _shortened(then), _shortened(now), matters)


def _shortened(value: Any) -> str:
    text = ABSENT if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def first_config(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run's first start: of the last one, with what restarts changed taken back."""
    tree = _copied(config)
    for restart in reversed(manifest.get("restarts", [])):
        for key, (old, _) in restart.get("config", {}).items():
            *parents, leaf = key.split(".")
            place = tree
            for name in parents:
                place = place.setdefault(name, {})
            if old == ABSENT:
                place.pop(leaf, None)
            else:
                place[leaf] = old
    return tree


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def repeatable(manifest: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    """The last step that one start, as the first was, can repeat bit for bit (None: all), and what to say."""
    notes, limit = [], None
    for number, restart in enumerate(manifest.get("restarts", []), 1):
        why = [*_other_facts(manifest, restart), *_other_keys(restart)]
        if not why:
            notes.append(
                f"restart {number} at step {restart['step']}: as the first start, so nothing is lost"
            )
            continue
        limit = restart["step"] if limit is None else min(limit, restart["step"])
        notes.append(
            f"restart {number} at step {restart['step']}: with other {', '.join(why)}; "
            "steps behind it are sums in another order, and one rerun cannot repeat both"
        )
    if rollbacks := manifest.get("rollbacks"):
        notes.append(
            f"{len(rollbacks)} rollbacks: the rerun meets the same fault and goes back by itself, if it is "
            "bitwise equal until there; it runs to the end, since rows before a rollback are written anew"
        )
    return limit, notes


def _other_facts(manifest: Mapping[str, Any], restart: Mapping[str, Any]) -> Iterator[str]:
    for name in (*DECIDES_BITS, "git"):
        if name in restart and name in manifest and _bits(restart[name]) != _bits(manifest[name]):
            yield name


def _bits(fact: Any) -> Any:
    """Without what is beside the point: where programs are cached, which files nobody tracks, idle cores."""
    if not isinstance(fact, Mapping):
        return fact
    return {k: v for k, v in fact.items() if k not in (*_PLACES, "untracked", "cpus")}


def _other_keys(restart: Mapping[str, Any]) -> Iterator[str]:
    for key, (old, new) in restart.get("config", {}).items():
        if not key.startswith(_HARMLESS):
            yield f"{key} ({_shortened(old)}, then {_shortened(new)})"


@dataclass(frozen=True)
class Mismatch:
    """The first figure that is not as it was."""

    step: int
    key: str
    then: float
    now: float

    def __str__(self) -> str:
        apart = abs(self.then - self.now)
        share = apart / abs(self.then) if self.then else float("inf")
        return (
            f"step {self.step}: {self.key} was {self.then!r} and is {self.now!r}, "
            f"{apart:.3g} apart ({share:.3g} of it)"
        )


def compare(
    then: Sequence[Mapping[str, Any]],
    now: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    tolerance: float = 0.0,
) -> tuple[int, Mismatch | None]:
    """Training rows step by step: how many steps are equal from the first on, and what comes then.

    tolerance: relative difference that still passes; at 0 the numbers are equal, nan to nan.
    """
    again = {row["step"]: row for row in now}
    equal = 0
    for row in then:
        other = again.get(row["step"], {})
        for key in keys:
            a, b = float(row[key]), float(other.get(key, float("nan")))
            same = (
                a == b
                or (a != a and b != b and key in other)
                or abs(a - b) <= tolerance * max(abs(a), abs(b))
            )
            if not same:
                return equal, Mismatch(row["step"], key, a, b)
        equal += 1
    return equal, None
