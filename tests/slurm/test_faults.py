"""What a cluster does to a run, done to it by a real Slurm: it finishes by itself, as if nothing had been.

All jobs are submitted at once and go on side by side, since most of their time is waiting.
"""

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from artifacts.checkpoints.record import state_digest
from tests.slurm.jobs import STARTED, STEPS, client, submit

pytestmark = pytest.mark.slurm
PAUSE = 0.06  # seconds a step, so that half a minute falls into the middle of a run
NO_SAVES = "checkpoint.every=100000"  # but the last, and what a notice to leave asks for
EVERY = 100  # steps between saves where no notice comes


def reference(ground, paced, slurm):
    return submit(ground, paced, "reference", NO_SAVES)


def requeued(ground, paced, slurm):
    """By hand: `scontrol requeue`."""
    run = submit(ground, paced, "requeued", NO_SAVES, pause=PAUSE).at_step(20)
    client("scontrol", "requeue", run.job)
    return run.again()


def limited(ground, paced, slurm):
    """At the time limit, lowered in mid-run so that the test does not wait for a longer one.

    Slurm looks twice a minute, so that the notice comes up to 30 s before the 5 that are asked for.
    """
    run = submit(ground, paced, "limited", NO_SAVES, pause=3 * PAUSE).at_step(20)
    minutes = -(-(run.seconds() + 45) // 60)
    client("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    return run.again("TimeLimit=30")


def preempted(ground, paced, slurm):
    """By a job of a partition that goes first and wants these nodes for itself."""
    place = ("slurm.options=--nodelist=n[3-4]", "slurm.exclusive=true")
    run = submit(ground, paced, "preempted", NO_SAVES, *place, pause=PAUSE).at_step(20)
    rival = ("--partition=urgent", "--nodelist=n[3-4]", "--nodes=2", "--exclusive")
    client("sbatch", *rival, "--output=/dev/null", "--wrap=sleep 1")
    return run.again()


def failed(ground, paced, slurm):
    """By the death of a node's daemon, which is back when the job is to start again."""
    place = "slurm.options=--nodelist=n[5-6]"
    run = submit(ground, paced, "failed", f"checkpoint.every={EVERY}", place, pause=2 * PAUSE)
    run.at_step(EVERY + 20)
    os.kill(int((slurm / "n6.pid").read_text()), signal.SIGKILL)
    run.until(lambda: run.state() != "RUNNING")
    with (slurm / "n6.again.out").open("wb") as log:
        daemon = subprocess.Popen(["slurmd", "-D", "-N", "n6"], stdin=log, stdout=log, stderr=log)
    STARTED.append(daemon)
    return run.again()


def killed(ground, paced, slurm):
    """Process 0 and then process 1, by SIGKILL."""
    run = submit(ground, paced, "killed", f"checkpoint.every={EVERY}", pause=2 * PAUSE, starts=2)
    for number in (0, 1):
        run.at_step((number + 1) * EVERY + 30)
        os.kill(run.task(number), signal.SIGKILL)
        run.again()
        LOST.append(run.rows_before)
    return run


def stopped(ground, paced, slurm):
    """Process 1 stands still, so that its peer waits for it without a word from anybody."""
    words = (f"checkpoint.every={EVERY}", "guard.stall_seconds=15")
    run = submit(ground, paced, "stopped", *words, pause=2 * PAUSE).at_step(EVERY + 30)
    os.kill(run.task(1), signal.SIGSTOP)
    return run.again()


FAULTS = (requeued, limited, preempted, failed, killed, stopped)
LOST: list[int] = []  # rows that the starts of `killed` had come to


@pytest.fixture(scope="module")
def runs(ground, paced, slurm):
    """Every run, ended, by name, with the exit status of scripts/slurm.py."""
    with ThreadPoolExecutor() as pool:
        first = reference(ground, paced, slurm)
        first.at_step(1)  # so that data and executables are there for the others
        tasks = {fault.__name__: pool.submit(fault, ground, paced, slurm) for fault in FAULTS}
        made = {"reference": first, **{name: task.result() for name, task in tasks.items()}}
        return {name: (run, run.end()) for name, run in made.items()}


def restarts(ground, name):
    manifest = json.loads((ground.run(name) / "manifest.json").read_text())
    return [start["step"] for start in manifest["restarts"]]


@pytest.mark.parametrize("name", [fault.__name__ for fault in FAULTS])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(ground, runs, name):
    run, status = runs[name]
    assert status == 0, (run.seen, run.log)
    assert "PENDING" in run.seen
    digest, wanted = (state_digest(ground.record(n, STEPS)) for n in (name, "reference"))
    assert digest == wanted
    rows, same = ([r for r in ground.rows(n) if "loss" in r] for n in (name, "reference"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # each exactly once
    assert rows == same


@pytest.mark.parametrize("name", ["requeued", "limited", "preempted"])
def test_nothing_is_done_again_after_a_notice_to_leave(ground, runs, name):
    """Every step that had a row when the job was to start again is in the checkpoint that it went on from."""
    run, _ = runs[name]
    assert restarts(ground, name) == [run.rows_before]
    assert 20 <= run.rows_before < STEPS
    said = "SIGUSR1" if name == "limited" else "SIGTERM"
    assert f"stopped: {said}; saved at step {run.rows_before}" in run.log


def test_of_a_failed_node_at_most_the_steps_since_the_last_save_are_done_again(ground, runs):
    run, _ = runs["failed"]
    [step] = restarts(ground, "failed")
    assert EVERY <= step < STEPS
    assert run.rows_before - step < EVERY


def test_killed_processes_cost_at_most_the_steps_since_the_last_save(ground, runs):
    """And the job comes back by itself, whichever process it was."""
    steps = restarts(ground, "killed")
    assert all(0 < rows - step < EVERY for rows, step in zip(LOST, steps, strict=True)), (LOST, steps)


def test_a_stopped_process_is_given_up_within_the_bound_and_stacks_are_kept(ground, runs):
    run, _ = runs["stopped"]
    [step] = restarts(ground, "stopped")
    assert run.rows_before - step < EVERY
    assert "no progress in 15 s" in run.log
    assert "training/loop.py" in (ground.run("stopped") / "stacks/process0.txt").read_text()
