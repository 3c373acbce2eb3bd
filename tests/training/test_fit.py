"""The whole loop in this process: what is compiled, what is written, and from where it goes on."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass

import jax
import numpy as np
import pytest
import yaml

import training.loop
import training.program
import training.setup
from artifacts.checkpoints.digest import digests
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import named_leaves
from artifacts.config import CheckpointConfig
from artifacts.exporter import samples
from artifacts.metrics import MetricsLog
from common.errors import RunFault
from common.host import ONE_ORDER
from data.errors import DataError
from data.loading.loader import Loader
from parallel.mesh import build_layout
from tests.training.ground import DROPPED
from training.evaluate import Evaluation
from training.loop import fit
from training.opening.initial_weights import check_further_tokens, find_parent
from training.recorder import Recorder
from training.xla import needed_options

COMPILED = "/jax/core/compile/backend_compile_duration"
WORDS = (
    "training.num_steps=12",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "eval.every=4",
    "schedule=constant",
)


@contextmanager
def compilations(seen):
    """Appends (function, training rows so far) for everything that XLA compiles or takes from its cache."""
    path = []

    def listen(event, _, fun_name="", **__):
        if event == COMPILED:
            rows = MetricsLog.read(path[0]) if path and path[0].exists() else []
            seen.append((fun_name, max((row["step"] for row in rows), default=0)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield path
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def whole(ground):
    """One run on eight devices with everything switched on, and what was compiled for it when."""
    words = (*WORDS, "training.ema_decay=0.5", "checkpoint.average_last=3", "logging.tensorboard=true")
    seen = []
    with compilations(seen) as path:
        path.append(ground.run("whole") / "metrics.jsonl")
        assert fit(ground.config("whole", *words)) == 0
    return words, seen


def test_the_step_compiles_exactly_once(whole):
    names = [name for name, _ in whole[1]]
    assert names.count("jit(train_step)") + names.count("jit_train_step") == 1, names
    assert names.count("jit(eval_step)") + names.count("jit_eval_step") == 1, names


def test_nothing_compiles_once_every_kind_of_step_was_taken(whole):
    """Steps 1 to 4 train, save and evaluate; 12 is the last, after which the averages are made."""
    assert [name for name, rows in whole[1] if 4 < rows < 12] == []


def test_every_step_is_a_row_and_the_average_is_evaluated_beside_the_weights(ground, whole):
    rows = ground.rows("whole")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    evals = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evals] == [4, 8, 12]
    for row in evals:
        assert row["eval/loss_ema"] != row["eval/loss"]
        assert row["eval/bits_per_byte_ema"] > 0
    assert rows[-2]["learning_rate"] > 0 and rows[0]["loss"] > rows[-2]["loss"]


def test_the_summary_holds_the_mean_of_the_last_checkpoints(ground, whole):
    """Evaluated as numpy averages them, through the very program of the run."""
    config = ground.config("whole", *whole[0])
    summary = ground.summary("whole")
    checkpoints = Checkpoints(ground.run("whole") / "checkpoints", CheckpointConfig(), read_only=True)
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "finished", lambda *_: None)
        patch.setattr(training.loop, "finish", lambda job, *_: jobs.append(job) or 0)
        assert fit(config) == 0
    (job,) = jobs
    like = job.setup.program.state.params
    trees = [checkpoints.restore_weights(step, like) for step in (6, 9, 12)]
    mean = jax.tree.map(
        lambda like, *xs: jax.device_put(np.mean([np.asarray(x) for x in xs], axis=0), like.sharding),
        *(like, *trees),
    )
    figures = training.loop.held_out_loss(job.setup, mean)
    assert summary["eval/loss_mean"] == pytest.approx(figures["eval/loss"], rel=1e-6)
    assert summary["eval/loss_mean"] != summary["eval/loss"]


def test_a_finished_run_prints_its_summary_and_trains_no_more(ground, whole, monkeypatch, capsys):
    monkeypatch.setattr(training.loop, "compose", None)  # may not be called
    before = ground.rows("whole")
    assert fit(ground.config("whole", *whole[0])) == 0
    assert "held-out" in capsys.readouterr().out
    assert ground.rows("whole") == before


def test_fewer_steps_than_are_done_are_refused(ground, whole):
    words = [word for word in whole[0] if "num_steps" not in word]
    with pytest.raises(ValueError, match=r"training\.num_steps=7.* at step 12"):
        fit(ground.config("whole", *words, "training.num_steps=7"))


def copy_run(ground, name, new):
    shutil.copytree(ground.run(name), ground.run(new))
    return new


def age(run, config):
    """As an earlier version made it: of every group that has its default somewhere, a key is not there."""
    stored, forgotten = yaml.safe_load((run / "config.yaml").read_text()), 0
    for group, values in stored.items():
        kind = getattr(config, group)
        if not isinstance(values, dict) or not is_dataclass(kind):
            continue
        defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        key = next((k for k, value in defaults.items() if k in values and values[k] == value), None)
        if key is not None:
            del values[key]
            forgotten += 1
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert forgotten >= 10


@DROPPED
def test_a_corrupt_checkpoint_costs_only_the_steps_since_the_one_before(ground, whole, capsys, dropped_reads):
    """In a run of an earlier version, too, which had none of the keys that have come since."""
    name = copy_run(ground, "whole", "damaged")
    age(ground.run(name), ground.config(name, *whole[0]))
    (ground.run(name) / "summary.json").unlink()
    for file in (ground.run(name) / "checkpoints" / "12").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-40])
    assert fit(ground.config(name, *whole[0])) == 0
    assert "quarantined: " in capsys.readouterr().out
    assert (ground.run(name) / "quarantine" / "12" / "REASON").exists()
    assert ground.rows(name) == ground.rows("whole")
    assert ground.record(name, 12)["digests"] == ground.record("whole", 12)["digests"]


MESHES = {"data": ("mesh.data=8",), "one device": ("mesh.data=1",)}
SHARDED = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")


@pytest.fixture(scope="module")
def sharded(ground):
    """Twelve steps on one mesh, and the same run stopped after six."""
    assert fit(ground.config("sharded", *WORDS, *SHARDED)) == 0
    assert fit(ground.config("half", *WORDS, *SHARDED, "training.num_steps=6")) == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_of_one_mesh_goes_on_with_the_same_loss_on_another(ground, sharded, monkeypatch, mesh):
    """And more steps than at first: the constant schedule is open-ended."""
    name = copy_run(ground, "half", f"half_on_{mesh.replace(' ', '_')}")
    if mesh == "one device":
        monkeypatch.setattr(training.setup, "build_layout", lambda m, _: build_layout(m, jax.devices()[:1]))
    assert fit(ground.config(name, *WORDS, *MESHES[mesh])) == 0
    rows, wanted = ([r for r in ground.rows(n) if "loss" in r] for n in (name, "sharded"))
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[:6] == wanted[:6]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in rows], [r[key] for r in wanted], rtol=1e-5)
    assert ground.record(name, 6)["digests"] == ground.record("sharded", 6)["digests"]


class Begun(Exception):
    """Stops `fit` where the first step would be."""


def state_at_start(config):
    """What the loop would begin with; the run is left as a SIGKILL before its first checkpoint leaves it."""
    found = []

    def stop(job, state, first, notices, stack):
        found.append((jax.device_get(state), first))
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "train", stop)
        with pytest.raises(Begun):
            fit(config)
    return found[0]


def params_digests(params):
    return digests({f"params.{name}": jax.numpy.asarray(x) for name, x in named_leaves(params).items()})


def of_params(record):
    return {name: d for name, d in record["digests"].items() if name.startswith("params.")}


def test_init_from_takes_the_weights_and_nothing_else(ground, sharded):
    copy_run(ground, "half", "parent")
    words = (
        "init_from=parent",
        "schedule=cosine",
        "training.num_steps=4",
        "seed=5",
        "schedule.warmup_steps=2",
    )
    state, first = state_at_start(ground.config("child", *words))
    assert first == 0 and int(state.step) == 0
    assert params_digests(state.params) == of_params(ground.record("parent", 6))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    manifest = json.loads((ground.run("child") / "manifest.json").read_text())
    assert manifest["parent"]["step"] == 6 and len(manifest["parent"]["digest"]) == 64

    # The parent trains on; the child, killed before its first checkpoint, still begins where it began.
    assert fit(ground.config("parent", *WORDS, *SHARDED, "training.num_steps=9")) == 0
    again, _ = state_at_start(ground.config("child", *words))
    assert params_digests(again.params) == params_digests(state.params)
    assert fit(ground.config("child", *words)) == 0
    rows = [row for row in ground.rows("child") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["tokens"] <= 8 * 32  # its own count
    assert rows[-1]["learning_rate"] < rows[1]["learning_rate"]  # its own schedule


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("init_from=nobody",), "init_from=nobody is no run, no checkpoint and no published model"),
        (("init_from=half", "model.d_ff=64"), "params.* there and .* in this config"),
        (("init_from=half", "tokenizer=bpe", "tokenizer.vocab_size=300"), "tokenizer=file tokenizer.path="),
    ],
    ids=["unknown", "other shape", "other tokenizer"],
)
def test_a_parent_that_does_not_fit_is_one_line_and_nothing_is_written(ground, sharded, words, message):
    with pytest.raises(ValueError, match=message) as error:
        fit(ground.config("orphan", *words))
    assert "\n" not in str(error.value)
    assert not ground.run("orphan").exists()


def test_layers_for_further_tokens_go_on_with_the_stream_they_learnt_from(ground, sharded):
    """A parent from before there was a key for it read the stream before the final norm."""
    copy_run(ground, "half", "old")
    path = ground.run("old") / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    stored["model"]["mtp"] = {"depth": 1, "weight": 0.1}
    path.write_text(yaml.safe_dump(stored))
    words = ("init_from=old", "model.mtp.depth=1")
    with pytest.raises(ValueError, match="use model.mtp.normed_stream=false") as error:
        fit(ground.config("orphan", *words))
    assert "\n" not in str(error.value) and not ground.run("orphan").exists()
    same = ground.config("orphan", *words, "model.mtp.normed_stream=false")
    check_further_tokens(find_parent(same), same.model.mtp)
    path.unlink()
    with pytest.raises(ValueError, match="config.yaml cannot be read .* choose another init_from="):
        fit(ground.config("orphan", *words))


def test_a_diverging_run_stops_and_saves_nothing_of_it(ground):
    words = (*WORDS, "optim.learning_rate=1e30", "schedule.warmup_steps=0", "checkpoint.every=1")
    with pytest.raises(RunFault, match=r"(loss|grad_norm)=\S+ at step"):
        fit(ground.config("diverging", *words, "optim.weight_decay=0"))
    rows = ground.rows("diverging")
    newest = max(int(p.name) for p in (ground.run("diverging") / "checkpoints").iterdir())
    assert newest < rows[-1]["step"]


def test_the_time_of_a_run_is_told_apart_and_adds_up(ground, whole):
    goodput = ground.summary("whole")["goodput"]
    categories = goodput["categories"]
    assert {"initialization", "compilation", "steps", "input_wait", "evaluation", "checkpoints"} <= set(
        categories
    )
    assert min(categories.values()) >= 0 and sum(categories.values()) == pytest.approx(goodput["seconds"])
    timed = MetricsLog.read(ground.run("whole") / "metrics.jsonl")
    steps = sum(row["step_seconds"] for row in timed if "loss" in row)
    # Two clocks, read one behind the other: on a busy machine others come in between.
    assert categories["steps"] + categories["input_wait"] == pytest.approx(steps, rel=0.01, abs=0.1)


def test_the_last_evaluation_is_not_done_twice(ground, sharded, monkeypatch):
    count = []
    monkeypatch.setattr(training.loop, "evaluate", lambda *args: count.append(args) or {"eval/loss": 1.0})
    assert fit(ground.config(copy_run(ground, "half", "evaluated"), *WORDS, "training.num_steps=7")) == 0
    assert len(count) == 1 and ground.summary("evaluated")["eval/loss"] == 1.0


def test_a_gradient_that_is_not_finite_is_a_fault_even_where_the_loss_is_sound(tmp_path):
    class Quiet:
        def update(self, row):
            pass

        def mfu(self, _):
            return {}

    log = MetricsLog.open(tmp_path / "metrics.jsonl")
    recorder = Recorder(log, Quiet(), Quiet(), None, tokens=0, every=1)
    recorder.push(1, {"loss": 2.0, "grad_norm": float("inf"), "learning_rate": 0.1, "tokens": 8}, 0.0)
    with pytest.raises(RunFault, match="grad_norm=inf at step 1"):
        recorder.flush()
    log.close()


def test_bad_data_in_mid_run_is_a_fault_of_the_run_and_not_of_the_command(ground, monkeypatch):
    real = Loader.batch

    def batch(self, step, rows=None):
        if step == 5:
            raise DataError("record 7 of train.array_record is damaged")
        return real(self, step, rows)

    monkeypatch.setattr(Loader, "batch", batch)
    with pytest.raises(RunFault, match="record 7"):
        fit(ground.config("bad_data", *WORDS))
    assert [row["step"] for row in ground.rows("bad_data") if "loss" in row][:3] == [1, 2, 3]
    monkeypatch.undo()
    assert fit(ground.config("bad_data", *WORDS)) == 0  # the lock is free and the run goes on
    assert [row["step"] for row in ground.rows("bad_data") if "loss" in row] == list(range(1, 13))


def test_deterministic_asks_the_gpu_compiler_and_is_recorded(ground):
    wanted = needed_options(True, "gpu")
    assert wanted and needed_options(False, "gpu") == {} == needed_options(True, "cpu")
    add = jax.jit(lambda x: x + 1).lower(1.0)
    add.compile(wanted)  # XLA knows the name: it refuses others
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        add.compile({f"{next(iter(wanted))}_": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.program, "needed_options", lambda on, *_: needed_options(on, "gpu"))
        state_at_start(ground.config("deterministic", "deterministic=true"))
    manifest = json.loads((ground.run("deterministic") / "manifest.json").read_text())
    assert manifest["compiler_options"] == {**ONE_ORDER, **wanted} and manifest["deterministic"] is True


def test_a_second_evaluation_is_one_line_and_reaches_every_reader(ground, monkeypatch, capsys):
    """Rows, curves, a line, the series of a scrape and the summary take a figure that none of them knows."""
    first, probe = training.loop.evaluations, Evaluation(2, lambda params: {"probe/answer": 42.0})
    monkeypatch.setattr(training.loop, "evaluations", lambda setup: (*first(setup), probe))
    recorders = []
    begin = Recorder.start_clock
    monkeypatch.setattr(Recorder, "start_clock", lambda self: recorders.append(self) or begin(self))
    words = ("training.num_steps=5", "eval.every=4", "checkpoint.every=5", "logging.tensorboard=true")
    assert fit(ground.config("probed", *words)) == 0
    rows = [row for row in ground.rows("probed") if "loss" not in row]
    assert [(row["step"], "eval/loss" in row, row["probe/answer"]) for row in rows] == [
        (2, False, 42.0), (4, True, 42.0), (5, True, 42.0)
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "at step 2: probe/answer 42" in out and re.search(r"measured +probe/answer 42", out)
    assert ("probe/answer", 42.0) in [(label, value) for _, label, value in samples(recorders[-1], 5)]
    events = (ground.run("probed") / "tensorboard").glob("events*")
    assert any(b"probe/answer" in path.read_bytes() for path in events)
    assert ground.summary("probed")["probe/answer"] == 42.0
