"""The data report as one page: a table, plots and examples."""

from typing import Any

import numpy as np

from common.figure import hide_frame, literal, new_figure
from common.page import render
from data.curation.base import SPLITS
from data.curation.report import table

BEFORE, AFTER, GONE = "#b9c4d0", "#1f6f8b", "#c8553d"
BODY = """
<p class="note">corpus {{ report.digest[:16] }}, made of {{ report.source_digest[:16] }} by
{{ report.steps | length }} steps; documents and bytes before and after each</p>
<pre class="table">{{ lines }}</pre>
{{ picture(overview(report), "documents and bytes left after each step") }}
{% macro distributions(entry) %}
{% if entry.histograms %}{{ picture(histograms(entry), "histograms before and after") }}{% endif %}
{% endmacro %}
{{ distributions(report.corpus) }}
{% set sizes = report.corpus.details %}
<p>Files: {{ "{:,} bytes before, {:,} after".format(sizes.source_file_bytes, sizes.file_bytes) }}
({{ "{:,}".format(sizes.record_bytes) }} bytes of records); shards:
{% for split, shards in sizes.shards | dictsort %}
{{ split }} {{ shards | length }}{{ "." if loop.last else "," }}
{% endfor %}</p>
{% for step in report.steps %}
<h2>{{ loop.index0 }}. {{ step.step }}</h2>
<p><code>
{%- for key, value in step.parameters.items() %}
{{ key }}={{ value }}{{ "" if loop.last else ", " }}
{%- endfor -%}
</code></p>
{% if reasons(step) or step.counts %}{{ picture(bars(step), "counts") }}{% endif %}
{{ distributions(step) }}
{% set details = step.details.items() | rejectattr(0, "equalto", "weights") | list %}
{% if details %}
<pre>{% for key, value in details %}{{ key }}: {{ value }}{{ "" if loop.last else "\n" }}{% endfor %}</pre>
{% endif %}
{% if step.details.get("weights") %}
<details><summary>greatest weights</summary><pre>
{%- for name, weight in step.details.weights %}{{ "%+9.3f  %s\n" | format(weight, name) }}{% endfor -%}
</pre></details>
{% endif %}
{% if step.examples %}
<details><summary>{{ step.examples | length }} examples</summary>
{% for one in step.examples %}
<p class="note">
{{ one.split }}, document {{ one.number }}: {{ one.reason }}{{ "; " ~ one.note if one.note }}
</p>
<pre>{{ one.text }}</pre>
{% endfor %}
</details>
{% endif %}
{% endfor %}
"""


def page(report: dict[str, Any]) -> str:
    """Return the report as HTML. Everything that comes from a document or a config is escaped."""
    shown = {"overview": overview, "bars": bars, "histograms": histograms, "reasons": _sum_of_reasons}
    return render("Data report", BODY, report=report, lines="\n".join(table(report)), **shown)


def _sum_of_reasons(step: dict[str, Any]) -> dict[str, int]:
    names = {name for split in SPLITS for name in step["reasons"][split]}
    return {name: sum(step["reasons"][split].get(name, 0) for split in SPLITS) for name in sorted(names)}


def _plain(axes: Any) -> None:
    hide_frame(axes)
    axes.tick_params(labelsize=8)


def overview(report: dict[str, Any]) -> Any:
    """Draw how many documents and bytes are left after each step."""
    names = ["source", *(f"{number} {step['step']}" for number, step in enumerate(report["steps"]))]

    figure = new_figure(9.0, 1.0 + 0.34 * len(names))
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("documents", "bytes"), strict=True):
        first = sum(report["corpus"][kind][split][0] for split in SPLITS)
        left = [first, *(sum(step[kind][split][1] for split in SPLITS) for step in report["steps"])]
        axes.barh(range(len(left)), left, color=[BEFORE, *[AFTER] * (len(left) - 1)], height=0.7)
        for place, value in enumerate(left):
            axes.text(value, place, f" {value / max(first, 1):.1%}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [literal(name) for name in names])
        axes.set_xlim(0, max(first, 1) * 1.18)
        axes.set_title(f"{kind} left", fontsize=10, loc="left")
        axes.xaxis.set_major_locator(_few())
        axes.xaxis.set_major_formatter(_short)
        _plain(axes)
    figure.axes[0].invert_yaxis()
    return figure


def bars(step: dict[str, Any]) -> Any:
    """Draw why documents were dropped, or what was counted where none was."""
    reasons = _sum_of_reasons(step)
    counted = sorted((reasons or step["counts"]).items(), key=lambda pair: (-pair[1], pair[0]))[:15]

    figure = new_figure(9.0, 0.9 + 0.3 * len(counted))
    axes = figure.subplots()
    values = [value for _, value in counted]
    axes.barh(range(len(counted)), values, color=GONE if reasons else AFTER, height=0.7)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:,}", va="center", fontsize=8)
    axes.set_yticks(range(len(counted)), [literal(name) for name, _ in counted])
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_title("dropped, by reason" if reasons else "found", fontsize=10, loc="left")
    axes.xaxis.set_major_locator(_few())
    axes.xaxis.set_major_formatter(_short)
    axes.invert_yaxis()
    _plain(axes)
    return figure


def histograms(entry: dict[str, Any]) -> Any:
    """Draw every histogram of a step, before and after one over the other."""
    items = list(entry["histograms"].items())
    columns = min(3, len(items))
    rows = -(-len(items) // columns)

    figure = new_figure(3.0 * columns if columns > 1 else 6.0, 0.5 + 1.7 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes, (name, histogram) in zip(grid, items, strict=False):
        _histogram(axes, name, histogram)
    for axes in grid[len(items) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure


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
    axes.set_title(literal(name), fontsize=9, loc="left")
    axes.yaxis.set_major_locator(_few())
    axes.yaxis.set_major_formatter(_short)
    _plain(axes)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=True)


def _short(value: float, position: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
