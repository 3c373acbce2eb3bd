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

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Int

from data.config import Component, Points, weight_at


class Interleaving:
    """Which row of which component each global row is.

    Tables are computed in fractions and rounded once, and what follows are single operations on float64, so
    that every host has the same numbers. Exact as long as rows number less than about 10^13.
    """

    def __init__(self, weights: Sequence[Points], batch_size: int):
        steps = sorted({0, *(step for points in weights for step, _ in points)})
        table = [[weight_at(points, step) for step in steps] for points in weights]
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
