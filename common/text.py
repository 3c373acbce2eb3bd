"""Numbers, counts, tables and errors as a person reads them."""

from collections.abc import Collection, Mapping, Sequence

MIB, GIB = 2**20, 2**30


def human(count: float) -> str:
    """A count in three digits: 950, 12.3k, 4.56M."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale * 0.9995:  # 999.6 thousand rounds to a million
            return f"{count / scale:.3g}{suffix}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """0:07, 12:34, 1:02:03, 2d 03:04."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def figures_line(figures: Mapping[str, object]) -> str:
    """Figures by name, numbers in four digits: `loss 2.345, accuracy 0.5`."""
    shown = (f"{k} {v:.4g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in figures.items())
    return ", ".join(shown)


def counted(count: int, noun: str) -> str:
    """1 device, 8 devices, 4,096 devices."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table whose columns stand below each other, those in `right` at their right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'><'[i not in right]}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 letters; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def reason(error: BaseException) -> str:
    """An error's type and what it says, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
