"""Muon's iteration is divided among devices, each on whole matrices; read from the compiled update."""

import math
from collections import Counter

import jax
import pytest

from optim.config import AdamWConfig, MuonConfig
from planner.hlo.program import read_hlo
from tests.parallel import small
from training.state import is_info, shardings


def update(mesh, **how):
    """The program, and a reading of its optimizer alone."""
    program = small.make_program(small.make_config(mesh, optim=MuonConfig(), **how))
    placed = shardings(program.state)
    jitted = jax.jit(
        program.tx.update,
        in_shardings=(placed.params, placed.opt_state, placed.params),
        out_shardings=(placed.params, placed.opt_state),
    )
    state = program.state
    compiled = jitted.lower(state.params, state.opt_state, state.params).compile(
        dict(program.compiler_options)
    )
    return program, read_hlo(compiled.as_text(), program.layout.mesh.shape)


def matrices(program):
    """How many hidden matrices there are of each shape (m, n), m <= n."""
    found = Counter()
    for leaf in jax.tree.leaves(program.placement.info, is_leaf=is_info):
        if leaf.role == "matrix":
            rows, columns = (math.prod(leaf.shape[d] for d in dims) for dims in (leaf.reduction, leaf.output))
            found[min(rows, columns), max(rows, columns)] += math.prod(leaf.shape) // (rows * columns)
    return found


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"data": 8}, {"pipeline": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda mesh: ",".join(f"{a}={n}" for a, n in mesh.items()),
)
def test_no_device_iterates_on_more_than_its_share(mesh):
    program, reading = update(mesh)
    stacks = matrices(program)
    share = sum(-(-count // 8) * (20 * m * m * n + 10 * m**3) for (m, n), count in stacks.items())
    assert reading.flops == share
    assert share < 0.2 * sum(count * (20 * m * m * n + 10 * m**3) for (m, n), count in stacks.items())
    assert not reading.uncounted_loops
    # There and back, each matrix once; what is split is not gathered whole, what is whole comes back so.
    filled = sum(-(-count // 8) * 8 * m * n * 4 for (m, n), count in stacks.items())
    totals = reading.totals()
    split = [axis for axis in ("fsdp", "tensor") if axis in mesh]
    for axis in split:
        assert totals["all-to-all", (axis,)] == (2 * len(stacks), 2 * filled // 8)  # what one device holds
    gathers = {("all-gather", ("data",)): (len(stacks), filled)} if "data" in mesh else {}
    assert totals == {("all-to-all", (a,)): totals["all-to-all", (a,)] for a in split} | gathers


def test_moments_in_bfloat16_take_half_the_bytes_of_every_device():
    def moments(dtype):
        optim = AdamWConfig(moment_dtype=dtype)
        state = small.make_program(small.make_config({"fsdp": 4, "tensor": 2}, optim=optim)).state
        leaves = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    params = sum(
        math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(small.make_program(small.make_config({"fsdp": 4, "tensor": 2})).state.params)
    )
    assert moments("float32") == 8 * params and moments("bfloat16") == 4 * params
