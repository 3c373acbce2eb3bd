"""Seconds from work: each equation by numbers that a person can check."""

import pytest

from parallel.hardware import Link, Machine
from planner.roofline import cost_of, members_within, predict, torus_dims
from planner.work import StepCost, Traffic
from training.preflight import Memory

NEAR = Link("nvlink", 8, 400e9, 0.0)
FAR = Link("infiniband", 0, 50e9, 0.0)
MACHINE = Machine("m", "gpu", 64, 8, 80 * 2**30, 3e12, {"bfloat16": 1e15, "fp8": 2e15}, 0.5, (NEAR, FAR))
MESH = {"replica": 1, "pipeline": 1, "data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 8}
TORUS = Machine(
    "t", "tpu", 64, 4, 95 * 2**30, 3e12, {"bfloat16": 4e14}, 1.0, (Link("ici", 0, 200e9, 0.0), FAR)
)
NONE = Memory(0, 0, 0, 0, 0)


def seconds(kind, axes, size, machine=MACHINE, mesh=MESH):
    cost = cost_of(Traffic(kind, axes, 1, size), machine, mesh)
    return cost.seconds, cost.link, cost.hidden


def test_members_within_a_block_of_neighbours():
    assert members_within(("tensor",), MESH, 8) == 8
    assert members_within(("fsdp",), MESH, 8) == 1
    assert members_within(("fsdp", "tensor"), MESH, 8) == 8
    assert members_within(("fsdp",), {"fsdp": 16, "tensor": 4}, 8) == 2
    assert members_within(("fsdp",), {"fsdp": 64}, 8) == 8


def test_an_all_gather_within_a_node_moves_all_but_its_own_part():
    assert seconds("all-gather", ("tensor",), 8e9) == (pytest.approx(8e9 * 7 / 8 / 400e9), "nvlink", False)


def test_an_all_gather_of_one_device_a_node_has_one_link_of_the_node():
    assert seconds("all-gather", ("fsdp",), 8e9) == (pytest.approx(8e9 * 7 / 8 / 50e9), "infiniband", True)


def test_an_all_gather_of_whole_nodes_has_all_their_links():
    time, link, hidden = seconds("reduce-scatter", ("fsdp",), 64e9, mesh={"fsdp": 64})
    assert time == pytest.approx(64e9 * (1 - 8 / 64) / (8 * 50e9))
    assert (link, hidden) == ("infiniband", True)


def test_the_slower_of_both_levels_counts():
    fast = Link("infiniband", 0, 1e12, 0.0)
    machine = Machine("m", "gpu", 64, 8, 1, 1.0, {"bfloat16": 1.0}, 1.0, (NEAR, fast))
    time, link, _ = seconds("all-gather", ("fsdp",), 64e9, machine, {"fsdp": 64})
    assert (time, link) == (pytest.approx(64e9 * 7 / 8 / 400e9), "nvlink")


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    assert seconds("all-reduce", ("tensor",), 8e9)[0] == 2 * seconds("all-gather", ("tensor",), 8e9)[0]


def test_an_all_to_all_sends_what_leaves_the_node_by_each_devices_own_link():
    mesh = {"expert": 64}
    assert seconds("all-to-all", ("expert",), 64e9, mesh=mesh)[0] == pytest.approx(56e9 / 50e9)
    assert seconds("all-to-all", ("tensor",), 8e9)[0] == pytest.approx(7e9 / 400e9)


def test_latency_is_of_every_hop_of_every_execution():
    slow = Machine(
        "m",
        "gpu",
        64,
        8,
        1,
        1.0,
        {"bfloat16": 1.0},
        1.0,
        (Link("a", 8, 1e30, 1.0), Link("b", 0, 1e30, 100.0)),
    )
    assert cost_of(Traffic("all-gather", ("fsdp",), 3, 0), slow, {"fsdp": 64}).seconds == pytest.approx(
        3 * (7 + 700)
    )


def test_a_group_of_one_is_free():
    assert seconds("all-reduce", ("data",), 8e9)[0] == 0.0


def test_a_torus_offers_a_ring_for_each_dim_that_a_group_spans():
    assert torus_dims(("fsdp",), {"fsdp": 64}, (4, 4, 4)) == 3
    assert torus_dims(("tensor",), {"fsdp": 16, "tensor": 4}, (4, 4, 4)) == 1
    assert torus_dims(("fsdp",), {"fsdp": 16, "tensor": 4}, (4, 4, 4)) == 2
    machine = Machine(**{**vars(TORUS), "torus": (4, 4, 4)})
    whole, _, _ = seconds("all-gather", ("fsdp",), 64e9, machine, {"fsdp": 64})
    assert whole == pytest.approx(64e9 * 63 / 64 / 600e9)


def test_an_all_to_all_on_a_torus_is_bound_by_its_longest_way_round():
    line = Machine(**{**vars(TORUS), "torus": (64,)})
    cube = Machine(**{**vars(TORUS), "torus": (4, 4, 4)})
    assert seconds("all-to-all", ("expert",), 8e9, line, {"expert": 64})[0] == pytest.approx(
        8e9 * 64 / 4 / 200e9
    )
    assert seconds("all-to-all", ("expert",), 8e9, cube, {"expert": 64})[0] == pytest.approx(
        8e9 * 4 / 4 / 200e9
    )


def test_a_step_is_the_slowest_of_what_goes_on_at_once_and_all_that_does_not():
    work = StepCost("analytic", NONE, {"bfloat16": 1e15, "fp8": 2e15}, 3e12, (), bubble=0.5)
    found = predict(work, MACHINE, MESH, tokens=1000, flops_full=2e9, flops_causal=1e9)
    assert found.compute_seconds == pytest.approx(4.0)  # two seconds of each at half their peaks
    assert found.memory_seconds == pytest.approx(1.0)
    assert found.step_seconds == pytest.approx(8.0)  # half of the time a stage waits
    exposed = StepCost(
        "analytic", NONE, {"bfloat16": 1e15}, 0.0, (Traffic("all-reduce", ("tensor",), 1, 400e9),)
    )
    after = predict(exposed, MACHINE, MESH, tokens=1000, flops_full=2e9, flops_causal=1e9)
    assert after.step_seconds == pytest.approx(2.0 + 2 * 7 / 8)
    hidden = StepCost("analytic", NONE, {"bfloat16": 1e15}, 0.0, (Traffic("all-gather", ("fsdp",), 1, 50e9),))
    beside = predict(hidden, MACHINE, MESH, tokens=1000, flops_full=2e9, flops_causal=1e9)
    assert beside.step_seconds == pytest.approx(2.0)
    assert after.mfu_full == pytest.approx(1000 * 2e9 / after.step_seconds / (64 * 1e15))
