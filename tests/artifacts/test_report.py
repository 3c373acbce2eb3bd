"""What a person is shown: the live line, the plot, the last screen."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from artifacts.metrics import MetricsLog, encode_row
from artifacts.plots import plot_loss, smoothed
from artifacts.summary import print_summary, summarize
from training.progress import Progress, startup_table


def _rows(n=300):
    rows = []
    for step in range(1, n + 1):
        loss = 3.0 + 5 * math.exp(-step / 50)
        rows.append({"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": 64 * step})
        if step % 100 == 0:
            rows.append({"step": step, "eval/loss": loss + 0.1, "eval/bits_per_byte": 1.5})
    return rows


def summary_text(summary, width=100):
    """The terminal's screen without its colours."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, no_color=True, color_system=None)
    print_summary(summary, console)
    return out.getvalue()


def _drive(terminal, **options):
    """The output of 40 steps that take 2 s each, with an evaluation at 20 and a foreign print at 30."""
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    progress = Progress(40, every=10, console=console, clock=lambda: now[0], **options)
    for step in range(options.get("start_step", 0) + 1, 41):
        now[0] += 2.0
        row = {"step": step, "loss": 9.0 - step / 10, "tokens_per_second": 12345.0, "mfu_causal": 0.314}
        progress.update(row)
        if step == 20:
            progress.evaluated({"step": 20, "eval/loss": 4.56, "eval/bits_per_byte": 1.678})
        if step == 30:
            progress.note("a [note] of somebody else")
    progress.close()
    progress.close()
    return out.getvalue()


def test_any_row_may_be_shown():
    """A score of a harness, say; the live line keeps the held-out loss that it had."""
    out = io.StringIO()
    progress = Progress(40, console=Console(file=out, width=100))
    progress.evaluated({"step": 20, "eval/loss": 4.56})
    progress.evaluated({"step": 20, "arc_easy/accuracy": 0.25, "arc_easy/error": 0.0123456})
    assert out.getvalue().splitlines() == [
        "eval at step 20: 4.5600 nats/token",
        "at step 20: arc_easy/accuracy 0.25, arc_easy/error 0.01235",
    ]
    assert progress._eval == "eval 4.560"


def test_plain_lines_come_at_the_first_step_and_every_few():
    lines = _drive(False).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        "1/40",
        "10/40",
        "20/40",
        "30/40",
        "40/40",
    ]
    assert lines[0].startswith("step 1/40  loss 8.900  12.3k tok/s  MFU 31.4%")
    assert "ETA 1:00" in lines[1]  # 30 steps of 2 s
    assert lines[3] == "eval at step 20: 4.5600 nats/token, 1.6780 bits/byte"
    assert "eval 1.678 bit/B" in lines[4]
    assert lines[5] == "a [note] of somebody else"
    assert "\x1b" not in "".join(lines)


def test_a_resumed_run_shows_its_first_step_whatever_its_number():
    assert _drive(False, start_step=13).splitlines()[0].startswith("step 14/40")


def test_the_live_line_ends_with_the_last_figures_and_keeps_other_lines_whole():
    out = _drive(True)
    last = out.rstrip().splitlines()[-1] if not out.rstrip().endswith("\x1b[?25h") else out.splitlines()[-2]
    for figure in ("40/40", "loss 5.000", "12.3k tok/s", "MFU 31.4%", "eval 1.678 bit/B"):
        assert figure in last
    assert "eval at step 20: 4.5600 nats/token, 1.6780 bits/byte\n" in out
    assert "a [note] of somebody else\n" in out
    assert "step 10/40 " not in out


def test_a_switched_off_live_line_is_plain_on_a_terminal_too():
    assert "step 10/40 " in _drive(True, live=False)


def test_only_the_first_process_prints(capsys):
    progress = Progress(2, primary=False)
    progress.update({"step": 1, "loss": 1.0})
    progress.evaluated({"step": 1, "eval/loss": 1.0})
    progress.note("x")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_is_shown():
    out = io.StringIO()
    progress = Progress(1, console=Console(file=out))
    progress.update({"step": 1, "loss": math.nan})
    progress.close()
    assert out.getvalue() == "step 1/1  loss nan\n"


def test_the_startup_table_says_what_and_why():
    out = io.StringIO()
    startup_table([("precision", "float32", "auto on cpu [x86]")], Console(file=out, width=100))
    assert out.getvalue() == "precision  float32 (auto on cpu [x86])\n"


@pytest.mark.parametrize("width", (80, 120))
def test_the_startup_table_fits_the_screen_and_keeps_values_and_names_apart(width):
    out = io.StringIO()
    rows = [
        ("data", "long" + " long" * 40, "data.mode=cached"),
        ("attention", "reference", "training.attention"),
    ]
    startup_table(rows, Console(file=out, width=width, force_terminal=True, color_system=None))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert [line[:11].strip() for line in lines] == ["data", *[""] * (len(lines) - 2), "attention"]
    assert " ".join(line[11:] for line in lines[:-1]) == "long" + " long" * 40 + " (data.mode=cached)"


def _plot(rows, path, **options):
    metrics = path.parent / "metrics.jsonl"
    metrics.write_bytes(b"".join(encode_row(row) for row in rows))
    return plot_loss(metrics, path, title="$x_{a", **options)


def _coloured(path, target):
    """How many pixels are near an RGB colour, and their mean column."""
    near = np.abs(imread(path)[..., :3] * 255 - np.array(target)).max(-1) < 12
    return near.sum(), (near.nonzero()[1].mean() / near.shape[1] if near.any() else math.nan)


def test_the_plot_shows_both_curves_and_the_baseline(tmp_path):
    path = _plot(_rows(), tmp_path / "loss.png", bigram_bits_per_byte=2.0)
    assert imread(path).shape[:2] == (784, 1260)
    for colour in ((0x1F, 0x4E, 0x8C), (0xD1, 0x49, 0x5B), (0x6B, 0x72, 0x80)):
        assert _coloured(path, colour)[0] > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    without = _plot([r for r in _rows() if "loss" in r], tmp_path / "b.png")
    assert _coloured(without, (0xD1, 0x49, 0x5B))[0] == 0


def test_a_plot_survives_one_step_and_bad_numbers(tmp_path):
    rows = _rows(120)
    rows[50] = {**rows[50], "loss": math.nan}
    rows[60] = {**rows[60], "loss": 1e30}
    # The curve still fills the picture: a divergence is cut off, not the rest flattened.
    path = _plot(rows, tmp_path / "bad.png")
    curve = np.abs(imread(path)[..., :3] * 255 - np.array([0x1F, 0x4E, 0x8C])).max(-1) < 12
    assert np.ptp(curve.any(1).nonzero()[0]) > 300
    assert _plot(rows[:1], tmp_path / "one.png") is not None
    assert _plot([{"step": 1, "loss": math.nan}], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("n", [1, 2, 59, 60, 61, 1000])
def test_smoothing_keeps_a_constant_and_has_no_lag(n):
    assert smoothed(np.full(n, 3.0)) == pytest.approx(3.0)
    line = np.arange(n, dtype=float)
    half = n // 60
    assert smoothed(line)[: n - half] == pytest.approx(line[: n - half])
    assert smoothed(line)[-1] == pytest.approx(line[-1 - half :].mean())


FIGURES = {
    "step": 600,
    "num_steps": 600,
    "tokens": 2_457_600,
    "wall_seconds": 301.0,
    "compile_seconds": 7.24,
    "compile_cache": {"hits": 3, "misses": 17, "bytes": 5_400_000},
    "parameters": {"total": 5_243_904, "non_embedding": 4_000_000},
    "peak_flops": 1.5e11,
    "goodput": {
        "seconds": 250.0,
        "categories": {"steps": 244.525, "evaluation": 3.8, "input_wait": 0.3075, "other": 1.3675},
        "input_wait_share": 0.00123,
    },
    "eval/loss": 2.4123,
    "eval/bits_per_byte": 1.512,
    "eval/loss_ema": 2.3999,
    "bigram_bits_per_byte": 2.234,
    "parse_share": 0.625,
    "parse_passed": 40,
    "parse_total": 64,
    "sample_text": "def f(x):\n    return [x]\n" + "# more\n" * 30,
}


def _finished_run(tmp_path, figures=FIGURES):
    run = tmp_path / "quick[start]"
    for folder in (
        "checkpoints/200/state",
        "checkpoints/600/state",
        "checkpoints/700.tmp",
        "plots",
        "samples",
    ):
        (run / folder).mkdir(parents=True)
    (run / "checkpoints/600/state/x").write_bytes(bytes(2_500_000))
    (run / "plots/loss.png").touch()
    log = MetricsLog.open(run / "metrics.jsonl")
    for step in range(1, 121):
        speed = 1.0 if step == 1 else 12345.0  # one slow step must not spoil the figure
        row = {"step": step, "loss": 2.0 if step > 117 else 9.0, "step_seconds": 2.0}
        log.write({**row, "tokens_per_second": speed, "mfu_causal": 0.313, "mfu_full": 0.352})
        log.write({"step": step, "eval/loss": 1.0})
    log.close()
    return run, summarize(run, figures)


def test_the_summary_has_every_figure_on_one_screen(tmp_path):
    text = summary_text(_finished_run(tmp_path)[1], width=250)  # the path of a test is long
    for figure in (
        *("quick[start]", "600 of 600", "2.46M tokens", "5.24M parameters", "4:00 of steps", "5:01", "7.2 s"),
        *(
            "3 hits, 17 misses, 5.4 MB",
            "of 4:10: steps 97.8 %, evaluation 1.5 %, other 0.5 %, input wait 0.1 %; 0.12 % of",
            "12.3k tokens/s",
            "31.3 % causal",
            "35.2 % full",
            "2.0000 nats",
            "2.4123 nats",
        ),
        *(
            "1.512 bits per byte",
            "2.234",
            "2.3999",
            "62 % (40 of 64",
            "2.5 MB",
            "checkpoints/600",
            "loss.png",
        ),
        *("return [x]", "generate.py quick[start] prompt=", "init_from=quick[start]"),
    ):
        assert figure in text, figure
    assert len(text.splitlines()) <= 35


def test_where_there_is_no_terminal_the_screen_is_plain_lines(tmp_path):
    out = io.StringIO()
    print_summary(
        _finished_run(tmp_path)[1] | {"sample_text": "a\x1b[2J\x0cb\nreturn [x]"}, Console(file=out)
    )
    lines = out.getvalue().splitlines()
    assert lines[:4] == ["a sample:", "  a�[2J�b", "  return [x]", "quick[start]:"]
    assert all(line == line.rstrip() and line.isprintable() for line in lines)
    assert not set("│─╭╮╰╯") & set(out.getvalue())


def test_a_figure_that_does_not_exist_has_no_line(tmp_path):
    summary = _finished_run(tmp_path)[1]
    for key in summary.keys() - {"name", "run_dir", "step", "checkpoint_bytes", "parse_passed"}:
        less = {k: v for k, v in summary.items() if k != key}
        assert "None" not in summary_text(less) and summary_text(less) != summary_text(summary), key
    bare = summary_text({"name": "a", "run_dir": "runs/a", "step": 3})
    assert "held-out" not in bare and "MFU" not in bare and "generate.py a" in bare


def test_a_saved_summary_prints_the_same_screen_again(tmp_path):
    run, summary = _finished_run(tmp_path, FIGURES | {"eval/loss": math.nan, "eval/bits_per_byte": math.inf})
    text = (run / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    stored = json.loads(text)
    assert stored["step"] == 600
    assert summary_text(stored) == summary_text(summary)
    assert sorted(p.name for p in run.glob("*.tmp")) == []


def test_the_training_loss_is_of_steps_that_had_a_target(tmp_path):
    """Batches of prompts whose answers were cut off have a loss of 0, which no model has."""
    log = MetricsLog.open(tmp_path / "metrics.jsonl")
    for step in range(1, 121):
        learnt = step % 20 == 0
        log.write({"step": step, "loss": 2.0 * learnt, "grad_norm": 1.0 * learnt, "tokens": step // 20})
    log.close()
    assert summarize(tmp_path, {"step": 120})["train_loss"] == 2.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0, "grad_norm": 0.0}\n')
    summary = summarize(tmp_path, {"step": 1})
    assert "train_loss" not in summary and "training loss" not in summary_text(summary)


def test_a_run_without_rows_has_a_summary(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    summary = summarize(tmp_path, {"step": 0})
    assert "steps" in summary_text(summary) and "train_loss" not in summary
