"""`plots/loss.png` from `metrics.jsonl`: losses and learning rate, without matplotlib's global state."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from artifacts.metrics import MetricsLog
from common.figure import hide_frame, new_figure, save
from common.text import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RAW, _SMOOTH, _EVAL, _QUIET = "#9db8d9", "#1f4e8c", "#d1495b", "#6b7280"
_MOST_POINTS = 4000  # more than the picture has columns


def plot_loss(
    metrics: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    title: str,
    bigram_bits_per_byte: float | None = None,
) -> Path | None:
    """Draw a `metrics.jsonl` into a PNG, replaced whole; None, and no picture, where no loss is finite.

    Where evaluations and a bigram baseline are known, the baseline is drawn in the curve's own unit.
    Raises OSError.
    """
    from matplotlib.ticker import MaxNLocator

    rows = MetricsLog.read(metrics)
    steps, losses = _series(rows, "loss")
    if not len(steps):
        return None
    figure = new_figure(9, 5.6, dpi=140)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    figure.suptitle(title, parse_math=False, fontsize=13, fontweight="bold")
    _draw_training(top, steps, losses, sum("loss" in row for row in rows))
    _draw_evaluation(top, rows, bigram_bits_per_byte)
    _finish(top, "loss (nats per token)")
    top.legend(frameon=False, fontsize=9)
    bottom.plot(*_thin(*_series(rows, "learning_rate")), color=_QUIET, linewidth=1.4)
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    _finish(bottom, "learning\nrate")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    bottom.set_xlabel(_step_label(rows), fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
    return path


def _draw_training(axes: "Axes", steps: np.ndarray, losses: np.ndarray, total: int) -> None:
    axes.plot(*_thin(steps, losses), color=_RAW, linewidth=0.8, alpha=0.7, label="training, each step")
    smooth = smoothed(losses)
    label = f"training, smoothed: {smooth[-1]:.3f}"
    if total > len(steps):
        label += f" ({total - len(steps)} not finite)"
    dot = "o" if len(steps) == 1 else None  # one point makes no line
    axes.plot(*_thin(steps, smooth), color=_SMOOTH, linewidth=1.8, marker=dot, label=label)
    axes.margins(x=0.015)
    # One diverged step must not flatten the rest of the picture.
    low, high = losses.min(), max(np.quantile(losses, 0.995), losses[0] if losses[0] < 30 else 0)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _draw_evaluation(axes: "Axes", rows: Sequence[Mapping[str, Any]], bigram: float | None) -> None:
    steps, losses = _series(rows, "eval/loss")
    if not len(steps):
        return
    bits = _series(rows, "eval/bits_per_byte")[1]
    label = f"held-out: {losses[-1]:.3f}" + (f" ({bits[-1]:.3f} bits per byte)" if len(bits) else "")
    style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.2, "zorder": 5}
    axes.plot(steps, losses, color=_EVAL, label=label, **style)
    low, high = axes.get_ylim()
    low = min(low, losses.min() - 0.05 * (high - low))
    if steps[0] == 0 and losses[0] < 30:  # what a run began with
        high = max(high, losses[0] + 0.05 * (high - low))
    if bigram is not None and len(bits):
        # Of the same held-out text: an evaluation's ratio turns bits per byte into nats per token.
        level = bigram * losses[-1] / bits[-1]
        line_label = f"bigram model: {level:.3f} ({bigram:.3f} bits per byte)"
        axes.axhline(level, color=_QUIET, linewidth=1.1, linestyle=(0, (5, 3)), label=line_label)
    axes.set_ylim(low, high)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a thirtieth of the run around each step: unlike an exponential average, without lag."""
    n = len(values)
    total = np.concatenate([[0.0], np.cumsum(values)])
    i, half = np.arange(n), n // 60
    # Narrow towards the steep start, one-sided at the flat end: the last figure is a mean, not one step.
    first, last = np.maximum(i - half, 0), np.minimum(i + np.minimum(i, half), n - 1) + 1
    return (total[last] - total[first]) / (last - first)


def _series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stride = -(-len(steps) // _MOST_POINTS) or 1
    return steps[::stride], values[::stride]


def _step_label(rows: Sequence[Mapping[str, Any]]) -> str:
    tokens = _series(rows, "tokens")[1]
    return f"step ({human(tokens[-1])} tokens in all)" if len(tokens) else "step"


def _finish(axes: "Axes", label: str) -> None:
    axes.set_ylabel(label, fontsize=10)
    axes.grid(True, color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors="#374151")
    hide_frame(axes)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9ca3af")
