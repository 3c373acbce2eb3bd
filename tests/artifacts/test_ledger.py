"""Every second of a run's life is in one category, over kills and restarts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from artifacts.ledger import (
    CATEGORIES,
    NAME,
    STEPPING,
    Ledger,
    account,
    account_of_run,
    last_step,
    read_starts,
)
from artifacts.metrics import MetricsLog
from common.host import process_began
from scripts import goodput
from tests.training.ground import ROOT
from tests.training.test_resume import assert_few_redone

DEADLINE = 240  # seconds; only a hang takes so long


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, patch):
        self.now = 1e9
        patch.setattr("artifacts.ledger.time.time", lambda: self.now)
        patch.setattr("artifacts.ledger.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_time_goes_to_the_innermost_category_and_adds_up(clock):
    ledger = Ledger(began=clock.now - 3)
    with ledger.during("samples"):
        clock.now += 5
        with ledger.during("evaluation"):
            clock.now += 7
        clock.now += 11
    clock.now += 13
    assert ledger.seconds() == {"initialization": 16, "samples": 16, "evaluation": 7}
    with pytest.raises(AssertionError, match="lunch"):
        ledger.enter("lunch")


def test_a_wait_is_taken_out_of_its_step_and_a_step_done_before_is_redone(clock):
    ledger = Ledger()
    ledger.reached = 2
    ledger.enter(STEPPING)
    for step in (1, 2, 3):
        clock.now += 10
        ledger.waited(1 if step < 3 else 99)  # a prefetched batch's wait cannot be longer than the step
        clock.now += 1
        ledger.stepped(step, skipped=step == 3)
    clock.now += 4
    assert ledger.seconds() == {
        **{"initialization": 0, "unfinished_step": 4, "input_wait": 12, "redone_steps": 20, "steps": 1}
    }
    assert (ledger.redone, ledger.skipped, ledger.step, ledger.reached) == (2, 1, 3, 3)


def test_a_compilation_is_taken_out_of_what_needed_it_also_where_it_is_told_late(clock):
    ledger, compiled = Ledger(), [0.0]
    ledger.compiling = lambda: compiled[0]
    with ledger.during("samples"):
        for _ in range(4):  # beats in between
            clock.now += 5
            ledger.seconds()
        compiled[0] = 18.0
    with ledger.during("compilation"):
        clock.now += 3
        compiled[0] += 2
    clock.now += 1
    assert ledger.seconds() == {"initialization": 1, "samples": 2, "compilation": 21}


def killed(ledger):
    """The account as a kill leaves it: no last row."""
    ledger._leaving.set()
    ledger._thread.join()
    os.close(ledger._fd)


def log_to(tmp_path, first, last):
    log = MetricsLog.open(tmp_path / "metrics.jsonl", resume_step=first)
    for step in range(first + 1, last + 1):
        log.write({"step": step, "loss": 1.0})
    log.close()


def test_killed_starts_are_accounted_for_from_their_last_rows(tmp_path, clock):
    """0 to 10, killed; from 5 to 7, killed; from 5 to the end: 2 + 5 redone though no beat has said so."""
    began = clock.now
    for number, (first, last) in enumerate([(0, 10), (5, 7), (5, 12)]):
        ledger = Ledger(began=clock.now)
        clock.now += 2
        ledger.open(tmp_path, first)
        log_to(tmp_path, first, last)
        ledger.enter(STEPPING)
        clock.now += 30
        if number == 2:
            for step in range(first + 1, last + 1):
                ledger.stepped(step)
            ledger.leave(None, None, None)
        else:
            ledger.beat()
            killed(ledger)
            with (tmp_path / NAME).open("ab") as torn:
                torn.write(b'{"start": 1, "event": "be')
        clock.now += 100
    total = account_of_run(tmp_path)
    assert (total.starts, total.redone) == (3, 7)
    assert total.wall == pytest.approx(clock.now - 100 - began) and set(total.seconds) <= set(CATEGORIES)
    assert total.seconds["downtime"] == pytest.approx(200)
    assert [start.status for start in read_starts(tmp_path / NAME)] == [None, None, 0]
    assert account([]).wall == 0 == last_step(tmp_path / "nothing")


def test_what_a_full_disk_refuses_is_left_out_whole(tmp_path, monkeypatch):
    ledger = Ledger()
    ledger.open(tmp_path, 0)
    real = os.write
    monkeypatch.setattr("artifacts.ledger.os.write", lambda fd, line: real(fd, line[:9]))
    ledger.beat()
    monkeypatch.undo()
    ledger.leave(None, None, None)
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [row["event"] for row in rows if row["event"] != "beat"] == ["begin", "end"]


def test_a_process_knows_when_it_began():
    before = time.time()
    code = "from common.host import process_began; print(process_began())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert before - 0.1 <= float(said.stdout) <= time.time() and process_began() < before


def at_step(process, run, step):
    end = time.monotonic() + DEADLINE
    while last_step(run / "metrics.jsonl") < step:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.faults
def test_the_categories_sum_to_the_wall_time_over_a_kill_and_a_restart(ground, capsys):
    """The wall from the first process's start to the last one's exit, by this process's clock."""
    run = ground.run("lives")
    words = ("training.num_steps=400", "checkpoint.every=50", "eval.every=150", "schedule.warmup_steps=1")
    began = time.time()
    first = ground.start("lives", *words)
    at_step(first, run, 75)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    reached, downtime = last_step(run / "metrics.jsonl"), time.time()
    assert goodput.main(["lives", f"runs={ground.path}/runs"]) == 0
    assert "killed, or still running" in capsys.readouterr().out
    time.sleep(3)
    downtime = time.time() - downtime
    second = ground.start("lives", *words)
    out, err = second.communicate(timeout=DEADLINE)
    wall = time.time() - began
    assert second.returncode == 0, err
    total = account_of_run(run)
    saved = read_starts(run / NAME)[1].begin["first"]
    assert total.wall == pytest.approx(wall, rel=0.01)
    assert total.seconds["other"] < 0.01 * wall
    assert total.redone == reached - saved > 0 and total.starts == 2
    assert_few_redone([reached], [saved], every=50)
    assert total.seconds["downtime"] == pytest.approx(downtime, abs=2.5)  # and what had no beat any more
    assert f"over 2 starts, {total.redone} steps redone" in out
    assert goodput.main(["lives", f"runs={ground.path}/runs"]) == 0
    said = capsys.readouterr().out
    assert f"start 1: from step 0 to {reached} in" in said and f"{total.redone} steps redone" in said
