"""The one screen a finished run leaves; kept as `summary.json`, printed when the run is started again."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from artifacts.checkpoints.location import place
from artifacts.load import stored_checkpoints
from artifacts.metrics import MetricsLog, json_value
from common.files import write_text
from common.text import duration, figures_line, human

_SAMPLE_LINES = 6


def summarize(run_dir: str | os.PathLike[str], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Join the loop's figures to what the run's files say, write `summary.json` whole, and return it.

    `figures`, all optional but `step`: step, num_steps, tokens, wall_seconds, compile_seconds,
    compile_cache {hits, misses}, parameters {total}, peak_flops, eval/loss, eval/bits_per_byte,
    objective (its name, where the loss is no cross-entropy), eval/reward,
    goodput {seconds, categories, starts, redone_steps, input_wait_share, input_bottleneck}
    (`Recorder.goodput`),
    bigram_bits_per_byte, parse_share, parse_passed, parse_total, sample_text, packing, rows_full, mixture
    {name: share of rows}; others are kept as they are.
    From `metrics.jsonl`, over all starts: skipped_updates (where there are any), train_seconds, train_loss
    (mean of the last sixtieth of the steps that had a target),
    tokens_per_second, mfu_causal and mfu_full (medians over steps). Raises OSError.
    """
    run_dir = Path(run_dir)
    rows = [row for row in MetricsLog.read(run_dir / "metrics.jsonl") if "loss" in row]
    summary = {
        "name": run_dir.name,
        "run_dir": _shown(run_dir),
        **figures,
        **_training_figures(rows),
        **_outputs(run_dir),
    }
    plain = {key: json_value(value) for key, value in summary.items()}
    write_text(run_dir / "summary.json", json.dumps(plain, indent=2) + "\n")
    return summary


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the screen, on stdout; `summary` from `summarize`, or read back from `summary.json`.

    Boxes and colours are for a terminal; elsewhere there are plain lines.
    """
    console = console or Console()
    if not console.is_terminal:
        console.print(_plain(summary), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(summary):
        table.add_row(label, escape(text))
    table.add_row("", "")
    for label, command in _next(summary):
        table.add_row(label, escape(command), style="cyan")
    title = f"[bold]{escape(summary['name'])}[/bold]"
    panels = [Panel(table, title=title, expand=False, padding=(0, 1))]
    if summary.get("sample_text"):
        panels.insert(0, _sample(summary["sample_text"]))
    console.print(Group(*panels))


def _plain(summary: Mapping[str, Any]) -> str:
    sample = [f"  {line}" for line in _sample_lines(summary.get("sample_text", ""))]
    rows = [*_lines(summary), *_next(summary)]
    width = max(len(label) for label, _ in rows)
    table = [f"  {label:{width}}  {text}" for label, text in rows]
    return "\n".join([*(["a sample:", *sample] if sample else []), f"{summary['name']}:", *table])


def _training_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    learnt = [
        row for row in rows if row["loss"] or row.get("grad_norm")
    ]  # both are 0 where nothing was a target
    last = learnt[-(len(learnt) // 60 + 1) :]
    losses = [row["loss"] for row in last if "skipped" not in row] or [row["loss"] for row in last]
    figures: dict[str, float] = {"train_loss": float(np.mean(losses))} if losses else {}
    if skipped := sum("skipped" in row for row in rows):
        figures["skipped_updates"] = skipped
    for key in ("tokens_per_second", "mfu_causal", "mfu_full"):
        values = [row[key] for row in rows if key in row]
        if values:
            figures[key] = float(np.median(values))
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {**figures, "train_seconds": float(sum(seconds))} if seconds else figures


def _outputs(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    checkpoints = place(run_dir, stored_checkpoints(run_dir).directory)
    steps = [p for p in checkpoints.glob("*") if p.is_dir() and p.name.isdecimal()]
    if steps:
        newest = max(steps, key=lambda p: int(p.name))
        found["checkpoint"] = _shown(newest)
        found["checkpoint_bytes"] = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    for key, path in (("samples", run_dir / "samples"), ("plot", run_dir / "plots" / "loss.png")):
        if path.exists():
            found[key] = _shown(path)
    return found


def _shown(path: Path) -> str:
    """As a person in the current directory would type it."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _sample(text: str) -> Panel:
    shown = escape("\n".join(_sample_lines(text)))
    return Panel(shown, title="a sample", border_style="dim", expand=False, padding=(0, 1))


def _sample_lines(text: str) -> list[str]:
    # splitlines would also cut at the form feeds and separators that a young model likes to write.
    lines = text.strip("\n").split("\n")
    shown = lines[:_SAMPLE_LINES] + (["..."] if len(lines) > _SAMPLE_LINES else [])
    return [
        "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in s)
        for s in shown
        if text
    ]


def _lines(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    of = f" of {s['num_steps']:,}" if "num_steps" in s else ""
    tokens = f", {human(s['tokens'])} tokens" if "tokens" in s else ""
    yield "steps", f"{s['step']:,}{of}{tokens}{_parameters(s)}"
    if "train_seconds" in s:
        yield "time", _time(s)
    if "goodput" in s:
        yield "goodput", _goodput(s["goodput"])
    if "rows_full" in s:
        yield "rows", _rows(s)
    if "skipped_updates" in s:
        back = f"; taken back {s['rollbacks']} times" if "rollbacks" in s else ""
        yield "skipped", f"{s['skipped_updates']} updates that were not finite, or spikes{back}"
    if "tokens_per_second" in s:
        yield "speed", f"{human(s['tokens_per_second'])} tokens/s{_mfu(s)}"
    if "train_loss" in s:
        # Of an objective of its own the loss is no cross-entropy.
        unit = f"(objective={s['objective']})" if "objective" in s else "nats/token"
        yield "training loss", f"{float(s['train_loss']):.4f} {unit}"
    if "eval/reward" in s:
        yield "answers", f"reward {float(s['eval/reward']):.3f} on held-out prompts"
    if "eval/loss" in s:
        yield "held-out", f"{float(s['eval/loss']):.4f} nats/token{_bits(s)}"
    for kind, label in (("ema", "moving average"), ("mean", "last averaged")):
        if f"eval/loss_{kind}" in s:
            yield label, f"{float(s[f'eval/loss_{kind}']):.4f} nats/token"
    # Whatever else was measured has a name with a room, as `arithmetic/accuracy`.
    if others := {k: v for k, v in s.items() if "/" in k and k.split("/")[0] not in ("eval", "mixture")}:
        yield "measured", figures_line(others)
    if "parse_share" in s:
        of = f" ({s['parse_passed']} of {s['parse_total']} snippets)" if "parse_total" in s else ""
        yield "valid Python", f"{100 * s['parse_share']:.0f} %{of}"
    if "checkpoint" in s:
        yield "checkpoint", f"{s['checkpoint']} ({s['checkpoint_bytes'] / 1e6:,.1f} MB)"
    for key in ("samples", "plot"):
        if key in s:
            yield key, s[key]


def _parameters(s: Mapping[str, Any]) -> str:
    return f", {human(s['parameters']['total'])} parameters" if "parameters" in s else ""


def _rows(s: Mapping[str, Any]) -> str:
    parts = "".join(f", {name} {100 * share:.2f} %" for name, share in (s.get("mixture") or {}).items())
    return f"{s['packing']}, {100 * s['rows_full']:.1f} % full{parts}"


def _time(s: Mapping[str, Any]) -> str:
    text = f"{duration(s['train_seconds'])} of steps"
    if "wall_seconds" in s:
        text += f", {duration(s['wall_seconds'])} since the last start"
    if "compile_seconds" in s:
        cache = s.get("compile_cache") or {}
        hits, misses = cache.get("hits", 0), cache.get("misses", 0)
        text += f", compiling {s['compile_seconds']:.1f} s"
        size = f", {cache['bytes'] / 1e6:,.1f} MB" if "bytes" in cache else ""
        text += f" (cache: {hits} hits, {misses} misses{size})" if cache else " (no cache)"
    return text


def _goodput(goodput: Mapping[str, Any]) -> str:
    shares = shares_line(goodput["categories"])
    waiting = f"{100 * goodput['input_wait_share']:.2f} % of steps waiting for data"
    if goodput.get("input_bottleneck"):
        waiting += f": {goodput['input_bottleneck']}"
    starts = goodput.get("starts", 1)
    over = f" over {starts} starts, {goodput['redone_steps']:,} steps redone" if starts > 1 else ""
    return f"of {duration(goodput['seconds'])}{over}: {shares}; {waiting}"


def shares_line(categories: Mapping[str, float]) -> str:
    """Seconds by category as shares, the largest first; what rounds to nothing is left out."""
    total = sum(categories.values()) or 1.0
    shares = {name.replace("_", " "): 100 * value / total for name, value in categories.items()}
    shown = sorted((share, name) for name, share in shares.items() if share >= 0.05)
    return ", ".join(f"{name} {share:.1f} %" for share, name in reversed(shown))


def _mfu(s: Mapping[str, Any]) -> str:
    if "mfu_causal" not in s or "mfu_full" not in s:
        return ""
    peak = f" of {s['peak_flops'] / 1e12:.3g} TFLOP/s" if "peak_flops" in s else ""
    return f", MFU {100 * s['mfu_causal']:.1f} % causal, {100 * s['mfu_full']:.1f} % full attention{peak}"


def _bits(s: Mapping[str, Any]) -> str:
    if "eval/bits_per_byte" not in s:
        return ""
    baseline = s.get("bigram_bits_per_byte")
    beside = f" (bigram model: {float(baseline):.3f})" if baseline is not None else ""
    return f", {float(s['eval/bits_per_byte']):.3f} bits per byte{beside}"


def _next(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "generate", f'python scripts/generate.py {s["name"]} prompt="def "'
    yield "curves", f"tensorboard --logdir {s['run_dir']}/tensorboard"
    yield "start from it", f"python train.py +experiment=NAME run.name=NEW init_from={s['name']}"
