"""Pictures without matplotlib's global state: an empty one, what they have in common, written whole."""

import io
from pathlib import Path
from typing import Any

from common.files import replacing


def new_figure(width: float, height: float, dpi: int = 110) -> Any:
    """An empty figure of so many inches, drawn in memory."""
    # Only now: it takes a second, and on its very first use many, to look through the machine's fonts.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def hide_frame(axes: Any) -> None:
    """Leave out the lines above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def literal(text: str) -> str:
    """A text as it stands: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def as_png(figure: Any) -> bytes:
    """The picture, without matplotlib's version in it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write a PNG, replaced whole."""
    with replacing(path) as aside:
        aside.write_bytes(as_png(figure))
