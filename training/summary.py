"""The one screen that a finished run leaves; kept as `summary.json`, printed when it is started again."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, cast

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from training.progress import duration, human


class Summary(TypedDict, total=False):
    """Figures of a run; `name`, `run_dir` and `steps` are always there, what does not exist is left out."""

    name: str
    run_dir: str
    steps: int
    num_steps: int
    tokens: int
    seconds: float  # spent in training, over all starts
    tokens_per_second: float
    mfu_causal: float
    mfu_full: float
    peak: str  # how the hardware's peak is known
    num_params: int
    train_loss: float  # nats per token, mean of the last steps
    eval_loss: float  # nats per token
    eval_bits_per_byte: float
    bigram_bits_per_byte: float
    parse_share: float  # of generated snippets that are Python that parses
    parse_snippets: int
    compile_seconds: float
    compile_cache: str  # "hit", "miss" or "off"
    checkpoint: str
    checkpoint_bytes: int
    samples: str
    plot: str


def save_summary(path: str | os.PathLike[str], summary: Summary) -> None:
    """Write `summary.json`, whole or not at all. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_summary(path: str | os.PathLike[str]) -> Summary | None:
    """What `save_summary` wrote, or None where nothing can be read: then it is computed anew."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(tree, dict) or not {"name", "run_dir", "steps"} <= tree.keys():
        return None
    return cast(Summary, tree)


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The screen, on stdout."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(summary):
        table.add_row(label, escape(text))
    table.add_row("", "")
    for label, command in _next(summary):
        table.add_row(label, escape(command), style="cyan")
    title = f"[bold]{escape(summary['name'])}[/bold]"
    (console or Console()).print(Panel(table, title=title, expand=False, padding=(0, 1)))


def summary_text(summary: Summary, width: int = 100) -> str:
    """The same screen as plain text."""
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=width))
    return out.getvalue()


def _lines(s: Summary) -> Iterator[tuple[str, str]]:
    yield "steps", f"{s['steps']:,}" + (f" of {s['num_steps']:,}" if "num_steps" in s else "") + _tokens(s)
    if "num_params" in s:
        yield "parameters", f"{human(s['num_params'])}"
    if "seconds" in s:
        yield "time", duration(s["seconds"]) + _compile(s)
    if "tokens_per_second" in s:
        yield "speed", f"{human(s['tokens_per_second'])} tokens/s" + _mfu(s)
    if "train_loss" in s:
        yield "training loss", f"{s['train_loss']:.4f} nats/token"
    if "eval_loss" in s:
        yield "held-out", f"{s['eval_loss']:.4f} nats/token" + _bits(s)
    if "parse_share" in s:
        of = (
            f" of {s['parse_snippets']} generated snippets"
            if "parse_snippets" in s
            else " of generated snippets"
        )
        yield "valid Python", f"{100 * s['parse_share']:.0f} %{of}"
    if "checkpoint" in s:
        size = f" ({s['checkpoint_bytes'] / 1e6:,.1f} MB)" if "checkpoint_bytes" in s else ""
        yield "checkpoint", s["checkpoint"] + size
    if "samples" in s:
        yield "samples", s["samples"]
    if "plot" in s:
        yield "plot", s["plot"]


def _tokens(s: Summary) -> str:
    return f", {human(s['tokens'])} tokens" if "tokens" in s else ""


def _compile(s: Summary) -> str:
    if "compile_seconds" not in s:
        return ""
    cache = f" (cache: {s['compile_cache']})" if "compile_cache" in s else ""
    return f", of it {s['compile_seconds']:.1f} s compiling{cache}"


def _mfu(s: Summary) -> str:
    if "mfu_causal" not in s or "mfu_full" not in s:
        return ""
    peak = f"; peak {s['peak']}" if "peak" in s else ""
    return f", MFU {100 * s['mfu_causal']:.1f} % causal, {100 * s['mfu_full']:.1f} % full attention{peak}"


def _bits(s: Summary) -> str:
    if "eval_bits_per_byte" not in s:
        return ""
    baseline = f" (bigram model: {s['bigram_bits_per_byte']:.3f})" if "bigram_bits_per_byte" in s else ""
    return f", {s['eval_bits_per_byte']:.3f} bits per byte{baseline}"


def _next(s: Summary) -> Iterator[tuple[str, str]]:
    yield "generate", f"python scripts/generate.py run={s['name']} prompt='def '"
    yield "curves", f"tensorboard --logdir {s['run_dir']}/tensorboard"
    yield "start from it", f"python train.py +experiment=NAME run.name=NEW init_from={s['name']}"
