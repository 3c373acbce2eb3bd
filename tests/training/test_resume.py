"""A run that is killed, and started again by the same command, ends as the run that nobody disturbed."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from artifacts.directory import open_run

STEPS = 30
LENGTH = (f"training.num_steps={STEPS}", "checkpoint.every=4", "checkpoint.keep=8", "eval.every=6")
DEADLINE = 120  # seconds; only a hang takes so long


def finish(process, status=0):
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == status, err
    return out, err


def wait_until(process, condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, f"it ended too soon: {process.communicate()}"
        assert time.monotonic() < end
        time.sleep(0.001)


def training_rows(ground, name):
    path = ground.run(name) / "metrics.jsonl"
    return sum(b'"loss"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0


def kill_at_row(ground, name, row, *extra):
    """SIGKILL as soon as `row` training steps are written: wherever the process is by then."""
    process = ground.start(name, *extra)
    wait_until(process, lambda: training_rows(ground, name) >= row)
    process.kill()
    finish(process, -signal.SIGKILL)
    return training_rows(ground, name)


def kill_in_a_save(ground, name, row, *extra):
    """SIGKILL while a checkpoint is being written."""
    process = ground.start(name, *extra)
    wait_until(process, lambda: training_rows(ground, name) >= row)
    stop_in_a_save(process, ground, name, process.pid)
    process.kill()
    finish(process, -signal.SIGKILL)
    return training_rows(ground, name)


def half_written(ground, name):
    """Whether there is a checkpoint that has not got its name yet."""
    return any("tmp" in path.name for path in (ground.run(name) / "checkpoints").glob("*"))


def stop_in_a_save(process, ground, name, pid):
    """SIGSTOP to `pid`, the one that commits, while a checkpoint is half written: it stays so."""
    while True:
        wait_until(process, lambda: half_written(ground, name))
        os.kill(pid, signal.SIGSTOP)
        while states(pid) - set("TZ"):
            time.sleep(0.001)
        if half_written(ground, name):
            return
        os.kill(pid, signal.SIGCONT)


def states(pid):
    """Of a process's threads: T where it stands still."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            found.add(path.read_text().rpartition(")")[2].split()[0])
    return found


def assert_few_redone(reached, restarts, every):
    """Each start goes on from the last save that had begun when the one before was killed, or the one before.

    A save begins when the last one is committed, and a row behind it is written when it has begun. So where
    it was committed at most one interval is redone, and never more than two.

    reached: the last row of each start that was killed. restarts: the steps that the next ones went on from.
    """
    for rows, step in zip(reached, restarts, strict=True):
        begun = (rows - 1) // every * every
        assert max(0, begun - every) <= step <= rows, (rows, step)


def restarts(ground, name):
    manifest = json.loads((ground.run(name) / "manifest.json").read_text())
    return [start["step"] for start in manifest["restarts"]]


def assert_same_run(ground, name, other):
    rows, wanted = ground.rows(name), ground.rows(other)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert rows == wanted  # losses, norms, tokens and evaluations to the last bit, in order
    ours, theirs = ground.record(name, STEPS), ground.record(other, STEPS)
    assert ours["digests"] == theirs["digests"]
    assert any(key.startswith("opt_state.") for key in ours["digests"])
    assert (ours["data"], ours["tokens"]) == (theirs["data"], theirs["tokens"])


@pytest.fixture(scope="module")
def undisturbed(ground):
    finish(ground.start("undisturbed", *LENGTH))
    return "undisturbed"


def test_killed_twice_in_a_row_ends_bitwise_as_undisturbed(ground, undisturbed):
    rng = random.Random(2)
    reached = [
        kill_at_row(ground, "killed", rng.randrange(5, 9), *LENGTH),
        kill_in_a_save(ground, "killed", rng.randrange(10, 14), *LENGTH),
        kill_at_row(ground, "killed", rng.randrange(16, 24), *LENGTH),
    ]
    assert training_rows(ground, "killed") < STEPS
    out, _ = finish(ground.start("killed", *LENGTH))
    assert_same_run(ground, "killed", undisturbed)
    assert_few_redone(reached, restarts(ground, "killed"), every=4)
    assert not half_written(ground, "killed")
    assert "held-out" in out


def test_streaming_killed_ends_bitwise_as_undisturbed(ground):
    words = (*LENGTH, "data.mode=streaming")
    finish(ground.start("stream", *words))
    reached = kill_at_row(ground, "stream_killed", random.Random(3).randrange(6, 14), *words)
    finish(ground.start("stream_killed", *words))
    assert_same_run(ground, "stream_killed", "stream")
    assert_few_redone([reached], restarts(ground, "stream_killed"), every=4)


def test_a_full_disk_is_one_line_and_status_1_and_the_command_goes_on_when_there_is_room(ground, undisturbed):
    """No file may grow beyond 30 kB, as on a full disk: the rows of the metrics fit, the arrays do not.

    What becomes of executables there is a law of the compile cache (`test_compile_cache.py`).
    """
    _, err = finish(ground.start("full", *LENGTH, largest_file=30_000), status=1)
    assert err.startswith("error: ") and "could not be written" in err and err.count("\n") == 1
    finish(ground.start("full", *LENGTH))
    assert_same_run(ground, "full", undisturbed)


def test_a_notice_loses_no_step_and_the_same_command_goes_on(ground, undisturbed):
    """Ctrl-C, then what a scheduler sends: status 75, and every step that has a row is in the checkpoint."""
    for number, row in ((signal.SIGINT, 5), (signal.SIGTERM, 14)):
        process = ground.start("noticed", *LENGTH)
        wait_until(process, lambda row=row: training_rows(ground, "noticed") >= row)
        with pytest.raises(ValueError, match="in use by another process"):
            open_run({}, ground.run("noticed"))
        process.send_signal(number)
        out, err = finish(process, status=75)
        step = max(int(p.name) for p in (ground.run("noticed") / "checkpoints").iterdir())
        name = signal.Signals(number).name
        assert err == f"stopped: {name}; saved at step {step}, from where the same command goes on\n"
        assert f"{name}: saving after this step" in out
        assert training_rows(ground, "noticed") == step < STEPS
    finish(ground.start("noticed", *LENGTH))
    assert_same_run(ground, "noticed", undisturbed)
