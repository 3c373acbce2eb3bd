"""Look at a pipeline schedule before running it: its timeline, bubble and peak of kept activations.

    python scripts/schedule.py 1f1b stages=4 microbatches=8 png=schedule.png

    stages=4           mesh.pipeline
    microbatches=8     pipeline.microbatches
    virtual_stages=N   pipeline.virtual_stages: 2 under interleaved_1f1b, else 1
    png=FILE           draw the timeline into it

Reads the very table that the program executes (`parallel/schedules/tables.py`); needs no device.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

from scripts.command import parse, run

if TYPE_CHECKING:
    from parallel.schedules.tables import Schedule

SHADES = {"F": ("#4c78a8", "#9ecae9"), "B": ("#f58518", "#ffbf79"), "W": ("#54a24b", "#b3d9ac")}


@dataclass(frozen=True)
class ScheduleOptions:
    """The command line; see the module's docstring."""

    schedule: str
    stages: int = 4
    microbatches: int = 8
    virtual_stages: int | None = None
    png: Path | None = None


def show(argv: Sequence[str]) -> int:
    """Print, and draw where a file is named. Raises ValueError for a schedule that there cannot be."""
    from common.checks import choice
    from parallel.config import PIPELINE_SCHEDULES
    from parallel.schedules.tables import make_schedule

    asked = parse(argv, ScheduleOptions, ("schedule",))
    choice("SCHEDULE", asked.schedule, PIPELINE_SCHEDULES)
    virtual = asked.virtual_stages or (2 if asked.schedule == "interleaved_1f1b" else 1)
    schedule = make_schedule(
        asked.schedule, stages=asked.stages, microbatches=asked.microbatches, virtual_stages=virtual
    )
    print(report(schedule, shutil.get_terminal_size((110, 24)).columns))
    if asked.png:
        draw(schedule, asked.png)
        print(f"drawn: {asked.png}")
    return 0


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(show, argv, __doc__)


def report(schedule: "Schedule", columns: int) -> str:
    """The timeline in blocks as wide as the terminal, and the figures that people compare."""
    from parallel.schedules.tables import timeline

    lines = [f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches"]
    if schedule.chunks > 1:
        lines[0] += f", {schedule.chunks} chunks of layers a stage (a, b, ...)"
    lines += ["", timeline(schedule, columns)]
    P, v, M = schedule.stages, schedule.chunks, schedule.microbatches
    ideal = (P - 1) / (v * M + P - 1)
    lines += [
        "",
        f"ticks          {len(schedule.work)}, costing {schedule.cost} forward passes of a chunk "
        f"(forward 1, recompute 1, backward 2); {4 * v * M} of them useful",
        f"bubble         {schedule.bubble:.1%} of the time; (P-1)/(vM+P-1) is {ideal:.1%}",
        f"kept inputs    at most {schedule.peak_inputs} a stage, each one microbatch of the residual stream",
    ]
    if schedule.split:
        lines.append(f"kept pairs     at most {schedule.weight_slots[2]} a stage, for gradients by weights")
    return "\n".join(lines)


def draw(schedule: "Schedule", path: Path) -> None:
    """The timeline as a PNG, every tick as wide as it costs. Raises OSError."""
    from common.figure import new_figure, save

    P, ticks = schedule.stages, len(schedule.work)
    figure = new_figure(min(40, 3 + 0.14 * schedule.cost), 1.7 + 0.5 * P, dpi=120)
    axes = figure.subplots()
    start = 0
    for t in range(ticks):
        for s in range(P):
            draw_cell(axes, schedule, t, s, start)
        start += schedule.work[t].cost(schedule.split)
    kinds = {"F": "forward", "B": "recompute and backward", "W": "gradients by weights"}
    if schedule.split:
        kinds["B"] = "recompute and gradients by inputs"
    for kind in kinds if schedule.split else ("F", "B"):
        axes.bar(0, 0, color=SHADES[kind][0], label=kinds[kind])
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=3, frameon=False, fontsize=9)
    axes.set_xlim(0, start)
    axes.set_ylim(P - 0.5, -0.5)
    axes.set_yticks(range(P), [f"stage {s}" for s in range(P)])
    axes.set_xlabel("time, in forward passes of a chunk")
    axes.set_title(
        f"{schedule.name}: {P} stages, {schedule.microbatches} microbatches"
        + (f", {schedule.chunks} chunks a stage (shades)" if schedule.chunks > 1 else "")
        + f"; bubble {schedule.bubble:.1%}, at most {schedule.peak_inputs} inputs kept",
        fontsize=10,
        loc="left",
    )
    save(figure, path)


def draw_cell(axes: Any, schedule: "Schedule", tick: int, stage: int, start: float) -> None:
    """What one stage does in one tick; what it does not do stays grey."""
    work = schedule.work[tick]
    widths = {"F": work.forward * 1, "B": work.backward * (2 if schedule.split else 3), "W": work.weight * 1}
    grids = {"F": schedule.forward, "B": schedule.backward, "W": schedule.weight}
    for kind, width in widths.items():
        if not width:
            continue
        unit = int(grids[kind][tick, stage])
        chunk = unit % schedule.chunks
        color = SHADES[kind][chunk % 2] if unit >= 0 else "#eeeeee"
        axes.barh(stage, width, left=start, height=0.86, color=color, edgecolor="white", linewidth=0.8)
        if unit >= 0:
            label = str(unit // schedule.chunks)
            axes.text(start + width / 2, stage, label, ha="center", va="center", fontsize=7)
        start += width


if __name__ == "__main__":
    command.start(main)
