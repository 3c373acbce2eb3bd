"""The log of a run: every step exactly once, whatever the crash, and every float32 exactly."""

import errno
import json
import math
import os

import numpy as np
import pytest

from artifacts.metrics import MetricsLog, encode_row
from common.errors import RunFault


def _row(step):
    return {
        "step": step,
        "loss": float(np.float32(math.sin(step) + 5)),
        "tokens": 64 * step,
    }


def _write_run(path, steps, resume=0):
    log = MetricsLog.open(path, resume)
    assert log.missing == 0
    for step in range(resume + 1, steps + 1):
        log.write(_row(step))
        if step % 2 == 0:
            log.write({"step": step, "eval/loss": 1.0 / step})
    log.close()


def test_every_step_exactly_once_after_a_crash_at_any_byte(tmp_path):
    whole = tmp_path / "whole.jsonl"
    _write_run(whole, 4)
    data = whole.read_bytes()
    assert len(MetricsLog.read(whole)) == 6
    for cut in range(len(data) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        # A checkpoint is never ahead of its rows (an evaluation at its step included), so any step whose
        # rows are whole could be the newest one.
        lines = [json.loads(line) for line in data[:cut].split(b"\n")[:-1]]
        steps = [r["step"] for r in lines if "loss" in r]
        complete = [s for s in steps if s % 2 or any(r == {"step": s, "eval/loss": 1.0 / s} for r in lines)]
        resume = max(complete, default=0)
        _write_run(path, 4, resume)
        assert path.read_bytes() == data, cut


def test_resume_drops_what_lies_above_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write_run(path, 9)
    for resume in (
        7,
        4,
        4,
        1,
    ):  # twice in a row, and the second resume from the same checkpoint
        MetricsLog.open(path, resume).close()
        rows = MetricsLog.read(path)
        assert [r["step"] for r in rows if "loss" in r] == list(range(1, resume + 1))
        assert all(r["step"] <= resume for r in rows)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_repeated_step_is_kept_once_and_a_torn_middle_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        encode_row(_row(1))
        + encode_row(_row(2))
        + encode_row({"step": 2, "loss": 99.0})
        + encode_row({"step": 2, "eval/loss": 1.0})
        + encode_row({"step": 2, "event": "another kind of row"})
        + b'{"step": 3, "lo\n\0\0\0\n[1]\n{"loss": 1}\n'
        + encode_row(_row(4))
    )
    log = MetricsLog.open(path, 4)
    assert log.missing == 1
    log.close()
    assert MetricsLog.read(path) == [
        _row(1),
        _row(2),
        {"step": 2, "eval/loss": 1.0},
        {"step": 2, "event": "another kind of row"},
        _row(4),
    ]


def test_a_new_start_keeps_nothing_and_a_missing_file_is_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode_row({"step": 0, "eval/loss": 9.0}) + encode_row(_row(1)))
    MetricsLog.open(path, 0).close()
    assert path.read_bytes() == b""
    path.unlink()
    assert MetricsLog.open(path, 5).missing == 5


def test_float32_round_trips_exactly_on_random_bit_patterns(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    edges = np.array([0, 1, 0x80000000, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000], np.uint32)
    values = np.concatenate([edges, bits]).view(np.float32)
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog.open(path)
    for step, value in enumerate(values, 1):
        log.write({"step": step, "loss": value})
    log.close()
    back = np.array([r["loss"] for r in MetricsLog.read(path)], np.float32)
    nan = np.isnan(values)
    assert nan.any() and np.array_equal(np.isnan(back), nan)
    assert np.array_equal(back.view(np.uint32)[~nan], values.view(np.uint32)[~nan])


def test_every_line_is_strict_json():
    row = {
        "step": 1,
        "loss": np.float32(np.nan),
        "grad_norm": math.inf,
        "a": -math.inf,
        "b": np.int64(3),
    }

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(encode_row(row), parse_constant=refuse) == {
        "step": 1,
        "loss": "nan",
        "grad_norm": "inf",
        "a": "-inf",
        "b": 3,
    }


def test_a_full_disk_is_a_fault_and_leaves_no_torn_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog.open(path)
    log.write(_row(1))
    real, calls = os.write, []

    def half_then_full(fd, data):
        calls.append(len(data))
        if len(calls) == 1:
            return real(fd, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(RunFault, match=r"metrics\.jsonl.*No space left on device.*resume"):
        log.write(_row(2))
    monkeypatch.undo()
    assert path.read_bytes() == encode_row(_row(1))
    log.write(_row(2))
    assert MetricsLog.read(path) == [_row(1), _row(2)]


def test_a_failed_sync_is_a_fault(tmp_path, monkeypatch):
    log = MetricsLog.open(tmp_path / "metrics.jsonl")

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFault, match="Input/output error"):
        log.sync()


def test_a_crash_within_the_cut_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    _write_run(path, 5)
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog.open(path, 3)
    assert path.read_bytes() == before
    monkeypatch.undo()
    MetricsLog.open(path, 3).close()
    assert [r["step"] for r in MetricsLog.read(path) if "loss" in r] == [1, 2, 3]
