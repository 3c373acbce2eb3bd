"""The front of memory against time: what a faster step costs in bytes, as a picture and as a page."""

from pathlib import Path

from common.figure import new_figure, save
from common.files import write_text
from common.page import render
from common.text import GIB
from planner.search import Evaluated, Searched

WIDTH, HEIGHT, EDGE = 860, 520, 64  # of the page's picture, in pixels
# Kinds of points on the page, and their radii.
COMPUTED, COMPILED, BEST = ("computed", 2.5), ("compiled", 5), ("best", 9)
SHOWN = 4.0  # times a device's memory, and times the fastest step: what lies beyond is left out

BODY = """
<style>
circle.computed { fill: #9aa5b1 } circle.compiled { fill: #2b6cb0 }
circle.best { fill: none; stroke: #c05621; stroke-width: 3 } text { font-size: 12px; fill: #52606d }
td, th { text-align: left; vertical-align: top }
</style>
<p>Memory of a device (GiB, across) against seconds of a step as predicted (up). Grey: computed; blue:
compiled; ring: the fastest that fits; dashed: what a device can hold. A point says its overrides.</p>
<svg width="{{ width }}" height="{{ height }}" role="img">
{% set low = height - edge %}
<path d="M{{ edge }} {{ edge }}V{{ low }}H{{ width - edge }}" stroke="#52606d" fill="none"/>
<path d="M{{ limit }} {{ edge }}V{{ low }}" stroke="#c53030" stroke-dasharray="5 4"/>
{% for x, size, y, seconds in ticks %}
<text x="{{ x | int }}" y="{{ low + 18 }}" text-anchor="middle">{{ size }}</text>
<text x="{{ edge - 8 }}" y="{{ y | int }}" text-anchor="end">{{ seconds }}</text>
{% endfor %}
{% for kind, x, y, radius, said in marks %}
<circle class="{{ kind }}" cx="{{ x | round(1) }}" cy="{{ y | round(1) }}" r="{{ radius }}">
<title>{{ said }}</title></circle>
{% endfor %}
</svg>
{{ table(["step, s", "GiB", "overrides (compiled)"], rows) }}
"""


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
    write_text(page, _page(found))


def _picture(found: Searched, path: Path) -> None:
    figure = new_figure(9, 5.4, dpi=120)
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
    axes.set_title(_title(found))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    save(figure, path)


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

    def mark(e: Evaluated, kind: str, radius: float) -> tuple[str, float, float, float, str]:
        size = e.work.memory.total / GIB
        said = f"{e.seconds:.3f} s, {size:.1f} GiB: {_words(e)}"
        return kind, x(size), y(e.seconds), radius, said

    marks = [mark(e, *COMPUTED if e.work.how == "analytic" else COMPILED) for e in points]
    if found.best is not None:
        marks.append(mark(found.best, *BEST))
    ticks = [
        (x(size), f"{size:.0f}", y(seconds), f"{seconds:.3g}")
        for size, seconds in ((right * i / 5, bottom + (top - bottom) * i / 5) for i in range(6))
    ]
    rows = [(f"{e.seconds:.3f}", f"{e.work.memory.total / GIB:.1f}", _words(e)) for e in found.compiled]
    frame = {"width": WIDTH, "height": HEIGHT, "edge": EDGE, "limit": x(found.machine.memory_bytes / GIB)}
    return render(_title(found), BODY, marks=marks, ticks=ticks, rows=rows, **frame)


def _title(found: Searched) -> str:
    return f"{found.legal:,} legal plans of {found.machine.devices} x {found.machine.name}"


def _words(e: Evaluated) -> str:
    return " ".join(e.candidate.words) or "as asked"
