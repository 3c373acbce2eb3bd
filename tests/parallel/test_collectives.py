"""What each mesh axis sends, read from the compiled train step: by axis, kind, count and bytes.

XLA's CPU backend writes a reduce-scatter as an all-reduce of which a part is kept; on described GPUs
(`test_described.py`) the same programs have reduce-scatters. So sizes are held here: nothing goes twice.
"""

import dataclasses

import jax
import pytest

from planner.hlo.program import read_hlo
from tests.parallel import small
from tests.parallel.test_matrix import MODELS

LAYERS = 4
TABLE = small.VOCAB * 64 * 4  # bytes of the tied table
STREAM = small.ROWS * small.LENGTH * 64 * 4  # bytes of the residual stream, all of it
SLACK = 4096  # scalars: losses, norms


def step(mesh, **how):
    """(totals by kind and axes, bytes of the parameters) of one train step."""
    program = small.make_program(small.make_config(mesh, **how))
    reading = read_hlo(program.compile_train().as_text(), program.layout.mesh.shape)
    assert all(c.branch is None for c in reading.collectives)
    return reading.totals(), sum(4 * leaf.size for leaf in jax.tree.leaves(program.state.params))


@pytest.mark.slow
def test_data_sums_gradients_once():
    totals, params = step({"data": 8})
    assert set(totals) == {("all-reduce", ("data",))}
    _, size = totals["all-reduce", ("data",)]
    # The tied table has two gradients, of embedding and head; each is summed once, not once a chunk.
    assert params <= size <= params + TABLE + SLACK


@pytest.mark.slow
def test_fsdp_gathers_twice_and_sums_once():
    totals, params = step({"fsdp": 8})
    assert set(totals) == {("all-gather", ("fsdp",)), ("all-reduce", ("fsdp",))}
    _, gathered = totals["all-gather", ("fsdp",)]
    assert gathered <= 2 * params + SLACK  # forward and backward; no activation
    _, summed = totals["all-reduce", ("fsdp",)]
    assert params <= summed <= params + TABLE + SLACK


@pytest.mark.slow
def test_tensor_sums_activations_and_gathers_none():
    totals, _ = step({"tensor": 4})
    assert set(totals) == {("all-reduce", ("tensor",))}
    times, size = totals["all-reduce", ("tensor",)]
    # A layer: attention and feed-forward forward, three products backward; embedding, and chunks of the head.
    chunks = 8
    assert size <= (5 * LAYERS + 1 + 1) * STREAM + SLACK * chunks
    assert times <= 5 * LAYERS + 1 + 3 * chunks + 8


@pytest.mark.slow
@pytest.mark.matrix
def test_sequence_parallelism_gathers_what_it_scattered():
    totals, _ = step({"tensor": 4}, rules={"act_length": ["context", "tensor"]})
    assert {axes for _, axes in totals} == {("tensor",)}
    assert totals["all-gather", ("tensor",)][1] <= (7 * LAYERS + 2) * STREAM + SLACK


@pytest.mark.slow
def test_context_exchanges_heads_for_positions():
    totals, params = step({"context": 4})
    times, size = totals["all-to-all", ("context",)]
    assert times == 8 * LAYERS  # q, k, v and back, forward and backward
    assert size <= 4 * LAYERS * STREAM
    assert totals["all-gather", ("context",)][1] <= SLACK  # positions and segments, no keys
    assert totals["all-reduce", ("context",)][1] <= params + TABLE + SLACK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dispatch", "exchanges"), [("dropless", 6), pytest.param("capacity", 4, marks=pytest.mark.matrix)]
)
def test_expert_exchanges_tokens_and_sums_no_expert(dispatch, exchanges):
    moe = dataclasses.replace(MODELS["moe"]["moe"], dispatch=dispatch)
    totals, params = step({"expert": 4}, model={"moe": moe})
    assert totals["all-to-all", ("expert",)][0] == exchanges * LAYERS
    experts = LAYERS * 8 * 3 * 64 * 32 * 4
    # Dense parameters lie in parts over `expert`, as over fsdp: gathered twice, summed once. Experts stay.
    assert totals["all-gather", ("expert",)][1] <= 2 * (params - experts) + SLACK
    assert totals["all-reduce", ("expert",)][1] <= params - experts + TABLE + SLACK
