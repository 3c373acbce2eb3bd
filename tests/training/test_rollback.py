"""Taken back to before the trouble and past its batches, exactly, whatever crashes on the way."""

import json

import numpy as np
import pytest

import training.loop
from common.errors import RunFault
from data.loading.loader import Loader
from tests.training.ground import make_ground
from tests.training.test_processes import finish, job
from training.loop import fit
from training.safety.rollback import MOST, in_a_row
from training.safety.skip_updates import undone

RUN = (
    *("model.num_layers=1", "model.d_model=32", "model.d_ff=32", "schedule=constant", "eval.every=50"),
    *("schedule.warmup_steps=1", "training.num_steps=14", "checkpoint.every=4", "guard.max_skips=3"),
)
BACK = (*RUN, "guard.rollback_batches=7")
STREAM = ("data.mode=streaming",)


@pytest.fixture
def order(monkeypatch):
    """What the data says of batch k: a function that a test may replace, given (batch, k)."""
    change = {"batch": lambda batch, number: batch, "number": lambda number: number}
    real, streamed = Loader._cached, Loader._streamed

    def cached(self, number, rows):
        return change["batch"](real(self, change["number"](number), rows), number)

    def in_order(self, number, rows):
        return change["batch"](streamed(self, number, rows), number)

    monkeypatch.setattr(Loader, "_cached", cached)
    monkeypatch.setattr(Loader, "_streamed", in_order)
    return change


def poison(*numbers):
    def change(batch, number):
        if number in numbers:
            batch["loss_weights"][:] = np.nan
        return batch

    return change


def manifest(ground, name):
    return json.loads((ground.run(name) / "manifest.json").read_text())


def steps(ground, name):
    return [row["step"] for row in ground.rows(name) if "loss" in row]


@pytest.fixture(scope="module")
def wanted(ground):
    """The run whose data leave out batches 4 to 10, and never were bad."""
    with pytest.MonkeyPatch.context() as patch:
        real = Loader._cached
        patch.setattr(Loader, "_cached", lambda self, k, rows: real(self, k if k < 4 else k + 7, rows))
        assert fit(ground.config("left_out", *RUN)) == 0
    return ground.rows("left_out"), ground.record("left_out", 14)["digests"]


def assert_as_wanted(ground, name, wanted):
    rows, digests = wanted
    assert ground.rows(name) == rows  # every step once, and none of what was undone
    assert ground.record(name, 14)["digests"] == digests
    assert steps(ground, name) == list(range(1, 15))
    reason = "the loss is not finite"
    entry = {"at_step": 9, "to_step": 4, "batches": 7, "reason": reason}
    assert manifest(ground, name)["rollbacks"] == [entry] == ground.record(name, 14)["rollbacks"]


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_that_is_taken_back_is_the_run_that_never_saw_those_batches(ground, order, wanted, capsys):
    order["batch"] = poison(6, 7, 8)
    assert fit(ground.config("back", *BACK)) == 0
    assert_as_wanted(ground, "back", wanted)
    said = "3 updates in a row were skipped: the loss is not finite, loss=nan at step 9; going on from step 4"
    assert said + " without the next 7 batches" in capsys.readouterr().out
    assert ground.summary("back")["rollbacks"] == 1


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("place", ["forget_after", "reload"])
def test_a_crash_in_the_middle_of_it_changes_nothing(ground, order, wanted, monkeypatch, place):
    """Behind the manifest, before or after undone checkpoints are gone; one of step 8 was made in time."""
    name = f"back_{place}"
    order["batch"] = poison(6, 7, 8)
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "may_wait", lambda job: False)  # so that there is something to undo
        crash(patch, place)
        with pytest.raises(Crash):
            fit(ground.config(name, *BACK))
    there = {p.name for p in (ground.run(name) / "checkpoints").iterdir()}
    assert there == ({"4", "8"} if place == "forget_after" else {"4"})
    assert fit(ground.config(name, *BACK)) == 0
    assert_as_wanted(ground, name, wanted)
    assert fit(ground.config(name, *BACK)) == 0


class Crash(Exception):
    pass


def crash(patch, place):
    from artifacts.checkpoints.manager import Checkpoints

    def fall(*args):
        raise Crash

    patch.setattr(Checkpoints, place, fall)


@pytest.mark.faults
@pytest.mark.slow
def test_a_stream_is_read_past_the_batches_and_goes_on_exactly(ground, order):
    order["batch"] = poison(6, 7, 8)
    assert fit(ground.config("stream_back", *BACK, *STREAM)) == 0
    order["batch"] = poison()
    with pytest.MonkeyPatch.context() as patch:
        real = Loader.batch

        def batch(self, step, rows=None):
            if step == 4:
                for number in range(4, 11):
                    self._stream.batch(number, rows)
            self._leaps = [(4, 7)]
            return real(self, step, rows)

        patch.setattr(Loader, "batch", batch)
        assert fit(ground.config("stream_left_out", *RUN, *STREAM)) == 0
    assert ground.rows("stream_back") == ground.rows("stream_left_out")
    ours, theirs = (ground.record(name, 14) for name in ("stream_back", "stream_left_out"))
    assert (ours["digests"], ours["data"]) == (theirs["digests"], theirs["data"])


@pytest.mark.faults
@pytest.mark.slow
def test_rollbacks_that_get_no_further_end_the_run(ground, order):
    order["batch"] = poison(*range(6, 100))
    with pytest.raises(RunFault, match=f"{MOST} rollbacks got no further; .*optim.learning_rate"):
        fit(ground.config("no_further", *BACK))
    assert len(manifest(ground, "no_further")["rollbacks"]) == MOST


def test_rollbacks_count_in_a_row_until_one_gets_further():
    def entry(at, to):
        return {"at_step": at, "to_step": to}

    assert in_a_row([entry(9, 4)]) == 1
    assert in_a_row([entry(9, 4), entry(8, 4), entry(12, 8)]) == 3
    assert in_a_row([entry(9, 4), entry(8, 4), entry(20, 12)]) == 1


def test_a_checkpoint_is_undone_by_later_rollbacks_alone():
    entries = [{"to_step": 4}, {"to_step": 10}]
    assert undone(8, 0, entries) and not undone(8, 1, entries) and undone(11, 1, entries)
    assert not undone(11, 2, entries) and not undone(4, 0, entries)


def test_a_loader_leaves_batches_out_and_counts_what_it_read(tmp_path):
    from data.pipeline import prepare

    ground = make_ground(tmp_path)
    config = ground.config("rows")
    prepared = prepare(config.data, config.tokenizer, progress=False)
    plain, leaping = (Loader(prepared, config.data, global_batch_size=2, seed=0) for _ in range(2))
    leaping.leave_out(4, 7)
    leaping.leave_out(6, 2)
    for step, number in {3: 3, 4: 11, 5: 12, 6: 15, 9: 18}.items():
        np.testing.assert_array_equal(leaping.batch(step)["tokens"], plain.batch(number)["tokens"])
    leaping.leave_out(5, 1)  # taken back further: what was left out behind it counts no more
    assert [leaping.left_out(step) for step in (3, 4, 5, 6)] == [0, 7, 8, 8]


@pytest.mark.faults
@pytest.mark.slow
def test_two_processes_skip_go_back_and_end_together(ground):
    """A learning rate at which nothing helps: each process has the same verdict at the same step."""
    words = ("optim.learning_rate=1e30", "optim.weight_decay=0", "schedule.warmup_steps=0")
    back = (
        "training.num_steps=40",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "guard.max_skips=3",
        "guard.rollback_batches=4",
    )
    _, err = finish(job(ground, 2, "both", *words, *back), 1)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and f"{MOST} rollbacks got no further" in lines[0], err
    entries = manifest(ground, "both")["rollbacks"]
    assert [(entry["at_step"], entry["to_step"]) for entry in entries] == [(4, 1)] * MOST
    assert steps(ground, "both") == [1, 2, 3, 4, 5]  # the one under way when the last trouble was read
