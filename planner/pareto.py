"""The front of memory against time: what a faster step costs in bytes, as a picture and as a page."""

import html
from collections.abc import Callable
from pathlib import Path

from common.text import GIB
from planner.search import Evaluated, Searched

Scale = Callable[[float], float]  # to pixels
WIDTH, HEIGHT, EDGE = 860, 520, 64  # of the page's picture, in pixels
SHOWN = 4.0  # times a device's memory, and times the fastest step: what lies beyond is left out


def front(points: list[Evaluated]) -> list[Evaluated]:
    """Those that no other beats in both memory and time, by memory."""
    best: list[Evaluated] = []
    for point in sorted(points, key=lambda e: (e.work.memory.total, e.seconds)):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return best


def shown(found: Searched) -> list[Evaluated]:
    """Computed points near enough to be looked at."""
    everything = [*found.computed, *found.compiled]
    fastest = min((e.seconds for e in everything), default=0.0)
    limit = SHOWN * found.machine.memory_bytes
    return [e for e in found.computed if e.work.memory.total <= limit and e.seconds <= SHOWN * fastest]


def draw(found: Searched, png: Path, page: Path) -> None:
    """Write both files."""
    _picture(found, png)
    page.write_text(_page(found), encoding="utf-8")


def _picture(found: Searched, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    computed = shown(found)
    axes.scatter(*_xy(computed), s=10, color="#9aa5b1", label="computed", linewidths=0)
    line = front(computed)
    axes.step(*_xy(line), where="post", color="#52606d", linewidth=1, label="front, computed")
    axes.scatter(*_xy(found.compiled), s=36, color="#2b6cb0", label="compiled", zorder=3)
    if found.best is not None:
        axes.scatter(
            *_xy([found.best]), s=170, marker="*", color="#c05621", label="fastest that fits", zorder=4
        )
    axes.axvline(found.machine.memory_bytes / GIB, color="#c53030", linewidth=1, linestyle="--")
    axes.text(found.machine.memory_bytes / GIB, axes.get_ylim()[1], " a device", color="#c53030", va="top")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=8)
    axes.set_xlabel("memory of a device, GiB")
    axes.set_ylabel("step, seconds predicted")
    axes.set_title(f"{found.legal:,} legal plans of {found.machine.devices} x {found.machine.name}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path)


def _xy(points: list[Evaluated]) -> tuple[list[float], list[float]]:
    return [e.work.memory.total / GIB for e in points], [e.seconds for e in points]


def _page(found: Searched) -> str:
    """One file: an SVG whose points say their overrides, and a table of what was compiled."""
    computed = shown(found)
    points = [*computed, *found.compiled]
    sizes, times = _xy(points)
    right = max([*sizes, found.machine.memory_bytes / GIB], default=1.0) * 1.05
    top, bottom = max(times, default=1.0) * 1.03, min(times, default=0.0) * 0.97

    def x(size: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * size / right

    def y(seconds: float) -> float:
        return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (seconds - bottom) / max(top - bottom, 1e-12)

    marks = [_mark(e, x, y, "computed" if e.work.how == "analytic" else "compiled") for e in points]
    if found.best is not None:
        marks.append(_mark(found.best, x, y, "best"))
    edge = x(found.machine.memory_bytes / GIB)
    low, left = HEIGHT - EDGE, EDGE - 8
    ticks = "".join(
        f'<text x="{x(size):.0f}" y="{low + 18}" text-anchor="middle">{size:.0f}</text>'
        f'<text x="{left}" y="{y(seconds):.0f}" text-anchor="end">{seconds:.3g}</text>'
        for size, seconds in ((right * i / 5, bottom + (top - bottom) * i / 5) for i in range(6))
    )
    rows = "".join(
        f"<tr><td>{e.seconds:.3f}</td><td>{e.work.memory.total / GIB:.1f}</td><td>{_words(e)}</td></tr>"
        for e in found.compiled
    )
    title = f"{found.legal:,} legal plans of {found.machine.devices} x {found.machine.name}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:70em}}circle.computed{{fill:#9aa5b1}}
circle.compiled{{fill:#2b6cb0}}circle.best{{fill:none;stroke:#c05621;stroke-width:3}}text{{font-size:12px;fill:#52606d}}
td{{padding:.1em 1em .1em 0;vertical-align:top}}</style>
<h1>{title}</h1>
<p>Memory of a device (GiB, across) against seconds of a step as predicted (up). Grey: computed; blue:
compiled; ring: the fastest that fits; dashed: what a device can hold. A point says its overrides.</p>
<svg width="{WIDTH}" height="{HEIGHT}" role="img">
<line x1="{EDGE}" y1="{low}" x2="{WIDTH - EDGE}" y2="{low}" stroke="#52606d"/>
<line x1="{EDGE}" y1="{EDGE}" x2="{EDGE}" y2="{low}" stroke="#52606d"/>
<line x1="{edge:.1f}" y1="{EDGE}" x2="{edge:.1f}" y2="{low}" stroke="#c53030" stroke-dasharray="5 4"/>
{ticks}
{"".join(marks)}
</svg>
<table><tr><td>step, s</td><td>GiB</td><td>overrides (compiled)</td></tr>{rows}</table>
</html>
"""


def _mark(e: Evaluated, x: Scale, y: Scale, kind: str) -> str:
    size = e.work.memory.total / GIB
    radius = {"computed": 2.5, "compiled": 5, "best": 9}[kind]
    return (
        f'<circle class="{kind}" cx="{x(size):.1f}" cy="{y(e.seconds):.1f}" r="{radius}">'
        f"<title>{e.seconds:.3f} s, {size:.1f} GiB: {_words(e)}</title></circle>"
    )


def _words(e: Evaluated) -> str:
    return html.escape(" ".join(e.candidate.words) or "as asked")
