"""Muon's stacks against optax, one leaf at a time; shared out over devices against one device."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from optim.muon import NEWTON_SCHULZ, Matrix, Unsharded, on_matrices, orthogonalize, scale_by_muon
from parallel.sharded_matrices import ShardedMatrices

# (shape, reduction, output, placed): a square of heads and its inverse, pairs, a wide one, its transpose.
LEAVES = {
    "q": ((3, 8, 2, 4), (1,), (2, 3), (None, "fsdp", "tensor")),
    "kv": ((3, 8, 2, 2, 2), (1,), (3, 4), (None, "fsdp", None, "tensor")),
    "o": ((3, 2, 4, 8), (1, 2), (3,), (None, "tensor", None, "fsdp")),
    "gate": ((3, 8, 2, 16), (1,), (3,), (None, "fsdp", None, "tensor")),
    "down": ((3, 16, 8), (1,), (2,), (None, "tensor", "fsdp")),
    "staged": ((2, 2, 3, 8, 16), (3,), (4,), (None, "tensor", None, "fsdp")),
    "single": ((8, 16), (0,), (1,), ()),
}
MATRICES = {
    name: Matrix(reduction, output, placed) for name, (_, reduction, output, placed) in LEAVES.items()
}


def random_leaves(seed, names=tuple(LEAVES)):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=LEAVES[name][0]), jnp.float32) for name in names}


def ours(matrices, dtype=jnp.float32):
    return scale_by_muon(matrices, momentum=0.9, nesterov=True, steps=5, dtype=dtype, parts=Unsharded())


def distance(found, wanted):
    """The largest relative difference of a leaf, by norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)


def test_directions_equal_optax():
    names = ("kv", "o", "down")
    dims = {name: MuonDimensionNumbers(MATRICES[name].reduction, MATRICES[name].output) for name in names}
    reference = optax.contrib.scale_by_muon(NEWTON_SCHULZ, 5, 0.9, weight_dimension_numbers=dims)
    tx = ours({name: MATRICES[name] for name in names})
    update = jax.jit(lambda g, mine, theirs: (tx.update(g, mine), reference.update(g, theirs)))
    state, other = tx.init(random_leaves(0, names)), reference.init(random_leaves(0, names))
    for seed in (1, 2, 3):
        (found, state), (wanted, other) = update(random_leaves(seed, names), state, other)
        assert distance(found, wanted) < 1e-5
        assert distance(state.mu, other.mu) < 1e-6


def test_matrices_of_one_shape_are_one_stack():
    seen = []

    def record(stack):
        seen.append(stack.shape)
        return stack

    leaves = random_leaves(0)
    unplaced = [m._replace(placed=None) for m in MATRICES.values()]
    back = on_matrices(record, list(leaves.values()), unplaced, Unsharded())
    # q and o; kv; gate twice, down, staged and single.
    assert sorted(seen) == [(6, 4, 8), (6, 8, 8), (6 + 3 + 12 + 1, 8, 16)]
    for x, y in zip(leaves.values(), back, strict=True):
        np.testing.assert_array_equal(x, y)


def test_bfloat16_products_give_nearly_the_same_direction():
    gradients, matrices = random_leaves(1, ("down",)), {"down": MATRICES["down"]}

    def both(gradients):
        return [ours(matrices, d).update(gradients, ours(matrices).init(gradients))[0]
                for d in (jnp.bfloat16, jnp.float32)]  # fmt: skip

    found, wanted = jax.jit(both)(gradients)
    assert 1e-4 < distance(found, wanted) < 0.1
    assert found["down"].dtype == jnp.float32


def test_zeros_stay_zeros():
    assert not np.any(orthogonalize(jnp.zeros((2, 4, 8)), 5))


@pytest.mark.parametrize("axes", [("replica", "fsdp", "tensor"), ("fsdp", "tensor")], ids=str)
def test_devices_that_share_the_work_get_what_one_gets(axes):
    """Split rows, columns and stacks, an axis along which all hold the same, and one that is left alone."""
    types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"), axis_types=types)
    shares = []

    def record(stack):
        shares.append(stack.shape)
        return orthogonalize(stack, 5)

    def run(leaves):
        return on_matrices(record, leaves, list(MATRICES.values()), ShardedMatrices(mesh, axes))

    def alone(leaves):
        return on_matrices(lambda x: orthogonalize(x, 5), leaves, list(MATRICES.values()), Unsharded())

    leaves = list(random_leaves(1).values())
    placed = [NamedSharding(mesh, PartitionSpec(*m.placed)) for m in MATRICES.values()]
    # Fused as XLA's defaults have it: otherwise sums round differently, which the polynomial makes larger.
    fused = {"xla_cpu_use_fusion_emitters": True} if "emitters" in os.environ["XLA_FLAGS"] else None
    found = jax.jit(run, out_shardings=placed, compiler_options=fused)(jax.device_put(leaves, placed))
    wanted = jax.jit(alone, compiler_options=fused)(leaves)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    ways = math.prod(mesh.shape[a] for a in axes)

    def share(count, among):
        return -(-count // among)

    assert sorted(shares) == sorted([
        (share(6, ways), 8, 8),  # q and o
        (share(6, ways), 4, 8),  # kv
        (share(9, ways), 8, 16),  # gate and down
        (share(6, ways // 2), 8, 16),  # staged: half of its 12 on each half of the devices
        (share(1, ways), 8, 16),  # single: one of them has it, the others a matrix of zeros
    ])  # fmt: skip
