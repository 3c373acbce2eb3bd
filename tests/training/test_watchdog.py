"""No progress: stacks of all threads, and the status that has the scheduler start the run again."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.training.ground import ROOT
from tests.training.test_processes import SMALL, at_step, finish, job, rank, steps_done
from tests.training.test_resume import assert_few_redone, half_written, restarts, stop_in_a_save
from training.safety.watchdog import BOUNDS, Watchdog

LONG = ("training.num_steps=2000", "eval.every=2000", "checkpoint.every=5")
HANGS = """
import sys, time
import training.loop
real = training.loop.in_trouble
def stall(job, step):
    if step == 4:
        time.sleep(600)
    return real(job, step)
training.loop.in_trouble = stall
from configs.cli import main
import train
from parallel import processes
from common.errors import RunFault
sys.exit(main(train.train, sys.argv[1:], faults=(RunFault,)))
"""


def test_silence_beyond_the_bound_saves_the_stacks_and_leaves_with_75(tmp_path, capfd):
    left = threading.Event()
    statuses = []

    def leave(status):
        statuses.append(status)
        left.set()

    with Watchdog(0.2, tmp_path, 3, leave=leave) as watchdog:
        watchdog.announce("step 7")
        assert left.wait(20)
    assert statuses == [75]
    text = (tmp_path / "stacks/process3.txt").read_text()
    assert text.startswith("no progress in 0.2 s at step 7\n")
    assert "test_silence_beyond_the_bound" in text and "_watch" in text  # the main thread's stack and its own
    err = capfd.readouterr().err
    assert "stacks/process3.txt; the same command goes on" in err.splitlines()[-1]


def test_progress_and_what_may_take_longer_are_no_silence(tmp_path):
    statuses = []
    with Watchdog(0.4, tmp_path, 0, leave=statuses.append) as watchdog:
        for step in range(20):
            watchdog.announce(f"step {step}")
            time.sleep(0.05)
        watchdog.announce("evaluation")
        time.sleep(0.8)
    with Watchdog(None, tmp_path, 0, leave=statuses.append) as watchdog:
        watchdog.announce("step 1")
        time.sleep(0.1)
    assert not statuses and not (tmp_path / "stacks").exists()
    assert Watchdog(9000, tmp_path, 0)._bound("evaluation") == 9000 > BOUNDS["evaluation"]


def test_a_process_that_was_stopped_itself_does_not_count_that_time(tmp_path):
    """As Ctrl-Z and a laptop's lid do: it goes on, and its watchdog has seen no more than its own ticks."""
    code = f"""
import time
from pathlib import Path
from training.safety.watchdog import Watchdog
with Watchdog(1.5, Path({str(tmp_path)!r}), 0) as watchdog:
    watchdog.announce("step 1")
    print("ready", flush=True)
    input()
print("alive", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate("\n", timeout=60)
    assert (out, process.returncode) == ("alive\n", 0)


def stacks(ground, name):
    return {path.name: path.read_text() for path in (ground.run(name) / "stacks").glob("*.txt")}


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_whose_main_thread_stalls_ends_with_75_and_goes_on(ground):
    words = ground.words("stalls", *SMALL, "checkpoint.every=1", "guard.stall_seconds=6")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, *words],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, err = finish(process, 75)
    # Its bound, a tick, two seconds to flush, and what a busy machine takes to end a process.
    assert time.time() - (ground.run("stalls") / "metrics.jsonl").stat().st_mtime < 6 + 0.5 + 2 + 10
    assert "no progress in 6 s at step 4" in err and "in stall" in stacks(ground, "stalls")["process0.txt"]
    finish(ground.start("stalls", *SMALL, "checkpoint.every=1"))
    assert [row["step"] for row in ground.rows("stalls") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.faults
@pytest.mark.slow
def test_a_stopped_process_ends_the_job_within_the_bound_with_75(ground):
    """No connection breaks and no heartbeat is missed within the bound; the other's watchdog sees it."""
    stopped = job(ground, 2, "stopped", *LONG, "guard.stall_seconds=8")
    at_step(stopped, ground, "stopped", 8)
    os.kill(rank(stopped, 1), signal.SIGSTOP)
    began = time.monotonic()
    _, err = finish(stopped, 75)
    assert time.monotonic() - began < 8 + 40  # and the launcher's patience
    assert "no progress in 8 s" in err and "process0.txt" in stacks(ground, "stopped")


@pytest.mark.slow
def test_a_run_that_a_library_aborts_leaves_the_stacks_of_its_threads_the_main_one_s_too(ground):
    """As JAX aborts every other process where rank 0 is gone."""
    aborted = ground.start("aborted", *SMALL, *LONG)
    at_step(aborted, ground, "aborted", 2)
    aborted.send_signal(signal.SIGABRT)
    _, err = finish(aborted, -signal.SIGABRT)
    assert "Fatal Python error: Aborted" in err and re.search(r"train.py\", line \d+ in <module>", err)


@pytest.mark.faults
@pytest.mark.slow
def test_killed_ranks_rank_0_too_end_the_job_and_it_ends_bitwise_as_undisturbed(ground):
    """Two processes; each rank is killed once, and the same command is started again.

    Rank 0 at a random step; rank 1 in a save, of which its survivor, who commits, lacks a part.
    """
    words = ("training.num_steps=80", "eval.every=80", "checkpoint.every=5", "guard.stall_seconds=30")
    words = (*words, "guard.replica_every=10")  # replicas of two processes do not differ by themselves
    finish(job(ground, 2, "both_lived", *words))
    lost = []
    rng = random.Random(4)
    for number, least in ((0, rng.randrange(6, 20)), (1, rng.randrange(30, 45))):
        killed = job(ground, 2, "killed_in_turn", *words)
        # Rows of the start before are there until this one cuts them: more than those is progress of its own.
        at_step(killed, ground, "killed_in_turn", max(least, *lost, 0) + 1)
        primary, doomed = rank(killed, 0), rank(killed, number)
        if number == 1:
            stop_in_a_save(killed, ground, "killed_in_turn", primary)
        os.kill(doomed, signal.SIGKILL)
        if number == 1:
            os.kill(primary, signal.SIGCONT)
        _, err = finish(killed, 128 + signal.SIGKILL)
        # By the death itself, not by the watchdog. How the survivor ends is a race: JAX aborts it, gloo tells
        # it of a broken connection, and the launcher's patience ends.
        assert f"rank {number} was ended by SIGKILL" in err and "no progress in" not in err
        lost.append(steps_done(ground, "killed_in_turn"))
    finish(job(ground, 2, "killed_in_turn", *words))
    ours, wanted = (ground.record(name, 80) for name in ("killed_in_turn", "both_lived"))
    assert ours["digests"] == wanted["digests"] and ours["data"] == wanted["data"]
    assert ground.rows("killed_in_turn") == ground.rows("both_lived")
    assert_few_redone(lost, restarts(ground, "killed_in_turn"), every=5)
    assert not half_written(ground, "killed_in_turn")
    assert not (ground.run("killed_in_turn") / "quarantine").exists()  # nothing was committed by halves
