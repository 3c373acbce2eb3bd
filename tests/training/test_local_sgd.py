"""Replicas that step alone: held to workers that are run one after the other on one device."""

import functools
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifacts.checkpoints.manager import Checkpoints
from artifacts.config import CheckpointConfig
from models.config import MoEConfig
from optim.config import AdamWConfig, SGDConfig
from planner.hlo.program import Reading, parse_module, read_hlo
from tests.parallel import small
from training import local_sgd
from training.config import LocalSGDConfig
from training.local_sgd import decode, encode, host_scalars
from training.program import Program
from training.state import TrainState, shardings

INNER, STEPS, REPLICAS = 3, 6, 2
MODEL = {"num_layers": 4, "d_model": 32, "d_ff": 64, "num_heads": 4, "num_kv_heads": 2}
DECAY = 0.9
PLAIN = {"replica": 2, "fsdp": 2, "tensor": 2}
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"mesh": {"replica": 2, "fsdp": 2}},
    "fsdp_tensor": {"mesh": PLAIN},
    "pipeline": {
        "mesh": {"replica": 2, "pipeline": 2, "fsdp": 2},
        "pipeline": {"schedule": "interleaved_1f1b", "virtual_stages": 2, "microbatches": 2},
    },
    "context": {"mesh": {"replica": 2, "context": 2, "data": 2}, "context": {"attention": "ring"}},
    "expert": {"mesh": {"replica": 2, "expert": 2, "fsdp": 2}, "model": {**MODEL, "moe": "few"}},
}
SLOW = pytest.mark.slow
MOE = MoEConfig(num_experts=4, experts_per_token=2, d_expert=16, load_balance_weight=0.01)


def make_config(mesh, *, inner_steps=INNER, model=None, outer=None, optim=None, **how):
    model = dict(model or MODEL)
    if "moe" in model:
        model["moe"] = MOE
    how.setdefault("ema_decay", DECAY)
    config = small.make_config(mesh, model=model, optim=optim or AdamWConfig(learning_rate=3e-3), **how)
    config.local_sgd = LocalSGDConfig(inner_steps=inner_steps, **(outer or {}))
    return config


@dataclass
class Trace:
    """What some steps left behind: losses [steps, R], and after each outer step what everyone agreed on."""

    losses: np.ndarray
    outer: list[Any]
    ema: list[Any]
    learnt: list[Any]  # each replica's difference just before an outer step, [R, ...]


@functools.cache
def one_worker(experts: bool) -> tuple[Program, Any]:
    """One device that steps on a replica's rows."""
    rows = small.ROWS // REPLICAS
    model = {**MODEL, "moe": "few"} if experts else MODEL
    config = make_config({}, inner_steps=1, model=model, global_batch_size=rows, ema_decay=None)
    program = small.make_program(config)
    return program, program.compile_train()


@functools.cache
def simulated(experts: bool = False) -> Trace:
    """DiLoCo without a mesh: workers in turn, and the outer step in numpy."""
    program, train = one_worker(experts)
    rate, mu = LocalSGDConfig.outer_learning_rate, LocalSGDConfig.outer_momentum
    workers = [program.init_state(0) for _ in range(REPLICAS)]
    outer = jax.device_get(workers[0].params)
    momentum, ema = jax.tree.map(np.zeros_like, outer), outer
    trace = Trace(np.zeros((STEPS, REPLICAS)), [], [], [])
    for i in range(STEPS):
        for r in range(REPLICAS):
            rows = {name: np.split(x, REPLICAS)[r] for name, x in small.packed_batch(i).items()}
            workers[r], metrics = train(workers[r], small.place(program, rows))
            trace.losses[i, r] = metrics["loss"]
        if (i + 1) % INNER:
            continue
        params = [jax.device_get(w.params) for w in workers]
        learnt = jax.tree.map(lambda o, *p: np.stack([o - x for x in p]), outer, *params)
        gradient = jax.tree.map(lambda x: x.mean(0), learnt)
        momentum = jax.tree.map(lambda m, g: mu * m + g, momentum, gradient)
        step = jax.tree.map(lambda m, g: g + mu * m, momentum, gradient)
        outer = jax.tree.map(lambda o, s: o - rate * s, outer, step)
        ema = jax.tree.map(lambda e, o: e + (1 - DECAY**INNER) * (o - e), ema, outer)
        workers = [w.replace(params=small_copy(outer, w.params)) for w in workers]
        trace.outer.append(outer)
        trace.ema.append(ema)
        trace.learnt.append(learnt)
    return trace


def small_copy(values, like):
    return jax.tree.map(lambda v, x: jax.device_put(np.asarray(v, x.dtype), x.sharding), values, like)


@functools.cache
def compiled(case: str, **outer: Any) -> tuple[Program, Any]:
    program = small.make_program(make_config(outer=outer, **CASES[case]))
    return program, program.compile_train()


@functools.cache
def first(case: str) -> TrainState:
    """Step 0, on the host."""
    return jax.device_get(compiled(case)[0].init_state(0))


def begin(case: str) -> TrainState:
    return jax.device_put(first(case), shardings(compiled(case)[0].state))


def read(program: Program, executable: Any) -> Reading:
    return read_hlo(executable.as_text(), program.layout.mesh.shape)


def canonical(program: Program, tree: Any) -> Any:
    return jax.device_get(program.to_canonical(tree))


def distance(a: Any, b: Any) -> float:
    """Largest relative difference of any leaf, by norm."""
    both = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in both)


def spread(state: TrainState) -> float:
    """How far the replicas' parameters are from the first's."""
    assert state.local is not None
    return max(
        float(np.max(np.abs(x - x[:1]))) for x in jax.tree.leaves(jax.device_get(state.local["params"]))
    )


CASE_NAMES = ["fsdp_tensor", "pipeline", *(pytest.param(name, marks=SLOW) for name in ("context", "expert"))]


@pytest.mark.parametrize("case", CASE_NAMES)
def test_equals_workers_that_are_run_in_turn(case):
    program, train = compiled(case)
    expected = simulated(experts=case == "expert")
    state = begin(case)
    assert spread(state) == 0
    for i in range(STEPS):
        state, metrics = train(state, small.place(program, small.packed_batch(i)))
        np.testing.assert_allclose(metrics["loss"], expected.losses[i], rtol=1e-5)
        if (i + 1) % INNER:
            assert spread(state) > 1e-4
            continue
        assert spread(state) == 0
        number = i // INNER
        assert distance(canonical(program, state.params), expected.outer[number]) < 1e-5
        assert distance(canonical(program, state.ema), expected.ema[number]) < 1e-5
        copies = jax.tree.map(lambda x: x[0], jax.device_get(state.local["params"]))
        np.testing.assert_equal(copies, jax.device_get(state.params))


@pytest.mark.parametrize("case", CASE_NAMES)
def test_nothing_crosses_the_link_but_in_the_outer_step(case):
    program, train = compiled(case)
    crossing = [c for c in read(program, train).collectives if "replica" in c.axes]
    assert crossing, "the outer step must cross"
    assert all(c.branch for c in crossing), [c for c in crossing if not c.branch]
    assert {(c.kind, c.axes) for c in crossing} == {("all-reduce", ("replica",))}


def test_one_inner_step_of_sgd_and_an_outer_step_of_one_is_data_parallelism(monkeypatch):
    optim = SGDConfig(learning_rate=0.1, grad_clip=None)
    outer = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}

    def steps():
        config = make_config({"replica": 4}, inner_steps=1, optim=optim, outer=outer, ema_decay=None)
        program = small.make_program(config)
        state, train = program.init_state(0), program.compile_train()
        losses = []
        for i in range(5):
            rows = {**small.packed_batch(i), "loss_weights": np.ones((small.ROWS, small.LENGTH), np.float32)}
            state, metrics = train(state, small.place(program, rows))
            losses.append(host_scalars(metrics)["loss"])
        crossing = [c for c in read(program, train).collectives if "replica" in c.axes]
        return losses, jax.device_get(state.params), {c.branch is None for c in crossing}

    expected, expected_params, outside = steps()
    assert outside == {True}
    monkeypatch.setattr("training.program.steps_alone", lambda config, mesh: True)
    losses, params, outside = steps()
    assert outside == {False}
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert distance(params, expected_params) < 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_small_exchange_sends_small_numbers_and_errs_by_their_rounding(kind):
    program, train = compiled("fsdp", exchange=kind)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.state.params)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    rows = sum(size // shape[-1] for size, shape in zip(sizes, shapes, strict=True))
    crossing = [c for c in read(program, train).collectives if "replica" in c.axes]
    assert all(c.branch and c.kind == "all-gather" for c in crossing)
    sent = {"bfloat16": 2 * sum(sizes), "int8": sum(sizes) + 4 * rows}[kind]
    assert sum(c.bytes for c in crossing) == REPLICAS * sent
    assert wire_types(train.as_text(), crossing) == {"bfloat16": {"u16"}, "int8": {"s8", "f32"}}[kind]

    state, expected = jax.device_put(first("fsdp_tensor"), shardings(program.state)), simulated()
    for i in range(INNER):
        state, _ = train(state, small.place(program, small.packed_batch(i)))
    # What is sent is off by a share of the number (bfloat16) or of its row's largest (int8); the first outer
    # step is outer_learning_rate * (1 + outer_momentum) times the mean.
    share = {"bfloat16": 2**-8, "int8": 1 / 127}[kind]
    got, wanted = canonical(program, state.params), expected.outer[0]
    differs = 0.0
    for leaf, want, learnt in zip(*map(jax.tree.leaves, (got, wanted, expected.learnt[0])), strict=True):
        size = np.abs(learnt).mean(0) if kind == "bfloat16" else np.abs(learnt).max(-1, keepdims=True).mean(0)
        error = np.abs(leaf - want)
        assert np.all(error <= 0.7 * 1.9 * share * size * 1.01 + 2e-5 * np.abs(learnt).max()), error.max()
        differs = max(differs, error.max())
    assert differs > 1e-6
    assert spread(state) == 0


def test_without_nesterov_the_outer_step_is_the_momentum_itself():
    """Polyak's heavy ball."""
    program, _ = compiled("fsdp_tensor")
    config = LocalSGDConfig(inner_steps=INNER, outer_learning_rate=0.5, outer_momentum=0.8, nesterov=False)
    replicas = replace(program.replicas, config=config)
    state = begin("fsdp_tensor")
    momentum = jax.tree.map(lambda x: 0.1 * x + 1, state.params)
    mine = jax.tree.map(lambda x: x - jnp.arange(2.0).reshape(2, *(1,) * (x.ndim - 1)), state.local["params"])
    kept = (state.params, momentum, None, mine)
    outer, momentum, _, _ = jax.jit(lambda kept: replicas.meet(kept, jax.random.key(0), None))(kept)
    for old, new, m in zip(*map(jax.tree.leaves, (state.params, outer, momentum)), strict=True):
        np.testing.assert_allclose(m, 0.8 * (0.1 * old + 1) + 0.5, atol=1e-6)
        np.testing.assert_allclose(new, old - 0.5 * m, atol=1e-6)


def wire_types(text, collectives):
    computations, _ = parse_module(text)
    types = {name: i.type for table in computations.values() for name, i in table.items()}
    return {types[c.name].strip("(").split("[")[0] for c in collectives}


def test_rounding_to_int8_is_right_on_average_and_the_same_for_the_same_key():
    row = np.array([[1.0, 0.3 / 127, -0.6 / 127, 0.0, -0.5]], np.float32)
    x = jnp.broadcast_to(row, (4000, 1, 5))
    levels, scale = encode("int8", x, jax.random.key(0))
    got = np.asarray(decode("int8", [levels, scale]))
    np.testing.assert_allclose(got.mean((0, 1)), row[0], atol=0.04 / 127)
    assert np.abs(got - x).max() <= 1.001 / 127
    again, _ = encode("int8", x, jax.random.key(0))
    np.testing.assert_array_equal(levels, again)


@pytest.mark.parametrize("case", ["fsdp_tensor", "pipeline"])
def test_resuming_at_an_outer_step_is_bitwise(case, tmp_path):
    program, train = compiled(case)
    state = begin(case)
    with closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        for i in range(STEPS):
            state, _ = train(state, small.place(program, small.packed_batch(i)))
            if i + 1 == INNER:
                checkpoints.save(i + 1, program.to_canonical(state), {})
                checkpoints.wait()
        stored, _ = checkpoints.restore(INNER, program.canonical)
    again = program.from_canonical(stored)
    for leaf, like in zip(jax.tree.leaves(again), jax.tree.leaves(program.state), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
    for i in range(INNER, STEPS):
        again, _ = train(again, small.place(program, small.packed_batch(i)))
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_a_checkpoint_goes_on_with_another_number_of_replicas_or_in_step(tmp_path):
    program, train = compiled("fsdp_tensor")
    state = begin("fsdp_tensor")
    for i in range(INNER):
        state, _ = train(state, small.place(program, small.packed_batch(i)))
    with closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.save(INNER, program.to_canonical(state), {})
        checkpoints.wait()
        mean = jax.tree.map(lambda x: np.asarray(x).mean(0) if x.ndim else np.asarray(x), state.opt_state)

        four = small.make_program(make_config({"replica": 4, "pipeline": 2}, pipeline={"microbatches": 2}))
        stored, _ = checkpoints.restore(INNER, four.canonical)
        assert set(stored.local) == {"momentum"}
        resumed = four.from_canonical(stored)
        assert spread(resumed) == 0
        moments = jax.device_get(four.to_canonical(resumed))
        assert_close(moments.params, state.params)
        assert_close(moments.local["momentum"], state.local["momentum"])
        assert_close(moments.opt_state, mean)
        assert_close(jax.tree.map(lambda x: x[3] if x.ndim else x, moments.local["replicas"]), mean)

        together = small.make_program(make_config({"replica": 2}, inner_steps=1))
        stored, _ = checkpoints.restore(INNER, together.canonical)
        assert stored.local is None
        assert_close(together.from_canonical(stored).opt_state, mean)


def test_a_checkpoint_of_a_synchronous_run_goes_on_alone(tmp_path):
    together = small.make_program(make_config({"replica": 2}, inner_steps=1))
    state = together.init_state(1)
    program, train = compiled("fsdp_tensor")
    with closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.save(INNER, together.to_canonical(state.replace(step=state.step + INNER)), {})
        checkpoints.wait()
        stored, _ = checkpoints.restore(INNER, program.canonical)
    alone = program.from_canonical(stored)
    assert jax.tree.structure(alone) == jax.tree.structure(program.state)
    assert_close(alone.params, state.params)
    train(alone, small.place(program, small.packed_batch(0)))


def assert_close(tree, other):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-9)


def test_a_parents_weights_reach_every_replica():
    program, _ = compiled("fsdp_tensor")
    parent = jax.tree.map(lambda x: x + 1, begin("fsdp_tensor").params)
    state = program.with_params(begin("fsdp_tensor"), parent)
    for tree in (state.params, state.ema, jax.tree.map(lambda x: x[1], state.local["params"])):
        np.testing.assert_equal(jax.device_get(tree), jax.device_get(parent))


def test_evaluation_is_of_the_outer_parameters():
    program, train = compiled("fsdp_tensor")
    state, _ = train(
        begin("fsdp_tensor"), small.place(program, small.packed_batch(0))
    )  # replicas differ by now
    sums = program.compile_eval()(state.params, small.place(program, small.packed_batch(9)))
    one = small.make_program(make_config({}, inner_steps=1))
    expected = one.compile_eval()(first("fsdp_tensor").params, small.place(one, small.packed_batch(9)))
    np.testing.assert_allclose(sums["nll"], expected["nll"], rtol=1e-5)


def test_metrics_are_means_over_tokens_of_what_is_here():
    metrics = {"loss": jnp.array([1.0, 4.0]), "tokens": jnp.array([3.0, 1.0])}
    assert host_scalars(metrics) == {"loss": 1.75, "tokens": 4}
    assert host_scalars({"loss": jnp.array(2.0), "tokens": jnp.array(5.0)}) == {"loss": 2, "tokens": 5}


def test_a_checkpoint_between_outer_steps_would_lose_what_replicas_know():
    program, _ = compiled("fsdp_tensor")
    state = begin("fsdp_tensor")
    with pytest.raises(AssertionError, match="differ"):
        program.to_canonical(state.replace(step=state.step + 1))


def test_rows_must_be_split_over_replicas_first():
    config = make_config({"replica": 2, "data": 2}, rules={"batch": ["data", "replica", "fsdp"]})
    with pytest.raises(ValueError, match=r"use mesh.rules.batch=\[replica, data, fsdp\]"):
        small.make_program(config)


def test_parameters_are_never_split_over_replicas():
    layout = small.make_program(make_config({"replica": 2})).layout
    rules = {**layout.rules, "embed": ["replica", "fsdp"]}
    assert local_sgd.one_replica(replace(layout, rules=rules)).rules["embed"] == ["fsdp"]
