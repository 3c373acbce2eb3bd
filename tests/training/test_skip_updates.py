"""Updates that are skipped: to the last bit nothing of them is left, and without any nothing is different."""

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import training.program
from artifacts.checkpoints import record
from common.errors import RunFault
from data.loading.loader import Loader
from models.config import MoEConfig, MTPConfig
from optim.config import AdamWConfig, MuonConfig
from parallel.schedules.accumulate import GradientAccumulation
from tests.parallel.small import make_config, make_program, packed_batch, place
from tests.training.ground import ROOT
from training.config import LocalSGDConfig
from training.loop import fit
from training.program import skipping
from training.safety.skip_updates import ENOUGH, IN_A_ROW, REASONS, SKIPPED, judge, through_empty_batches
from training.state import WINDOW, nothing_seen

TINY = {"num_layers": 2, "d_model": 32, "d_ff": 32, "num_heads": 4, "num_kv_heads": 4}
FAULTS = (pytest.mark.faults, pytest.mark.slow)
MESHES = {
    "data, fsdp and tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, MuonConfig()),
    "pipeline": ({"pipeline": 2, "fsdp": 2}, AdamWConfig()),
}


judged = jax.jit(judge, static_argnums=3)


def seen(losses, norms):
    """The guard's figures after these updates."""
    watched = nothing_seen()
    for loss, norm in zip(losses, norms, strict=True):
        _, watched, _ = judged(watched, np.float32(loss), np.float32(norm), None)
    return watched


def verdict(watched, loss, norm, sigma=6.0):
    taken, after, told = judged(watched, np.float32(loss), np.float32(norm), sigma)
    assert bool(taken) == (told[SKIPPED] == 0)
    return REASONS[int(told[SKIPPED])], after


def test_what_is_not_finite_is_skipped_and_what_lies_six_deviations_above_the_last_updates():
    rng = np.random.default_rng(0)
    losses, norms = 3 + 0.1 * rng.standard_normal(200), 1 + 0.05 * rng.standard_normal(200)
    watched = seen(losses, norms)
    last = losses[-WINDOW:].astype(np.float32)
    limit = last.mean() + 6 * last.std()
    cases = {
        (3.0, 1.0): "taken",
        (limit - 0.01, 1.0): "taken",
        (limit + 0.01, 1.0): "the loss is a spike",
        (3.0, 2.0): "the gradient norm is a spike",
        (0.0, 0.0): "taken",  # far below is no fault
        (np.nan, 1.0): "the loss is not finite",
        (3.0, np.inf): "the gradient is not finite",
    }
    for (loss, norm), wanted in cases.items():
        assert verdict(watched, loss, norm)[0] == wanted, (loss, norm)
    assert verdict(watched, 1e30, 1.0, sigma=None)[0] == "taken"
    few = seen(losses[: ENOUGH - 1], norms[: ENOUGH - 1])
    assert verdict(few, 1e30, 1.0)[0] == "taken"  # too few to compare with
    assert verdict(seen([2.1] * ENOUGH, [1.3] * ENOUGH), 2.1, 1.3)[0] == "taken"  # no deviation at all


def test_a_skipped_update_is_not_remembered_but_counted_until_one_is_taken():
    watched = seen([3.0] * 3, [1.0] * 3)
    _, once = verdict(watched, np.nan, 1.0)
    _, twice = verdict(once, np.nan, 1.0)
    np.testing.assert_array_equal(twice["last"], watched["last"])
    assert np.asarray(twice["counts"]).tolist() == [3, 2]
    assert np.asarray(verdict(twice, 3.0, 1.0)[1]["counts"]).tolist() == [4, 0]


def sequence(count, share, spikes=True):
    """(loss, norm) of batches, a share of which have targets; some are spikes, or not finite."""
    rng = np.random.default_rng(count)
    for number in range(count):
        loss, norm = rng.normal(5, 0.1), rng.normal(2, 0.1)
        if spikes and number % 41 == 40:
            loss = (50.0, np.nan, np.inf)[number % 3]
        yield (loss, norm) if rng.random() < share else (0.0, 0.0)


@pytest.mark.parametrize("share", (1.0, 0.5, 0.05))
def test_batches_without_a_target_leave_no_trace_between_others(share):
    """Nothing is remembered of them, none counts as taken, and none ends a row of skipped updates."""
    batches = list(sequence(400 if share > 0.1 else 3000, share))
    alone = watched = nothing_seen()
    for loss, norm in batches:
        taken, after, told = judged(watched, np.float32(loss), np.float32(norm), 6.0)
        if loss == 0:
            assert bool(taken) and told[SKIPPED] == 0 and told[IN_A_ROW] == watched["counts"][1]
            assert all(np.array_equal(after[name], watched[name]) for name in after)
        else:
            wanted, alone, said = judged(alone, np.float32(loss), np.float32(norm), 6.0)
            assert bool(taken) == bool(wanted) and told == said
        watched = after
    assert all(np.array_equal(watched[name], alone[name]) for name in alone)
    assert alone["counts"][0] > 64


@pytest.mark.parametrize("share", (1.0, 0.1, 0.05, 0.02))
def test_answers_of_about_one_loss_are_no_spikes_however_rare_they_are(share):
    watched = nothing_seen()
    for loss, norm in sequence(1500, share, spikes=False):
        reason, watched = verdict(watched, loss, norm)
        assert reason == "taken", (loss, norm)


def test_a_window_with_batches_without_a_target_in_it_serves_again():
    """As a run has it that began before these were left out, or without `guard.skip_sigma`."""
    losses = [5.0, *([0.0] * 19)] * 10
    watched = seen(losses, losses)
    assert verdict(watched, 5.0, 5.0)[0] == verdict(watched, 50.0, 50.0)[0] == "taken"
    for _ in range(ENOUGH):
        _, watched = verdict(watched, 5.0, 5.0)
    assert verdict(watched, 5.0, 5.0)[0] == "taken"
    assert verdict(watched, 50.0, 5.0)[0] == "the loss is a spike"


@pytest.mark.parametrize("sigma", (None, 6.0))
def test_the_host_counts_skips_in_a_row_through_batches_without_a_target(sigma):
    """Where the step itself does not: it is the same program for a run that compares nothing."""
    nan, zero = (np.nan, np.nan), (0.0, 0.0)
    watched, row, carried, counted = nothing_seen(), 0, 0, []
    for loss, norm in (nan, nan, zero, nan, zero, zero, nan, (3.0, 1.0), zero, nan, nan):
        _, watched, told = judged(watched, np.float32(loss), np.float32(norm), sigma)
        row, carried = through_empty_batches({**told, "loss": loss, "grad_norm": norm}, row, carried)
        counted.append(row)
    assert counted == [1, 2, 2, 3, 3, 3, 4, 0, 0, 1, 2]


SCHEDULES: dict[str, Any] = {
    "one device": {},
    "accumulation": {"accumulation_steps": 4},
    "z-loss, experts and further tokens": {
        "model": {"moe": MoEConfig(num_experts=4, router_z_weight=0.1), "mtp": MTPConfig(depth=1)},
        "z_loss": 0.1,
    },
    **{
        name: {"mesh": {"pipeline": 2}, "pipeline": {"schedule": name}}
        for name in ("gpipe", "1f1b", "zero_bubble")
    },
    "interleaved_1f1b": {
        "mesh": {"pipeline": 2},
        "pipeline": {"schedule": "interleaved_1f1b", "virtual_stages": 2},
        "model": {"num_layers": 4},
    },
    "context": {"mesh": {"context": 2}, "context": {"attention": "ring"}},
    "local sgd": {"mesh": {"replica": 2}},
}


@pytest.mark.parametrize(
    "name", [name if name == "one device" else pytest.param(name, marks=FAULTS) for name in SCHEDULES]
)
def test_a_batch_without_a_target_has_no_loss_and_no_gradient_on_any_schedule(name):
    """Exactly, which is what the guard knows it by."""
    words = {**SCHEDULES[name]}
    config = make_config(words.pop("mesh", None), model=TINY | words.pop("model", {}), **words)
    config.guard.skip_sigma = 6.0
    config.local_sgd = LocalSGDConfig(inner_steps=4) if name == "local sgd" else None
    program = make_program(config)
    train, state = program.compile_train(), program.init_state(0)
    for step in range(2):
        state, _ = train(state, place(program, packed_batch(step)))
    before, batch = arrays(state), packed_batch(2)
    batch["loss_weights"][:] = 0
    state, metrics = train(state, place(program, batch))
    assert not np.any(metrics["loss"]) and not np.any(metrics["grad_norm"]) and not np.any(metrics[SKIPPED])
    after = arrays(state)
    for figure in ("guard.counts", "guard.last"):
        assert before[figure].any() and before[figure].tobytes() == after[figure].tobytes()


def poisoned(program, step):
    batch = packed_batch(step)
    batch["loss_weights"][1, 5] = np.nan
    return place(program, batch)


def arrays(state):
    """Everything of a state by path, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def skip_once(program):
    """The state before and after an update that is not finite, its metrics, and the loss of the next."""
    train, state = program.compile_train(), program.init_state(0)
    for step in range(2):
        state, _ = train(state, place(program, packed_batch(step)))
    before = arrays(state)
    state, metrics = train(state, poisoned(program, 2))
    after, told = arrays(state), jax.device_get(metrics)
    _, metrics = train(state, place(program, packed_batch(3)))
    return before, after, told, jax.device_get(metrics)


@pytest.mark.parametrize(
    ("mesh", "optim"),
    [(None, AdamWConfig()), *(pytest.param(*m, id=name, marks=FAULTS) for name, m in MESHES.items())],
)
def test_after_a_skip_every_number_is_the_same_but_the_steps(mesh, optim):
    config = make_config(mesh, model=TINY, ema_decay=0.9, optim=optim)
    before, after, told, next_one = skip_once(make_program(config))
    steps = {"step", "opt_state.schedule.count"}  # data and learning rate go on
    for name in before.keys() - {"guard.counts"}:
        if name in steps:
            assert after[name] == before[name] + 1 == 3
        else:
            assert before[name].tobytes() == after[name].tobytes(), name
    assert told[SKIPPED] == REASONS.index("the loss is not finite") and told[IN_A_ROW] == 1
    assert next_one[SKIPPED] == 0 and np.isfinite(next_one["loss"])
    assert any(name.startswith("ema.") for name in before)


@pytest.mark.faults
@pytest.mark.slow
def test_an_injected_spike_is_skipped_to_the_last_bit():
    """A finite loss, six deviations above those that the state remembers."""
    config = make_config(model=TINY)
    config.guard.skip_sigma = 6.0
    program = make_program(config)
    train, state = program.compile_train(), program.init_state(0)
    calm = np.random.default_rng(0).normal(1.0, 0.1, (2, WINDOW)).astype(np.float32)
    state = state.replace(guard={"last": calm, "counts": np.array([WINDOW, 0], np.int32)})
    before = arrays(state)
    state, metrics = train(state, place(program, packed_batch(0)))
    assert REASONS[int(metrics[SKIPPED])] == "the loss is a spike" and np.isfinite(metrics["loss"])
    different = {n for n, x in arrays(state).items() if x.tobytes() != before[n].tobytes()}
    assert different == {"step", "opt_state.schedule.count", "guard.counts"}


@pytest.mark.faults
@pytest.mark.slow
def test_a_gradient_alone_that_is_not_finite_is_skipped_to_the_last_bit(monkeypatch):
    """One number of it, in a step whose loss is as good as any."""
    real = GradientAccumulation.value_and_grad

    def overflowed(self, *args):
        means, grads = real(self, *args)
        leaves, structure = jax.tree.flatten(grads)
        leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(np.inf)
        return means, jax.tree.unflatten(structure, leaves)

    monkeypatch.setattr(GradientAccumulation, "value_and_grad", overflowed)
    program = make_program(make_config(model=TINY, ema_decay=0.9))
    state = program.init_state(0)
    before = arrays(state)
    state, metrics = program.compile_train()(state, place(program, packed_batch(0)))
    assert REASONS[int(metrics[SKIPPED])] == "the gradient is not finite" and np.isfinite(metrics["loss"])
    different = {n for n, x in arrays(state).items() if x.tobytes() != before[n].tobytes()}
    assert different == {"step", "opt_state.schedule.count", "guard.counts"}


@pytest.mark.faults
@pytest.mark.slow
def test_a_replica_that_steps_alone_skips_alone():
    config = make_config({"replica": 2}, model=TINY)
    config.local_sgd = LocalSGDConfig(inner_steps=4)
    before, after, told, next_one = skip_once(make_program(config))
    assert told[SKIPPED].tolist() == [1, 0]  # the poisoned row is the first replica's
    changed = {n for n in before if n.startswith(("local.params", "opt_state.direction.mu"))}
    assert changed
    for name in changed:
        assert before[name][0].tobytes() == after[name][0].tobytes(), name
        assert before[name][1].tobytes() != after[name][1].tobytes(), name
    assert after["guard.counts"].tolist() == [[2, 1], [3, 0]]
    assert next_one[SKIPPED].tolist() == [0, 0] and np.isfinite(next_one["loss"]).all()


# In a process of its own: bits are those of a step that is compiled as anybody's, not as the tests' are.
COMPARE = """
import sys
import jax, numpy as np
import training.program
from optim.config import AdamWConfig, MuonConfig
from tests.parallel.small import make_config, make_program, packed_batch, place
from tests.training.test_skip_updates import TINY
from training.config import GuardConfig

made = training.program.make_train_step

def trained(optim, on):
    training.program.make_train_step = lambda *a, guard, **k: made(*a, **k, guard=on)
    program = make_program(make_config(model=TINY, optim=optim, ema_decay=0.9))
    train, state = program.compile_train(), program.init_state(0)
    losses = []
    for step in range(4):
        state, metrics = train(state, place(program, packed_batch(step)))
        losses.append(float(metrics["loss"]))
    weights = [np.asarray(x) for x in jax.tree.leaves((state.params, state.opt_state, state.ema))]
    return losses, weights, train.memory_analysis().temp_size_in_bytes

for optim in (AdamWConfig(), MuonConfig()):
    losses, weights, bytes_ = trained(optim, GuardConfig(skip_sigma=6.0))
    wanted, before, bare = trained(optim, None)
    assert losses == wanted, (optim.name, losses, wanted)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(weights, before, strict=True)), optim.name
    assert bytes_ <= bare + 4096, (bytes_, bare)  # its figures alone, and no copy of the state
"""


@pytest.mark.faults
@pytest.mark.slow
def test_without_a_skip_the_guard_changes_no_bit_and_no_byte():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.faults
@pytest.mark.slow
def test_choosing_as_on_gpus_skips_as_branching_does(monkeypatch):
    """GPUs have the host look at a branch: there old or new is chosen, which is the same to rounding."""
    monkeypatch.setattr(training.program, "skipping", lambda platform, alone: "choose")
    before, after, told, next_one = skip_once(make_program(make_config(model=TINY, ema_decay=0.9)))
    different = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert different == {"step", "opt_state.schedule.count", "guard.counts"}
    assert told[SKIPPED] and np.isfinite(next_one["loss"])
    assert skipping("gpu", alone=False) == "choose"
    assert skipping("cpu", alone=False) == skipping("tpu", alone=False) == "branch"


WORDS = ("model.num_layers=1", "model.d_model=32", "model.d_ff=32", "schedule=constant", "eval.every=50")
RUN = (*WORDS, "schedule.warmup_steps=1", "training.num_steps=14", "checkpoint.every=4")


@pytest.fixture
def poison(monkeypatch):
    """Batches, by the order of the data, that are not finite."""
    bad: set[int] = set()
    real = Loader._cached

    def cached(self, number, rows):
        batch = real(self, number, rows)
        if number in bad:
            batch["loss_weights"][:] = np.nan
        return batch

    monkeypatch.setattr(Loader, "_cached", cached)
    return bad


@pytest.fixture
def emptied(monkeypatch):
    """Batches, by the order of the data, without a target."""
    none: set[int] = set()
    real = Loader._cached

    def cached(self, number, rows):
        batch = real(self, number, rows)
        if number in none:
            batch["loss_weights"][:] = 0
        return batch

    monkeypatch.setattr(Loader, "_cached", cached)
    return none


@pytest.mark.faults
@pytest.mark.slow
def test_batches_without_a_target_do_not_keep_a_run_from_its_end(ground, poison, emptied, capsys):
    """Two of three have none, also the last; of the others the second to fourth are bad."""
    emptied.update(set(range(14)) - set(range(0, 14, 3)))
    assert fit(ground.config("answers", *RUN)) == 0
    rows = losses(ground, "answers")
    assert [step for step, row in rows.items() if row["loss"]] == [1, 4, 7, 10, 13]
    assert ground.summary("answers")["train_loss"] == rows[13]["loss"] > 0
    poison.update({3, 6, 9})
    with pytest.raises(RunFault, match=r"^3 updates in a row were skipped: .* at step 10; "):
        fit(ground.config("bad", *RUN, "guard.max_skips=3", "checkpoint.every=2"))
    kept = sorted(int(p.name) for p in (ground.run("bad") / "checkpoints").iterdir())
    assert kept and max(kept) < 4  # saves wait for an update that is taken


def losses(ground, name):
    return {row["step"]: row for row in ground.rows(name) if "loss" in row}


@pytest.mark.faults
@pytest.mark.slow
def test_rows_say_what_was_skipped_and_a_checkpoint_of_before_guards_goes_on(ground, poison, capsys):
    """Batches 5 and 6 are bad; the checkpoint at step 8 has no figures of the guard."""
    poison.update({5, 6})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "trees_of", without_guard(record.trees_of))
        assert fit(ground.config("skips", *RUN, "training.num_steps=8")) == 0
    rows = losses(ground, "skips")
    assert [step for step, row in rows.items() if row.get("skipped") == 1] == [6, 7]
    assert rows[6]["skip_reason"] == "the loss is not finite" and np.isnan(rows[6]["loss"])
    assert np.isfinite(rows[8]["loss"]) and "skipped" not in rows[8]
    assert "step 7: update skipped, the loss is not finite (loss nan" in capsys.readouterr().out
    assert ground.summary("skips")["skipped_updates"] == 2
    assert not any(name.startswith("guard.") for name in ground.record("skips", 8)["types"])
    assert fit(ground.config("skips", *RUN)) == 0
    assert "the guard begins anew" in capsys.readouterr().out
    assert sorted(losses(ground, "skips")) == list(range(1, 15))
    assert any(name.startswith("guard.") for name in ground.record("skips", 14)["types"])


@pytest.mark.faults
@pytest.mark.slow
def test_a_spike_in_the_data_is_skipped_and_its_row_says_why(ground, monkeypatch):
    """Of the batch of step 70 one token counts: neither loss nor gradient is a mean over many."""
    real = Loader._cached

    def cached(self, number, rows):
        batch = real(self, number, rows)
        if number == 69:
            batch["loss_weights"][:] = 0
            batch["loss_weights"][0, 3] = 1
        return batch

    monkeypatch.setattr(Loader, "_cached", cached)
    words = (*WORDS, "training.num_steps=72", "optim.learning_rate=1e-5", "schedule.warmup_steps=1")
    assert fit(ground.config("spike", *words, "checkpoint.every=50", "guard.skip_sigma=6")) == 0
    rows = losses(ground, "spike")
    assert [step for step, row in rows.items() if "skipped" in row] == [70]
    assert rows[70]["skip_reason"] == "the loss is a spike" and np.isfinite(rows[70]["loss"])
    assert ground.summary("spike")["skipped_updates"] == 1


def without_guard(trees):
    def older(state):
        return {name: tree for name, tree in trees(state).items() if name != "guard"}

    return older


@pytest.mark.faults
@pytest.mark.slow
def test_too_many_skips_in_a_row_end_the_run_and_leave_the_checkpoints_from_before(ground, poison):
    """A save that falls among skipped updates waits for one that is taken; else it would crowd out older."""
    poison.update(range(5, 14))
    words = (*RUN, "guard.max_skips=5", "checkpoint.every=2", "checkpoint.keep=1")
    with pytest.raises(
        RunFault,
        match=r"^5 updates in a row were skipped: the loss is not finite, loss=nan at "
        r"step 10; in a new run.name=, lower .*guard.rollback_batches",
    ):
        fit(ground.config("stuck", *words))
    assert max(losses(ground, "stuck")) == 10
    steps = sorted(p.name for p in (ground.run("stuck") / "checkpoints").iterdir())
    assert steps == ["4"]
    poison.difference_update(range(9, 14))  # the count of skips in a row goes on with the run
    poison.discard(5)
    assert fit(ground.config("stuck", *words)) == 0
    assert [s for s, row in losses(ground, "stuck").items() if "skipped" in row] == [7, 8, 9]
