"""What the compiled pipeline does: its bubble, its memory, its permutes; and models of several segments."""

import functools

import jax
import numpy as np
import pytest

from models.config import MoEConfig, MTPConfig
from planner.hlo.program import read_hlo
from tests.parallel import small
from training.legal.check import check
from training.state import shardings

HEAD_DIMS = 64 * small.VOCAB  # D * V
TOKENS = small.ROWS * small.LENGTH
DEEP = {
    "num_layers": 8
}  # two a chunk: a chunk of one is no loop, and its last product falls away in recompute


@functools.cache
def compiled(stages, schedule, microbatches, virtual_stages=1, rows=None, **mesh):
    """(program, executable of value_and_grad, reading of it); once whether or not the usual rows are
    named.
    """
    if rows == small.ROWS:
        return compiled(stages, schedule, microbatches, virtual_stages, **mesh)
    how = {"schedule": schedule, "microbatches": microbatches, "virtual_stages": virtual_stages}
    config = small.make_config(
        {"pipeline": stages, **mesh}, model=DEEP, pipeline=how, global_batch_size=rows or small.ROWS
    )
    program = small.make_program(config)
    step = jax.jit(
        lambda p, b: program.strategy.value_and_grad(
            program.objective, program.model, p, b, jax.random.key(0), program.ops
        ),
        in_shardings=(shardings(program.state.params), shardings(program.batch)),
        out_shardings=(program.layout.replicated(), shardings(program.state.params)),
    )
    executable = step.lower(program.state.params, program.batch).compile(dict(program.compiler_options))
    return program, executable, read_hlo(executable.as_text(), program.layout.mesh.shape)


@functools.cache
def forward_flops():
    """Of all layers over the whole batch, without the head; of two devices: one CPU has forms of its own."""
    program = small.make_program(small.make_config({"data": 2}, model=DEEP))
    reading = read_hlo(program.compile_eval().as_text(), program.layout.mesh.shape)
    return 2 * reading.flops - 2 * HEAD_DIMS * TOKENS


TABLES = [("gpipe", 4, 8, 1), ("1f1b", 4, 8, 1), ("1f1b", 2, 16, 1), ("interleaved_1f1b", 2, 8, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "P", "M", "v"), TABLES)
def test_compiled_work_has_the_ideal_bubble_and_nothing_twice(schedule, P, M, v):
    program, _, reading = compiled(P, schedule, M, v)
    assert reading.uncounted_loops == []
    # The head's three products are split over stages, so what is left is layers.
    layers = reading.flops - 3 * 2 * HEAD_DIMS * TOKENS / P
    useful = 4 * forward_flops() / P  # forward 1, recompute 1, backward 2
    ideal = (P - 1) / (v * M + P - 1)
    assert 1 - useful / layers == pytest.approx(ideal, rel=0.02)
    assert program.strategy.schedule.bubble == pytest.approx(ideal, rel=1e-12)


@pytest.mark.slow
def test_split_backward_does_what_its_table_says():
    P, M = 4, 8
    program, _, reading = compiled(P, "zero_bubble", M)
    layers = reading.flops - 3 * 2 * HEAD_DIMS * TOKENS / P
    schedule = program.strategy.schedule
    # Attention's products have no weights, so their share of `weight 1` is done with the inputs' instead.
    assert 1 - 4 * forward_flops() / P / layers == pytest.approx(schedule.bubble, abs=0.02)
    assert layers < compiled(P, "1f1b", M)[2].flops - 3 * 2 * HEAD_DIMS * TOKENS / P


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "P", "M", "v"), [*TABLES, ("zero_bubble", 4, 8, 1)])
def test_stages_pass_on_once_a_tick_and_never_in_a_branch(schedule, P, M, v):
    program, _, reading = compiled(P, schedule, M, v)
    assert all(c.branch is None for c in reading.collectives)
    work = program.strategy.schedule.work
    ticks = sum(w.forward for w in work) + sum(w.backward for w in work)
    totals = reading.totals()
    # A last run of one tick is no loop, and what it would hand on is for nobody.
    assert totals["collective-permute", ("pipeline",)][0] in (ticks, ticks - 1)
    assert not [key for key in totals if key[0] in ("all-gather", "all-to-all", "reduce-scatter")]


@pytest.mark.slow
def test_memory_does_not_grow_with_microbatches_but_under_gpipe():
    def temporaries(schedule):
        # Two rows a microbatch, so that only their number grows.
        return [
            compiled(4, schedule, M, rows=2 * M)[1].memory_analysis().temp_size_in_bytes for M in (4, 8, 32)
        ]

    one_input = 2 * small.LENGTH * 64 * 4
    few, some, many = temporaries("1f1b")
    assert many == some and some - few <= 3 * one_input + 4096  # seven inputs are kept, or all four
    few, some, many = temporaries("gpipe")
    assert many - some >= 24 * one_input and some > few


SEVERAL = {
    "a part of a period is left": {
        "num_layers": 5,
        "window": 8,
        "window_pattern": ["local", "global"],
        "tie_embeddings": False,
    },
    "first layers are dense, and a further token": {
        "num_layers": 5,
        "mtp": MTPConfig(1, 0.3),
        "moe": MoEConfig(
            num_experts=4, experts_per_token=2, d_expert=32, first_dense_layers=1, load_balance_weight=0.01
        ),
    },
    "layers with experts lie between dense ones": {
        "num_layers": 5,
        "moe": MoEConfig(
            num_experts=4,
            experts_per_token=2,
            d_expert=32,
            load_balance_weight=0.01,
            layer_pattern=["mlp", "experts"],
        ),
    },
}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("model", SEVERAL.values(), ids=SEVERAL)
def test_other_segments_ride_along(model):
    expected = small.run(small.make_config(model=model), steps=2)
    for mesh in ({"pipeline": 2, "fsdp": 2, "tensor": 2},):
        small.assert_equal(small.run(small.make_config(mesh, model=model), steps=2), expected)


def test_layers_that_do_not_divide_are_refused_with_the_numbers_that_would():
    with pytest.raises(ValueError, match=r"model.num_layers=5.* mesh.pipeline=2"):
        check(small.make_config({"pipeline": 2}, model={"num_layers": 5, "vocab_size": -1}), 2)


def test_initial_weights_do_not_depend_on_stages():
    one = small.make_program(small.make_config()).init_state(3)
    how = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
    program = small.make_program(small.make_config({"pipeline": 2, "fsdp": 2}, pipeline=how))
    many = program.to_canonical(program.init_state(3))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_array_max_ulp(jax.device_get(a), jax.device_get(b), 4)


def test_stacks_come_back_from_canonical_bitwise_and_in_place():
    how = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
    program = small.make_program(small.make_config({"pipeline": 2, "fsdp": 2}, pipeline=how))
    state = program.init_state(3)
    again = program.from_canonical(program.to_canonical(state))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert a.sharding == b.sharding and (jax.device_get(a) == jax.device_get(b)).all()
