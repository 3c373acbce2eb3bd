"""A run that crashes at every start stops being started."""

import json

import pytest

import training.loop
from artifacts.directory import RunDirectory
from common.errors import RunFault
from training.loop import fit

RUN = (
    *("model.num_layers=1", "model.d_model=32", "model.d_ff=32", "schedule=constant", "eval.every=50"),
    *("schedule.warmup_steps=1", "training.num_steps=6", "checkpoint.every=2", "run.max_restarts=2"),
)


class Crash(Exception):
    pass


def idle(*steps, now):
    """Starts without progress, the one at `now` the last; None where it is allowed."""
    run = RunDirectory("runs/x", {})
    run._manifest = {"restarts": [{"step": step} for step in steps]}
    try:
        run.check_restarts(now, 2)
    except RunFault as fault:
        return str(fault)
    return None


def test_starts_count_that_got_no_further_than_the_one_before():
    assert idle(now=0) is None and idle(0, now=0) is None
    assert idle(0, 0, now=0) == (
        "runs/x was restarted 3 times from step 0 and never got to a newer checkpoint; see why they ended, "
        "then go on with run.max_restarts=5"
    )
    assert idle(0, 0, now=4) is None and idle(4, 4, now=4) is None and idle(4, 4, 4, now=4)
    assert idle(4, 4, 6, 6, now=6) is None  # every save begins the count anew
    assert idle(8, 4, 6, now=8) is None  # and so does what was redone after a rollback


@pytest.mark.faults
@pytest.mark.slow
def test_a_crash_loop_ends_and_the_same_run_goes_on_when_it_may(ground, monkeypatch):
    def crash(job, step):
        if step == 4:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "in_trouble", crash)
        for _ in range(4):  # the first start, the one that goes on from step 2, and two that do no better
            with pytest.raises(Crash):
                fit(ground.config("loops", *RUN))
        with pytest.raises(RunFault, match="restarted 3 times from step 2 .* run.max_restarts=5") as fault:
            fit(ground.config("loops", *RUN))
    assert fault.value.status == 1
    restarts = json.loads((ground.run("loops") / "manifest.json").read_text())["restarts"]
    assert [start["step"] for start in restarts] == [2, 2, 2]  # a refused start is none
    assert fit(ground.config("loops", *RUN, "run.max_restarts=5")) == 0
    assert [row["step"] for row in ground.rows("loops") if "loss" in row] == [1, 2, 3, 4, 5, 6]
