"""The data report as one page: tables, plots as PNG inside of it, examples; nothing is fetched."""

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from data.curation.base import SPLITS
from data.curation.report import table

BEFORE, AFTER, GONE = "#b9c4d0", "#1f6f8b", "#c8553d"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733 }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } 
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #d5dce3; padding-top: 1rem }
pre, code { font: 13px/1.45 ui-monospace, monospace; background: #f4f6f8; white-space: pre-wrap }
pre { padding: .6rem .8rem; overflow-wrap: anywhere } pre.table { white-space: pre; overflow-x: auto }
img { max-width: 100% } .note { color: #5b6975 } details { margin: .6rem 0 }
"""


def page(report: dict[str, Any]) -> str:
    """Return the report as HTML. Everything that comes from a document or a config is escaped."""
    steps = report["steps"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Data report</title>",
        f"<style>{STYLE}</style></head><body><h1>Data report</h1>",
        f"<p class='note'>corpus {_escaped(report['digest'][:16])}, made of "
        f"{_escaped(report['source_digest'][:16])} by {len(steps)} steps; "
        "documents and bytes before and after each</p>",
        f"<pre class='table'>{_escaped(chr(10).join(table(report)))}</pre>",
        _picture(overview(report), "documents and bytes left after each step"),
        _histograms({"histograms": report["corpus"]["histograms"]}),
        f"<p>{_escaped(_sizes(report['corpus']['details']))}</p>",
        *(_step(number, step) for number, step in enumerate(steps)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return html.escape(str(text), quote=True)


def _sizes(details: dict[str, Any]) -> str:
    shards = ", ".join(f"{split} {len(counts)}" for split, counts in sorted(details["shards"].items()))
    return (
        f"Files: {details['source_file_bytes']:,} bytes before, {details['file_bytes']:,} after "
        f"({details['record_bytes']:,} bytes of records); shards: {shards}."
    )


def _step(number: int, step: dict[str, Any]) -> str:
    parameters = ", ".join(f"{key}={value}" for key, value in step["parameters"].items())
    parts = [f"<h2>{number}. {_escaped(step['step'])}</h2><p><code>{_escaped(parameters)}</code></p>"]
    counted = _sum_of_reasons(step) or step["counts"]
    if counted:
        parts.append(_picture(bars(step), "counts"))
    parts.append(_histograms(step))
    details = {key: value for key, value in step["details"].items() if key != "weights"}
    if details:
        lines = "\n".join(f"{key}: {value}" for key, value in details.items())
        parts.append(f"<pre>{_escaped(lines)}</pre>")
    if step["details"].get("weights"):
        lines = "\n".join(f"{weight:+9.3f}  {name}" for name, weight in step["details"]["weights"])
        parts.append(f"<details><summary>greatest weights</summary><pre>{_escaped(lines)}</pre></details>")
    if step["examples"]:
        parts.append(f"<details><summary>{len(step['examples'])} examples</summary>")
        parts += [_example(example) for example in step["examples"]]
        parts.append("</details>")
    return "\n".join(parts)


def _example(example: dict[str, Any]) -> str:
    note = f"; {example['note']}" if example["note"] else ""
    head = f"{example['split']}, document {example['number']}: {example['reason']}{note}"
    return f"<p class='note'>{_escaped(head)}</p><pre>{_escaped(example['text'])}</pre>"


def _sum_of_reasons(step: dict[str, Any]) -> dict[str, int]:
    names = {name for split in SPLITS for name in step["reasons"][split]}
    return {name: sum(step["reasons"][split].get(name, 0) for split in SPLITS) for name in sorted(names)}


def _histograms(entry: dict[str, Any]) -> str:
    return _picture(histograms(entry), "histograms before and after") if entry["histograms"] else ""


def _picture(png: bytes, title: str) -> str:
    return (
        f"<p><img alt='{_escaped(title)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></p>"
    )


def _drawn(width: float, height: float, draw: Callable[[Any], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)


def overview(report: dict[str, Any]) -> bytes:
    """Draw how many documents and bytes are left after each step, PNG."""
    names = ["source", *(f"{number} {step['step']}" for number, step in enumerate(report["steps"]))]

    def draw(figure: Any) -> None:
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("documents", "bytes"), strict=True):
            first = sum(report["corpus"][kind][split][0] for split in SPLITS)
            left = [first, *(sum(step[kind][split][1] for split in SPLITS) for step in report["steps"])]
            axes.barh(range(len(left)), left, color=[BEFORE, *[AFTER] * (len(left) - 1)], height=0.7)
            for place, value in enumerate(left):
                axes.text(value, place, f" {value / max(first, 1):.1%}", va="center", fontsize=8)
            axes.set_yticks(range(len(names)), [_literal(name) for name in names])
            axes.set_xlim(0, max(first, 1) * 1.18)
            axes.set_title(f"{kind} left", fontsize=10, loc="left")
            axes.xaxis.set_major_locator(_few())
            axes.xaxis.set_major_formatter(_short)
            _plain(axes)
        figure.axes[0].invert_yaxis()

    return _drawn(9.0, 1.0 + 0.34 * len(names), draw)


def bars(step: dict[str, Any]) -> bytes:
    """Draw why documents were dropped, or what was counted where none was, PNG."""
    reasons = _sum_of_reasons(step)
    counted = sorted((reasons or step["counts"]).items(), key=lambda pair: (-pair[1], pair[0]))[:15]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        values = [value for _, value in counted]
        axes.barh(range(len(counted)), values, color=GONE if reasons else AFTER, height=0.7)
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:,}", va="center", fontsize=8)
        axes.set_yticks(range(len(counted)), [_literal(name) for name, _ in counted])
        axes.set_xlim(0, max(values) * 1.15)
        axes.set_title("dropped, by reason" if reasons else "found", fontsize=10, loc="left")
        axes.xaxis.set_major_locator(_few())
        axes.xaxis.set_major_formatter(_short)
        axes.invert_yaxis()
        _plain(axes)

    return _drawn(9.0, 0.9 + 0.3 * len(counted), draw)


def histograms(entry: dict[str, Any]) -> bytes:
    """Draw every histogram of a step, before and after one over the other, PNG."""
    items = list(entry["histograms"].items())
    columns = min(3, len(items))
    rows = -(-len(items) // columns)

    def draw(figure: Any) -> None:
        grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for axes, (name, histogram) in zip(grid, items, strict=False):
            _histogram(axes, name, histogram)
        for axes in grid[len(items) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)

    return _drawn(3.0 * columns if columns > 1 else 6.0, 0.5 + 1.7 * rows, draw)


def _histogram(axes: Any, name: str, histogram: dict[str, Any]) -> None:
    edges = np.array(histogram["edges"])
    before, after = np.array(histogram["before"]), np.array(histogram["after"])
    used = np.flatnonzero(before + after)
    if len(used):
        low, high = max(0, used[0] - 1), min(len(before), used[-1] + 2)
        edges, before, after = edges[low : high + 1], before[low:high], after[low:high]
    widths = np.diff(edges)
    if len(widths) > 2 and widths[-1] > 3 * widths[1]:  # bins of a decade: as wide as each other on the page
        axes.set_xscale("symlog", linthresh=max(float(edges[edges > 0][0]), 1e-6))
    axes.stairs(before, edges, fill=True, color=BEFORE, label="before")
    axes.stairs(after, edges, fill=True, color=AFTER, alpha=0.75, label="after")
    for bound in histogram["bounds"]:
        if bound is not None and edges[0] <= bound <= edges[-1]:
            axes.axvline(bound, color=GONE, linestyle="--", linewidth=1)
    axes.set_title(_literal(name), fontsize=9, loc="left")
    axes.yaxis.set_major_locator(_few())
    axes.yaxis.set_major_formatter(_short)
    _plain(axes)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=True)


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar would begin a formula


def _short(value: float, position: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
