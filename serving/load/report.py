"""The report of a load test: report.json, two pictures, and a page in Markdown that says how to read them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.figure import hide_frame, new_figure, save
from common.files import replacing
from common.text import counted
from serving.load.client import SentRequest
from serving.load.config import LoadConfig
from serving.load.drive import Recording
from serving.load.measure import Figures, summary

INK, QUIET, GRID, ALARM, GOOD = "#1f4e8c", "#6b7280", "#e5e7eb", "#d1495b", "#2f855a"
SHADES = {"p50": "#9db8d9", "p95": "#4a7ab8", "p99": "#123a6d"}
LATENCIES = {
    "first": ("to the first token", "first"),
    "gap": ("between tokens", "token"),
    "whole": ("to the end", "whole"),
}


def write_report(directory: Path, config: LoadConfig, recording: Recording, title: str) -> Figures:
    """Write all of it; the figures that stand in report.json. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    figures = summary(recording, config)
    whole = {
        "figures": figures,
        "config": asdict(config),
        "requests": [_row(a, "load") for a in recording.load] + [_row(a, "probe") for a in recording.probes],
        "idle": [_row(a, "idle") for a in recording.idle],
        "samples": recording.samples,
    }
    save(by_rate(figures, title), directory / "rate.png")
    save(over_time(figures, recording, title), directory / "time.png")
    for name, text in (("report.json", json.dumps(whole)), ("report.md", page(figures, title))):
        with replacing(directory / name) as aside:
            aside.write_text(text + "\n", "utf-8")
    return figures


def _row(attempt: SentRequest, kind: str) -> dict[str, Any]:
    return {"kind": kind, **{key: value for key, value in vars(attempt).items() if key != "gaps"}}


# -- pictures ------------------------------------------------------------------------------------------------


def by_rate(figures: Figures, title: str) -> Any:
    """Latency by quantile and goodput, over the rate that was offered."""
    stages = sorted(figures["stages"], key=lambda stage: stage["offered"])
    figure = new_figure(11, 7.4, dpi=130)
    figure.suptitle(title, parse_math=False, fontsize=13, fontweight="bold")
    axes = figure.subplots(2, 2, sharex=True)
    for place, (name, (label, limit)) in zip(axes.flat[:3], LATENCIES.items(), strict=True):
        _quantiles(place, stages, name, figures["slo"][limit])
        _style(place, f"seconds {label}", "requests/s offered" if place is axes[1, 0] else "")
    _goodput(axes[1, 1], stages, figures["saturation"])
    return figure


def _quantiles(axes: Any, stages: Sequence[Figures], name: str, limit: float) -> None:
    most = 0.0
    for quantile, color in SHADES.items():
        points = [(s["offered"], s[name][quantile]) for s in stages if s[name]]
        axes.plot(*np.array(points).reshape(-1, 2).T, color=color, marker="o", markersize=4, label=quantile)
        most = max([most, *(value for _, value in points)])
    if name == "first" and (beside := [(s["offered"], s["probe"]["p95"]) for s in stages if s["probe"]]):
        x, y = np.array(beside).T
        axes.plot(x, y, color=ALARM, marker="s", markersize=3.5, linewidth=1.1, label="probes, p95")
    # The gaps' own limit is of a whole answer's mean; one that is far off would flatten all lines.
    if name != "gap" and limit < 3 * most:
        _limit(axes, limit, "limit of a good answer")
    _logarithmic(axes)
    axes.legend(frameon=False, fontsize=8)


def _logarithmic(axes: Any) -> None:
    """A scale of seconds with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _limit(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color=QUIET, linewidth=1.0, linestyle=(0, (5, 3)), label=label)


def _goodput(axes: Any, stages: Sequence[Figures], saturation: float) -> None:
    offered = [s["offered"] for s in stages]
    answered = [s["throughput"] for s in stages]
    axes.plot(offered, offered, color=QUIET, linewidth=1.0, linestyle=(0, (2, 2)), label="offered")
    axes.axhline(saturation, color=QUIET, linewidth=1.0, linestyle=(0, (5, 3)), label="saturation")
    axes.plot(offered, answered, color=SHADES["p50"], linewidth=4, label="answered")
    goodput = [s["goodput"] for s in stages]
    axes.plot(offered, goodput, color=GOOD, marker="o", markersize=4, label="answered well (goodput)")
    axes.set_ylim(0, 1.35 * max([saturation, *answered]))
    axes.set_xlim(0, 1.05 * max(offered) or 1)
    _style(axes, "requests/s", "requests/s offered")
    axes.legend(frameon=False, fontsize=8)


def over_time(figures: Figures, recording: Recording, title: str) -> Any:
    """Rates, waits, queue and pages, second by second."""
    figure = new_figure(11, 8.6, dpi=130)
    figure.suptitle(title, parse_math=False, fontsize=13, fontweight="bold")
    rates, waits, queue, pages = figure.subplots(4, 1, sharex=True, height_ratios=[3, 4, 3, 2])
    _rates(rates, recording)
    _waits(waits, figures, recording)
    times = [s["time"] for s in recording.samples]
    for name, color in (("waiting", ALARM), ("running", INK)):
        queue.plot(times, [s.get(name, np.nan) for s in recording.samples], color=color, label=name)
    queue.set_ylim(bottom=0)
    queue.yaxis.get_major_locator().set_params(integer=True)
    _style(queue, "requests in\nthe server")
    queue.legend(frameon=False, fontsize=8, loc="upper left")
    share = [100 * s.get("pages", np.nan) for s in recording.samples]
    pages.fill_between(times, share, color=SHADES["p50"], linewidth=0)
    pages.set_ylim(0, 100)
    _style(pages, "pages in\nuse, %", "seconds since the load began")
    for axes in (rates, waits, queue, pages):
        for stage in figures["stages"][1:]:
            axes.axvline(stage["begin"], color=GRID, linewidth=1.2, zorder=0)
    rates.set_xlim(0, max([figures["seconds"], *times]))
    return figure


def _rates(axes: Any, recording: Recording) -> None:
    """By the second: what was due, what was answered and what was refused."""
    edges = np.arange(0, np.ceil(max([recording.plan.seconds, *(a.end for a in recording.load)])) + 1)
    series = {
        "due": ([a.due for a in recording.load], QUIET),
        "answered": ([a.end for a in recording.load if a.done], INK),
        "refused": ([a.end for a in recording.load if a.refused], ALARM),
    }
    for label, (times, color) in series.items():
        style = {"fill": True, "alpha": 0.35} if label == "due" else {"linewidth": 1.3}
        if times:
            axes.stairs(np.histogram(times, edges)[0], edges, color=color, label=label, **style)
    _style(axes, "requests/s")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)


def _waits(axes: Any, figures: Figures, recording: Recording) -> None:
    """Each request's time to its first token, at the time when it was due."""
    for attempts, label, color, size in (
        (recording.load, "load", INK, 7),
        (recording.probes, "probes", ALARM, 14),
    ):
        points = [(a.due, a.first - a.due) for a in attempts if a.done and a.first is not None]
        if points:
            x, y = np.array(points).T
            axes.scatter(x, y, s=size, color=color, alpha=0.55, linewidths=0, label=label)
    if idle := figures["probe"]["idle"]:
        _limit(axes, idle["p95"], "probes of the idle server, p95")
    _logarithmic(axes)
    axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the legend
    _style(axes, "seconds to the\nfirst token")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)


def _style(axes: Any, y: str, x: str = "") -> None:
    axes.set_ylabel(y, fontsize=10)
    axes.set_xlabel(x, fontsize=10)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors="#374151")
    hide_frame(axes)


# -- the page ------------------------------------------------------------------------------------------------

PAGE = """\
# {title}

{server}, model `{model}`: {requests} in {seconds:.0f} s, seed {seed}. Saturation is {saturation:.2f}
requests/s: what the server answers while it is never without a request. `load` is a multiple of it.

{verdicts}

![Latency and goodput over the offered rate](rate.png)

{table}

Times are in milliseconds, and count from when a request was **due**: one that could not be sent or had to
wait is as late as its user feels it. *first* is the time to the first token, *gap* the time between two parts
of an answer. *good* is the share of requests with a whole answer whose first token came within {slo[first]:g}
s, whose tokens came {slo[token]:g} s apart on average or faster, and which was over within {slo[whole]:g} s.
*goodput* counts such answers by the second in which they ended.

![Rates, waits, queue and pages over time](time.png)

A good server under too much load: *answered* stays flat where *due* rises above it, *refused* takes the rest
within milliseconds, waits stay bounded, probes stay near the dashed line, and *waiting* falls to nothing
behind the peak.
"""


def page(figures: Figures, title: str) -> str:
    """The report as Markdown, with its pictures beside it."""
    head = ("load", "asked/s", "tokens/s", "first p50", "p95", "p99", "gap p50", "p95", "p99")
    rows: list[tuple[str, ...]] = [(*head, "whole p95", "refused", "good", "goodput/s")]
    for stage in figures["stages"]:
        first, gap, whole = ([_ms(stage[name].get(q)) for q in SHADES] for name in ("first", "gap", "whole"))
        counts = (f"{stage['load']:.2f}", f"{stage['offered']:.2f}", f"{stage['tokens_per_second']:.0f}")
        last = (str(stage["refused"]), _percent(stage["good_share"]), f"{stage['goodput']:.2f}")
        rows.append((*counts, *first, *gap, whole[1], *last))
    return PAGE.format(
        title=title,
        verdicts="\n".join(f"* {line}" for line in verdicts(figures)),
        table=_table(rows),
        **figures | {"requests": counted(figures["requests"], "request")},
    ).rstrip()


def verdicts(figures: Figures) -> list[str]:
    """What the figures come to, a line each."""
    probe, refused, failed = figures["probe"], figures["refusals"], figures["failures"]
    lines = []
    if probe["load"]:
        lines.append(
            f"Probes of one token: p95 {_ms(probe['load']['p95'])} ms beside the load, "
            f"{_ms(probe['idle']['p95'])} ms idle: {probe['ratio']:.2f} times"
        )
    share = _percent(figures["goodput"]["share"])
    lines.append(
        f"Goodput: {figures['goodput']['peak']:.2f} requests/s at most; under most load {share} of that"
    )
    if refused["count"]:
        lines.append(
            f"Refused: {refused['count']}, told within {_ms(refused['seconds']['p95'])} ms (p95), "
            f"{refused['silent']} of them without Retry-After"
        )
    why = "; ".join(f"{count} × {reason}" for reason, count in failed["why"].items())
    lines.append(f"Failed: {failed['count']}" + (f" ({why})" if why else ""))
    if figures["late"].get("p99", 0) > 0.05:
        lines.append(
            f"**This client was late**: p99 {_ms(figures['late']['p99'])} ms behind its plan, which is part "
            "of all times here; run it on a machine of its own"
        )
    return lines


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --: |" * len(rows[0]), *lines[1:]])
