"""A row for each artifact, and all of a folder: JSON, a table, a page with the Pareto front."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.figure import hide_frame, literal, new_figure
from common.files import write_text
from common.page import render

ROW = "compression.json"  # beside an artifact
COLUMNS = {  # figure: (head, format)
    "name": ("artifact", "{}"),
    "bits_a_weight": ("bits a weight", "{:.2f}"),
    "megabytes": ("MB", "{:.1f}"),
    "nonzero": ("nonzero", "{:.1%}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "rise": ("rise", "{:+.2%}"),
    "kl": ("KL, nats", "{:.4f}"),
    "kl_p99": ("KL p99", "{:.3f}"),
    "flips": ("flips", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "peak_memory_mb": ("peak MB", "{:.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}
BODY = """
<p class="note">{{ note }}</p>
{{ table(head, rows) }}
{{ picture(plot, "bits per byte by megabytes, each artifact a dot, a line through those that none beats") }}
<h2>How they were made</h2>
{% for row in made %}<details><summary>{{ row.name }}</summary><pre>{{ row.recipe }}</pre></details>
{% endfor %}
"""
Row = dict[str, Any]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, those of columns that any row has, and of tasks behind them."""
    tasks = sorted({name for row in rows for name in row.get("tasks", {})})
    keys = [key for key in COLUMNS if any(key in row for row in rows)]

    def cells(row: Row) -> list[str]:
        own = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in keys]
        scores = (row.get("tasks", {}).get(name) for name in tasks)
        return own + [f"{s['value']:.4g} ± {s['error']:.2g}" if s else "" for s in scores]

    return [*(COLUMNS[key][0] for key in keys), *tasks], [cells(row) for row in rows]


def markdown(rows: Sequence[Row]) -> str:
    """The table for a page of text."""
    head, cells = table(rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both megabytes and bits per byte, the smallest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["megabytes"], row["bits_per_byte"])):
        if not best or row["bits_per_byte"] < best[-1]["bits_per_byte"]:
            best.append(row)
    return best


def read_rows(folder: Path) -> list[Row]:
    """The rows of all artifacts in a folder, the largest first."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob(f"*/{ROW}")]
    return sorted(found, key=lambda row: (-row["megabytes"], row["name"]))


def write_report(folder: Path, dense: Row, note: str) -> list[Path]:
    """Write `report.json`, `.md` and `.html` of the folder's artifacts and the dense model; the files."""
    rows = [dense, *read_rows(folder)]
    names = [folder / f"report.{kind}" for kind in ("json", "md", "html")]
    write_text(names[0], json.dumps({"note": note, "rows": rows}, indent=2) + "\n")
    write_text(names[1], f"{note}\n\n{markdown(rows)}")
    head, cells = table(rows)
    made = [{"name": row["name"], "recipe": json.dumps(row["recipe"], indent=2)} for row in rows[1:]]
    shown: Mapping[str, Any] = {"head": head, "rows": cells, "plot": _plot(rows), "made": made, "note": note}
    write_text(names[2], render(f"{dense['name']}, smaller", BODY, **shown))
    return names


def _plot(rows: Sequence[Row]) -> Any:
    figure = new_figure(8.0, 4.6)
    axes = figure.subplots()
    best = front(rows)
    axes.plot([r["megabytes"] for r in best], [r["bits_per_byte"] for r in best], color="#9db4d0", zorder=1)
    axes.scatter([r["megabytes"] for r in rows], [r["bits_per_byte"] for r in rows], color="#1f4e8c", s=22)
    for row in rows:
        at = (row["megabytes"], row["bits_per_byte"])
        axes.annotate(literal(row["name"]), at, (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB of weights, as written")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(True, which="both", color="#e5e7eb", linewidth=0.7)
    hide_frame(axes)
    return figure
