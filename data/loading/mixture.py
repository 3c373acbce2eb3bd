"""Several corpora in one order of rows, by weights that may change over the steps, in closed form.

Letters: C components, S steps at which some weight's schedule has a point, R rows.

A component's share of the rows is its weight over the sum of all weights. Shares are taken at each of the S
steps and go linearly from one to the next; before the first and past the last they stand still. So T_i(n),
the rows that are due to component i among the first n, is piecewise quadratic in n. Row j of component i
belongs at the time t where T_i(t) = j + 1/2, and the rows of all components are read in the order of these
times, ties in the order of names: the divisor method of Webster and Sainte-Lague. What has been read of a
component never differs from what is due to it by more than about a row, and which row of which component the
global row n is follows from n and the weights alone: nothing has to be counted, stored or restored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from common.checks import did_you_mean
from data.config import OWN, SHARED, DataConfig, component_keys

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Component:
    """One corpus of a mixture: its weight by [step, weight] points, and how often it may be read at most."""

    data: DataConfig
    weight: Points
    epochs: float | None


def components(data: DataConfig) -> dict[str, Component]:
    """Return the components of `data.mixture` by name, in the order of names.

    Raises ValueError, one line with the key, for what is wrong with one of them.
    """
    if data.mode == "streaming":
        raise ValueError(
            "data.mixture needs data.mode=cached: a stream cannot say beforehand how many rows a corpus has, "
            "so neither shares nor epochs would be exact; use data.mode=cached"
        )
    found = {name: _component(data, name, data.mixture[name]) for name in sorted(data.mixture)}
    for step in sorted({step for part in found.values() for step, _ in part.weight}):
        if not any(_weight_at(part.weight, step) for part in found.values()):
            raise ValueError(
                f"data.mixture: all weights are 0 at step {step}; give one of them a weight there"
            )
    return found


def _component(data: DataConfig, name: str, values: Any) -> Component:
    key = f"data.mixture.{name}"
    if not isinstance(values, Mapping) or "weight" not in values:
        raise ValueError(f"{key} has no weight; give one, such as {key}.weight=1.0")
    if "/" in name or not name:
        raise ValueError(f"data.mixture has a component named {name!r}; use a name without a slash")
    for unknown in (k for k in values if k not in component_keys()):
        if unknown in SHARED:
            raise ValueError(f"{key}.{unknown} is the same for all components; set data.{unknown}")
        raise ValueError(f"{key}.{unknown} is not a key; {did_you_mean(unknown, component_keys())}")
    epochs = values.get("epochs")
    if epochs is not None and (not _is_number(epochs) or epochs <= 0):
        raise ValueError(f"{key}.epochs={epochs} is no positive number; use 1 or more, or null for no limit")
    own = {k: value for k, value in values.items() if k not in OWN}
    try:
        config = replace(data, mixture={}, curriculum=[], **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from None
    return Component(
        config, _points(f"{key}.weight", values["weight"]), None if epochs is None else float(epochs)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _points(key: str, value: Any) -> Points:
    pairs = [[0, value]] if _is_number(value) else value
    sound = isinstance(pairs, list) and pairs
    if not sound or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError(
            f"{key}={value} is neither a number nor a list of [step, weight]; use 1.0 or [[0,1.0]]"
        )
    if not all(type(step) is int and step >= 0 and _is_number(w) and w >= 0 for step, w in pairs):
        raise ValueError(f"{key}={value}: steps are whole numbers from 0, weights are numbers from 0")
    if any(a[0] >= b[0] for a, b in zip(pairs, pairs[1:], strict=False)):
        raise ValueError(f"{key}={value}: steps must grow from point to point")
    return [(step, float(weight)) for step, weight in pairs]


def _weight_at(points: Points, step: int) -> Fraction:
    """Return a weight at a step, exactly: linear between points, constant outside."""
    after = next((i for i, (at, _) in enumerate(points) if at >= step), len(points))
    if after == 0 or after == len(points):
        return Fraction(points[min(after, len(points) - 1)][1])
    (a, u), (b, v) = points[after - 1], points[after]
    return Fraction(u) + (Fraction(v) - Fraction(u)) * Fraction(step - a, b - a)


class Interleaving:
    """Which row of which component each global row is.

    Tables are computed in fractions and rounded once, and what follows are single operations on float64, so
    that every host has the same numbers. Exact as long as rows number less than about 10^13.
    """

    def __init__(self, weights: Sequence[Points], batch_size: int):
        steps = sorted({0, *(step for points in weights for step, _ in points)})
        table = [[_weight_at(points, step) for step in steps] for points in weights]
        sums = [sum(column) for column in zip(*table, strict=True)]
        shares = [[w / total for w, total in zip(row, sums, strict=True)] for row in table]
        sizes = [(b - a) * batch_size for a, b in zip(steps, steps[1:], strict=False)]
        due = [[Fraction(0)] for _ in shares]
        for row, sofar in zip(shares, due, strict=True):
            for size, a, b in zip(sizes, row, row[1:], strict=False):
                sofar.append(sofar[-1] + size * (a + b) / 2)
        slopes = [
            [*((b - a) / n for n, a, b in zip(sizes, row, row[1:], strict=False)), Fraction(0)]
            for row in shares
        ]
        self.batch_size = batch_size
        self.sizes = np.array([*sizes, np.inf], np.float64)  # rows in each of the S segments
        self.starts = np.array([step * batch_size for step in steps], np.float64)
        self.shares, self.due_at, self.slopes = (np.array(t, np.float64) for t in (shares, due, slopes))

    def due(self, time: float | int) -> Float[np.ndarray, " C"]:
        """Return T(time), the integral of each component's share over the first `time` global rows."""
        part = max(0, int(np.searchsorted(self.starts, time, side="right")) - 1)
        x = max(0.0, time - self.starts[part])
        return self.due_at[:, part] + x * (self.shares[:, part] + self.slopes[:, part] * (x / 2))

    def times(self, component: int, rows: Int[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """Return when a component's rows are due; infinity for those that never are."""
        wanted = rows + 0.5
        part = np.searchsorted(self.due_at[component], wanted, side="left") - 1
        rest = wanted - self.due_at[component][part]
        share, slope = self.shares[component][part], self.slopes[component][part]
        root = np.sqrt(np.maximum(0.0, share * share + 2 * slope * rest))
        with np.errstate(divide="ignore"):
            x = 2 * rest / (share + root)  # the root of share x + slope x^2 / 2 = rest, in its stable form
        return self.starts[part] + np.minimum(x, self.sizes[part])

    def rows(self, first: int, count: int) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
        """Return (component, its row) of the global rows [first, first + count)."""
        slack = len(self.shares) + 1  # more than the rows by which all counts together can be off
        begin, end = self._until(float(first - slack)), self._until(float(first + count + slack))
        component = np.repeat(np.arange(len(begin)), end - begin)
        row = np.concatenate([np.arange(a, b) for a, b in zip(begin, end, strict=True)])
        times = np.concatenate(
            [self.times(i, np.arange(a, b)) for i, (a, b) in enumerate(zip(begin, end, strict=True))]
        )
        skipped = first - int(begin.sum())
        order = np.lexsort((component, times))[skipped : skipped + count]
        assert skipped >= 0 and len(order) == count
        return component[order], row[order]

    def taken(self, count: int) -> Int[np.ndarray, " C"]:
        """Return how many of the first `count` global rows are each component's."""
        sure = self._until(float(count - len(self.shares) - 1))
        rest, _ = self.rows(int(sure.sum()), count - int(sure.sum()))
        return sure + np.bincount(rest, minlength=len(sure))

    def last_step(self, component: int, rows: int) -> int:
        """Return how many steps a component of so many rows lasts."""
        time = float(self.times(component, np.array([rows]))[0])
        step = int(min(time, 1e15)) // self.batch_size + 2
        while step > 0 and self.taken(step * self.batch_size)[component] > rows:
            step -= 1
        return step

    def _until(self, time: float) -> Int[np.ndarray, " C"]:
        """Return how many rows of each component have times up to this one."""
        if time < 0:
            return np.zeros(len(self.shares), np.int64)
        counts = np.floor(self.due(time) + 0.5).astype(np.int64)
        for i in range(len(counts)):  # what rounding has put on the other side of `time`
            while counts[i] > 0 and self.times(i, counts[i : i + 1] - 1)[0] > time:
                counts[i] -= 1
            while self.times(i, counts[i : i + 1])[0] <= time:
                counts[i] += 1
        return counts


def final_shares(parts: Mapping[str, Component]) -> dict[str, float]:
    """Return what the shares are from the last point of all schedules on: what held-out figures weigh by."""
    weights = {name: part.weight[-1][1] for name, part in parts.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
