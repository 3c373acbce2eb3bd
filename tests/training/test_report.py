"""What a person is shown: the live line, the plot, the last screen."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from training.plots import plot_loss, smoothed
from training.progress import Progress, duration, human, startup_table
from training.summary import load_summary, print_summary, save_summary, summary_text


def _rows(n=300):
    rows = []
    for step in range(1, n + 1):
        loss = 3.0 + 5 * math.exp(-step / 50)
        rows.append({"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": 64 * step})
        if step % 100 == 0:
            rows.append({"step": step, "eval/loss": loss + 0.1, "eval/bits_per_byte": 1.5})
    return rows


def _drive(terminal, **options):
    """The output of 40 steps that take 2 s each, with an evaluation at 20 and a foreign print at 30."""
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with Progress(num_steps=40, every=10, console=console, clock=lambda: now[0], **options) as progress:
        for step in range(options.get("start_step", 0) + 1, 41):
            now[0] += 2.0
            row = {"step": step, "loss": 9.0 - step / 10, "tokens_per_second": 12345.0, "mfu_causal": 0.314}
            progress.step(row)
            if step == 20:
                progress.evaluated({"step": 20, "eval/loss": 4.56, "eval/bits_per_byte": 1.678})
            if step == 30:
                progress.note("a [note] of somebody else")
    return out.getvalue()


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
    with Progress(num_steps=2, primary=False) as progress:
        progress.step({"step": 1, "loss": 1.0})
        progress.evaluated({"step": 1, "eval/loss": 1.0})
        progress.note("x")
    assert capsys.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_is_shown():
    out = io.StringIO()
    with Progress(num_steps=1, console=Console(file=out)) as progress:
        progress.step({"step": 1, "loss": math.nan})
    assert out.getvalue() == "step 1/1  loss nan\n"


def test_the_startup_table_says_what_and_why():
    out = io.StringIO()
    startup_table([("precision", "float32", "auto on cpu [x86]")], Console(file=out, width=100))
    assert out.getvalue().split() == ["precision", "float32", "auto", "on", "cpu", "[x86]"]


def test_counts_and_durations_read_well():
    assert [human(x) for x in (0, 7, 950, 12345, 999_600, 4.56e6, 7e9, 2e12)] == [
        *("0", "7", "950", "12.3k", "1M", "4.56M", "7B", "2T")
    ]
    assert [duration(x) for x in (-1, 7.4, 754, 3723, 2 * 86400 + 3 * 3600 + 240)] == [
        *("0:00", "0:07", "12:34", "1:02:03", "2d 03:04")
    ]


def _coloured(path, target):
    """How many pixels are near an RGB colour, and their mean column."""
    near = np.abs(imread(path)[..., :3] * 255 - np.array(target)).max(-1) < 12
    return near.sum(), (near.nonzero()[1].mean() / near.shape[1] if near.any() else math.nan)


def test_the_plot_shows_both_curves_and_the_baseline(tmp_path):
    path = plot_loss(_rows(), tmp_path / "plots" / "loss.png", name="a", bigram_bits_per_byte=2.0)
    assert imread(path).shape[:2] == (784, 1260)
    for colour in ((0x1F, 0x4E, 0x8C), (0xD1, 0x49, 0x5B), (0x6B, 0x72, 0x80)):
        assert _coloured(path, colour)[0] > 300
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]
    without = plot_loss([r for r in _rows() if "loss" in r], tmp_path / "b.png", name="a")
    assert _coloured(without, (0xD1, 0x49, 0x5B))[0] == 0


def test_a_plot_survives_one_step_and_bad_numbers(tmp_path):
    rows = _rows(120)
    rows[50] = {**rows[50], "loss": math.nan}
    rows[60] = {**rows[60], "loss": 1e30}
    # The curve still fills the picture: a divergence is cut off, not the rest flattened.
    path = plot_loss(rows, tmp_path / "bad.png", name="$x_{bad")
    curve = np.abs(imread(path)[..., :3] * 255 - np.array([0x1F, 0x4E, 0x8C])).max(-1) < 12
    assert np.ptp(curve.any(1).nonzero()[0]) > 300
    assert plot_loss(rows[:1], tmp_path / "one.png", name="one") is not None
    assert plot_loss([{"step": 1, "loss": math.nan}], tmp_path / "none.png", name="none") is None
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("n", [1, 2, 59, 60, 61, 1000])
def test_smoothing_keeps_a_constant_and_has_no_lag(n):
    assert smoothed(np.full(n, 3.0)) == pytest.approx(3.0)
    line = np.arange(n, dtype=float)
    half = n // 60
    assert smoothed(line)[: n - half] == pytest.approx(line[: n - half])
    assert smoothed(line)[-1] == pytest.approx(line[-1 - half :].mean())


SUMMARY = {
    "name": "quick[start]",
    "run_dir": "runs/quickstart",
    "steps": 600,
    "num_steps": 600,
    "tokens": 2_457_600,
    "seconds": 253.2,
    "tokens_per_second": 12345.0,
    "mfu_causal": 0.313,
    "mfu_full": 0.352,
    "peak": "measured",
    "num_params": 5_243_904,
    "train_loss": 2.3112,
    "eval_loss": 2.4123,
    "eval_bits_per_byte": 1.512,
    "bigram_bits_per_byte": 2.234,
    "parse_share": 0.62,
    "parse_snippets": 64,
    "compile_seconds": 7.24,
    "compile_cache": "miss",
    "checkpoint": "runs/quickstart/checkpoints/600",
    "checkpoint_bytes": 62_000_000,
    "samples": "runs/quickstart/samples/600.txt",
    "plot": "runs/quickstart/plots/loss.png",
}


def test_the_summary_has_every_figure_on_one_screen():
    text = summary_text(SUMMARY)
    for figure in (
        *("quick[start]", "600 of 600", "2.46M", "5.24M", "4:13", "12.3k", "31.3 %", "35.2 %", "2.3112"),
        *("2.4123", "1.512", "2.234", "62 % of 64", "7.2 s", "miss", "62.0 MB", "checkpoints/600"),
        *(
            "samples/600.txt",
            "plots/loss.png",
            "scripts/generate.py run=quick[start]",
            "init_from=quick[start]",
        ),
    ):
        assert figure in text, figure
    assert len(text.splitlines()) <= 24


def test_a_figure_that_does_not_exist_has_no_line():
    text = summary_text({"name": "a", "run_dir": "runs/a", "steps": 3})
    assert "held-out" not in text and "MFU" not in text and "None" not in text
    assert "run=a" in text
    for key in SUMMARY:
        if key not in ("name", "run_dir", "steps"):
            assert "None" not in summary_text({k: v for k, v in SUMMARY.items() if k != key})


def test_a_saved_summary_prints_the_same_screen_again(tmp_path):
    path = tmp_path / "summary.json"
    save_summary(path, SUMMARY)
    assert summary_text(load_summary(path)) == summary_text(SUMMARY)
    out = io.StringIO()
    print_summary(load_summary(path), Console(file=out, width=100))
    assert out.getvalue() == summary_text(SUMMARY)
    assert json.loads(path.read_text())["steps"] == 600


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}'])
def test_a_torn_summary_is_none(tmp_path, content):
    path = tmp_path / "summary.json"
    assert load_summary(path) is None
    path.write_text(content)
    assert load_summary(path) is None
