"""The page of a drift report: one HTML file, its plots inside it."""

from typing import Any

import numpy as np

from common.figure import literal, new_figure
from common.page import render

OLD, NEW, CHANCE = "#4477aa", "#cc6677", "#bbbbbb"
BODY = """
<style>.verdict { padding: .6rem 1rem; border-left: .4rem solid {{ colour }} }</style>
<div class="verdict">
{% if report.drifted %}
Drift in:<ul>{% for line in report.drifted %}<li>{{ line }}</li>{% endfor %}</ul>
{% else %}
{{ report.verdict }}
{% endif %}
</div>
{{ table(["corpus", "documents", "tokens", "store"], corpora) }}
<h2>Figures</h2>
{{ table(["", "value", "floor", "whole samples"], figures) }}
<p>The floor is what 95 % of pairs of samples of the old corpus stay below, as many documents in each as of
the new one: a value at or below it is what no drift looks like.</p>
{% for title, plot in plots.items() %}
<h2>{{ title }}</h2>
{{ picture(plot, title) }}
{% endfor %}
"""


def page(report: dict[str, Any]) -> str:
    """The HTML of what `scripts.drift_report.report` returns."""
    draw = {"Tokens": _plot_tokens, "Documents": _plot_features}
    if "loss" in report:
        draw["Loss of the model"] = _plot_loss
    plots = {}
    for title in draw:
        plots[title] = new_figure(11, 4.6)
        draw[title](plots[title], report)
    shown = {"corpora": _corpora(report), "figures": _figures(report), "plots": plots}
    return render("Drift", BODY, report=report, colour=NEW if report["drifted"] else OLD, **shown)


def _corpora(report: dict[str, Any]) -> list[list[str]]:
    return [
        [key, f"{one['documents']:,}", f"{one['tokens']:,}", one["path"]]
        for key, one in report["corpora"].items()
    ]


def _figures(report: dict[str, Any]) -> list[list[str]]:
    tokens = report["tokens"]
    named = [("tokens, JS (bits)", tokens["js_bits"]), ("tokens, KL new from old (bits)", tokens["kl_bits"])]
    for name, found in report["features"].items():
        named += [(f"{name}, KS", found["ks"]), (f"{name}, PSI", found["psi"])]
    rows = [[name, f"{f['value']:.4f}", f"{f['floor']:.4f}", f"{f['whole']:.4f}"] for name, f in named]
    coverage = report["coverage"]
    more = [
        ["bytes a token, old and new", f"{coverage['old_bytes_per_token']:.3f}", ""],
        ["", f"{coverage['new_bytes_per_token']:.3f}", ""],
        ["new tokens that old lacks", f"{coverage['new_token_share']:.3%}", ""],
    ]
    return [*rows, *([*row, ""] for row in more)]


def _plot_tokens(figure: Any, report: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _floors(left, [("Jensen-Shannon, bits", report["tokens"]["js_bits"])])
    movers = [*report["tokens"]["fallen"][:10], *report["tokens"]["risen"][:10][::-1]]
    colours = [OLD if mover["z"] < 0 else NEW for mover in movers]
    right.barh(range(len(movers)), [mover["z"] for mover in movers], color=colours)
    right.set_yticks(range(len(movers)), [_spelled(mover["text"]) for mover in movers], family="monospace")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("z of the log-odds: fallen (left), risen (right)")
    right.set_title("tokens that moved most")


def _spelled(text: str) -> str:
    """Printable, spaces visible between quotes, and no mathematics to matplotlib."""
    return literal(repr(text[:20]).encode("ascii", "backslashreplace").decode())


def _floors(axis: Any, named: list[tuple[str, dict[str, Any]]]) -> None:
    """Values of old against new over those of old against old."""
    for row, (_, found) in enumerate(named):
        jitter = np.linspace(-0.18, 0.18, len(found["floors"]))
        axis.plot(found["floors"], row + jitter, "o", color=CHANCE, markersize=5)
        axis.plot(found["values"], row + jitter, "o", color=NEW, markersize=5)
        axis.plot([found["floor"]] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1)
    axis.set_yticks(range(len(named)), [name for name, _ in named])
    axis.set_ylim(-0.6, len(named) - 0.4)
    axis.set_xlim(left=0)
    axis.set_title("old against new (red), old against old (grey), floor (line)", fontsize=9)


def _plot_features(figure: Any, report: dict[str, Any]) -> None:
    features = report["features"]
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    for axis, (name, found) in zip(top.subplots(1, len(features)), features.items(), strict=True):
        both = np.concatenate([found["old"], found["new"]])
        low, high = np.quantile(both, (0.005, 0.995))
        bins = np.linspace(low, high if high > low else low + 1, 31)
        for key, colour in (("old", OLD), ("new", NEW)):
            axis.hist(found[key], bins, density=True, histtype="step", color=colour, linewidth=1.4, label=key)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    top.axes[0].legend(fontsize=8, frameon=False)
    left, right = bottom.subplots(1, 2)
    for axis, measure in ((left, "ks"), (right, "psi")):
        _floors(axis, [(name, found[measure]) for name, found in features.items()])
        axis.set_xlabel(
            {"ks": "Kolmogorov-Smirnov", "psi": "population stability index"}[measure], fontsize=8
        )
        axis.tick_params(labelsize=8)


def _plot_loss(figure: Any, report: dict[str, Any]) -> None:
    axis, loss = figure.subplots(), report["loss"]
    both = [*loss["old_rows"], *loss["new_rows"]]
    bins = np.linspace(min(both), max(both) + 1e-6, 41)
    for key, colour in (("old", OLD), ("new", NEW)):
        axis.hist(loss[f"{key}_rows"], bins, density=True, histtype="step", color=colour, linewidth=1.5)
        axis.axvline(loss[key], color=colour, linestyle="--", label=f"{key}: {loss[key]:.3f}")
    low, high = loss["interval"]
    axis.set_title(f"difference {loss['difference']:+.3f} nats a token (95 %: {low:+.3f} to {high:+.3f})")
    axis.set_xlabel("loss of a document's beginning, nats a token")
    axis.set_yticks([])
    axis.legend(frameon=False)
