"""Steps that wait for data are said once, with the stage that takes the time and a remedy."""

from types import SimpleNamespace

import numpy as np
import pytest

from artifacts.summary import _goodput
from data.config import DataConfig
from training.input_watch import FIRST, LIMIT, QUIET, WINDOW, InputWatch
from training.recorder import Recorder

CACHED, STREAMING = DataConfig(), DataConfig(mode="streaming")
REMEDIES = {
    "plan": "data.packing=concat",
    "read": "data.cache_dir=",
    "tokenize": "data.mode=cached",
    "fill": "leave a core",
    "place": "fewer rows",
}


def lines(watch, steps, wait, stages, seconds=1.0, first=1):
    """What is said in so many alike steps, with the numbers of the steps."""
    said = {step: watch.seen(step, seconds, wait, stages) for step in range(first, first + steps)}
    return {step: line for step, line in said.items() if line}


@pytest.mark.parametrize("stage", REMEDIES)
def test_the_slow_stage_is_named_with_its_remedy(stage):
    watch = InputWatch(CACHED)
    said = lines(watch, FIRST + WINDOW, 0.5, {name: 0.05 for name in REMEDIES} | {stage: 1.3})
    assert list(said) == [FIRST + WINDOW]
    (line,) = said.values()
    assert f"; {stage} takes 87 %" in line and REMEDIES[stage] in line and "50.0 % of the last" in line
    assert watch.bottleneck() in line


def test_a_stream_that_reads_slowly_is_told_of_the_cache():
    assert "data.mode=cached" in next(
        iter(lines(InputWatch(STREAMING), FIRST + WINDOW, 0.5, {"read": 1.5}).values())
    )


def test_bursts_want_a_longer_queue():
    (line,) = lines(InputWatch(CACHED), FIRST + WINDOW, 0.1, {"fill": 0.1, "plan": 0.3}).values()
    assert "data.prefetch=4" in line and "plan takes 75 %" in line


def test_little_waiting_is_not_worth_a_line():
    watch = InputWatch(CACHED)
    assert not lines(watch, 4 * WINDOW, 0.99 * LIMIT, {"fill": 1.0})
    assert watch.bottleneck() is None


def test_the_first_steps_do_not_count():
    watch = InputWatch(CACHED)
    assert not lines(watch, FIRST, 1.0, {"plan": 60.0})
    assert not lines(watch, 2 * WINDOW, 0.0, {"fill": 0.1}, first=FIRST + 1)
    assert watch.bottleneck() is None


def test_it_is_said_again_only_after_a_while():
    said = lines(InputWatch(CACHED), FIRST + WINDOW + QUIET, 0.5, {"fill": 2.0})
    assert list(said) == [FIRST + WINDOW, FIRST + WINDOW + QUIET]


def test_the_recorder_says_it_above_the_live_line_and_the_summary_keeps_it():
    notes = []
    progress = SimpleNamespace(update=lambda row: None, note=notes.append)
    flops = SimpleNamespace(mfu=lambda speed: {})
    recorder = Recorder(None, flops, progress, None, tokens=0, every=1, input_watch=InputWatch(CACHED))
    metrics = {key: np.float32(1) for key in ("loss", "grad_norm", "learning_rate", "tokens")}
    for step in range(1, FIRST + WINDOW + 2):
        recorder.push(step, metrics, 60.0, {"read": 90.0, "fill": 10.0})
    (line,) = notes
    assert "read takes 90 % of making a batch" in line
    assert "read takes 90 % of making a batch" in _goodput(recorder.goodput())
