"""Devices in, mesh and accumulation out: laws over every number of devices, for many meshes and batches."""

import math
import random

import pytest

from parallel.config import MESH_AXES, AutoscaleConfig
from training.autoscale.policy import ELASTIC, Asked, TooFew, decide, numbers, target

BATCH_AXES = ("replica", "data", "fsdp", "expert")


def asked(rows=24, turns=1, fixed=(), policy=None, turns_key="training.accumulation_steps", **sizes):
    policy = policy or AutoscaleConfig()
    sizes = {axis: 1 for axis in MESH_AXES} | sizes
    return Asked(sizes, BATCH_AXES, rows, turns, turns_key, policy, {axis: "it is held" for axis in fixed})


def anything(sizes, turns):
    return None


def some_of(modulus):
    """Rules of no particular sense: they refuse some numbers of devices, and odd turns beside stages."""

    def rule(sizes, turns):
        if math.prod(sizes.values()) % modulus == 0:
            return f"no multiple of {modulus}"
        return "odd turns" if sizes["pipeline"] > 1 and turns % 2 else None

    return rule


CASES = {
    "data": asked(data=8),
    "data, what is left": asked(data=-1, policy=AutoscaleConfig(rows_per_device=3)),
    "fsdp, what is left": asked(data=2, fsdp=-1, rows=64, policy=AutoscaleConfig(rows_per_device=4)),
    "fsdp of 16 at most": asked(data=1, fsdp=-1, rows=64, policy=AutoscaleConfig(max_devices=16)),
    "data and fsdp": asked(data=4, fsdp=4, rows=96, turns=2),
    "replicas": asked(replica=2, data=2, fsdp=4, rows=48),
    "held replicas": asked(replica=2, data=4, fixed=("replica",)),
    "tensor": asked(data=2, fsdp=2, tensor=4, rows=32),
    "stages": asked(data=4, pipeline=2, rows=64, turns=8, turns_key="pipeline.microbatches"),
    "experts": asked(data=2, fsdp=2, expert=2, rows=40),
    "grows": asked(data=4, rows=60, policy=AutoscaleConfig(max_devices=12)),
}


def decisions(case, legal, most=40):
    """By number of devices, without those that are refused."""
    found = {}
    for available in range(1, most):
        try:
            found[available] = decide(case, available, legal)
        except ValueError as error:
            assert "autoscale: " in str(error) and "\n" not in str(error)
    assert found
    return found


@pytest.mark.parametrize("legal", [anything, some_of(3), some_of(5)], ids=["any", "no 3", "no 5"])
@pytest.mark.parametrize("name", CASES)
def test_the_batch_the_memory_of_rows_and_the_axes_that_hold_the_model_stay(name, legal):
    case = CASES[name]
    for available, made in decisions(case, legal).items():
        assert made.used == math.prod(made.sizes.values()) <= available == made.available
        assert legal(made.sizes, made.turns) is None
        ways = case.ways(made.sizes)
        assert ways * made.turns * made.rows_each == case.rows
        assert 1 <= made.rows_each <= case.rows_each
        for axis, size in case.sizes.items():
            if axis not in ELASTIC or axis in case.fixed:
                assert made.sizes[axis] == size
            elif size != -1 and axis != "data":
                assert made.sizes[axis] <= size
        if case.most is not None:
            assert made.used <= case.most


@pytest.mark.parametrize("legal", [anything, some_of(3), some_of(5)], ids=["any", "no 3", "no 5"])
@pytest.mark.parametrize("name", CASES)
def test_more_devices_never_mean_fewer_used_and_idle_ones_change_nothing(name, legal):
    case = CASES[name]
    found = decisions(case, legal)
    used = [made.used for made in found.values()]
    assert used == sorted(used)
    assert list(found) == list(range(min(found), 40))  # what starts on some devices starts on more
    for made in found.values():
        fewer = found[made.used]
        assert (fewer.sizes, fewer.turns) == (made.sizes, made.turns)
        assert fewer.used == fewer.available
    assert found == decisions(case, legal)
    whole = decide(case, 39, legal)
    assert numbers(case, 39, legal) == sorted({made.used for made in found.values()} | {whole.used})


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.free is None and name != "grows"]
)
def test_all_devices_give_back_what_was_asked_for(name):
    case = CASES[name]
    made = decide(case, math.prod(case.sizes.values()), anything)
    assert (made.sizes, made.turns) == (dict(case.sizes), case.turns)
    assert "as they were asked for" in made.lines[0]
    assert decide(case, 1000, anything).sizes == made.sizes


def test_of_random_cases_every_law_holds():
    rng = random.Random(0)
    for _ in range(40):
        sizes = {axis: rng.choice((1, 1, 2, 3, 4)) for axis in ("replica", "data", "fsdp", "tensor")}
        rows = math.prod(sizes.values()) // sizes["tensor"] * rng.choice((1, 2, 6))
        case, legal = asked(rows=rows, **sizes), some_of(rng.choice((3, 5, 7, 1000)))
        used = [0]
        for available in range(1, 2 * math.prod(sizes.values()), 3):
            try:
                made = decide(case, available, legal)
            except ValueError:
                assert used[-1] == 0
                continue
            assert case.ways(made.sizes) * made.turns * made.rows_each == rows
            assert made.rows_each <= case.rows_each and made.sizes["tensor"] == sizes["tensor"]
            assert used[-1] <= made.used <= available
            used.append(made.used)


def test_data_shrinks_before_fsdp_and_what_fsdp_costs_is_said():
    case = asked(data=2, fsdp=4, rows=32)
    assert decide(case, 7, anything).sizes["fsdp"] == 4
    made = decide(case, 3, anything)
    assert (made.used, made.sizes["fsdp"], made.turns) == (2, 2, 4)
    said = "\n".join(made.lines)
    assert "2 of 3 devices: mesh.data 2 to 1, mesh.fsdp 4 to 2, training.accumulation_steps 1 to 4" in said
    assert "the batch stays 32 rows: 2 ways x 4 turns x 4 rows (at most 4 a microbatch" in said
    assert "1 device stays idle: the next number that fits is 4" in said
    assert "a device holds 2 times as much of parameters" in said


def test_more_devices_come_before_the_axes_that_were_asked_for():
    case = asked(data=2, fsdp=-1, rows=24, policy=AutoscaleConfig(rows_per_device=4))
    assert {axis: n for axis, n in decide(case, 3, anything).sizes.items() if n > 1} == {"fsdp": 3}
    assert {axis: n for axis, n in decide(case, 4, anything).sizes.items() if n > 1} == {"data": 2, "fsdp": 2}


def test_refusals_name_the_legal_numbers():
    with pytest.raises(
        ValueError, match="mesh.tensor=4 stays as it is, .* fits 3 devices; start on 4, 8, 16 "
    ):
        decide(asked(data=4, tensor=4, rows=32), 3, anything)
    with pytest.raises(
        ValueError, match=r"mesh.replica=2 stays .* fits 1 device; start on 2, 4, 6, 8 devices"
    ):
        decide(asked(replica=2, data=4, fixed=("replica",)), 1, anything)
    with pytest.raises(
        ValueError, match=r"fits 2 devices \(no multiple of 1\); change the batch or the mesh"
    ):
        decide(asked(data=4), 2, some_of(1))
    with pytest.raises(
        ValueError, match=r"give autoscale.rows_per_device .*, autoscale.max_devices, or mesh.dat"
    ):
        decide(asked(data=-1), 4, anything)
    with pytest.raises(ValueError, match=r"mesh.tensor=-1 under autoscale.*-1 to mesh.data or mesh.fsdp"):
        decide(asked(data=1, tensor=-1), 4, anything)
    with pytest.raises(ValueError, match=r"min_devices=9 is more than the 8 devices of the full size"):
        decide(asked(data=8, policy=AutoscaleConfig(min_devices=9)), 9, anything)


def test_fewer_than_the_minimum_is_a_matter_of_waiting():
    case = asked(data=8, policy=AutoscaleConfig(min_devices=5))
    with pytest.raises(
        TooFew, match="min_devices=5, but of 5 devices 4 can be used; start it when there are more"
    ):
        decide(case, 5, anything)
    assert decide(case, 6, anything).used == 6


QUEUE = AutoscaleConfig(policy="queue", min_devices=2, shrink_at=4, grow_at=1)


def test_a_long_queue_shrinks_a_short_one_grows_and_between_nothing_moves():
    case = asked(data=8, policy=QUEUE)
    last, seen = None, []
    for pending in (0, 2, 3, 4, 9, 3, 2, 1, 3):
        last = decide(case, 8, anything, pending=pending, last=last).used
        seen.append(last)
    assert seen == [8, 8, 8, 2, 2, 2, 2, 8, 8]
    said = "\n".join(decide(case, 8, anything, pending=9, last=8).lines)
    assert "2 of 8 devices" in said and "9 waiting, 4 or more: down to autoscale.min_devices" in said
    assert "6 devices stay idle: 2 is what the policy allows" in said
    assert target(QUEUE, 8, pending=2, last=None)[0] == 8


def test_a_minimum_that_does_not_divide_is_rounded_up_when_the_queue_asks_to_shrink():
    policy = AutoscaleConfig(policy="queue", min_devices=5)
    case = asked(data=8, policy=policy)
    made = decide(case, 8, anything, pending=99, last=8)
    assert (made.used, made.turns) == (6, 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"policy": "que"}, "did you mean queue?"),
        ({"rows_per_device": 0}, "autoscale.rows_per_device=0 must be 1 or more"),
        ({"min_devices": 4, "max_devices": 2}, "autoscale.max_devices=2 is below autoscale.min_devices=4"),
        ({"grow_at": 4}, "autoscale.grow_at=4 must be 0 or more and below autoscale.shrink_at=4"),
        ({"queue": ""}, "autoscale.queue is empty"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(values, said):
    with pytest.raises(ValueError) as refused:
        AutoscaleConfig(**values)
    assert said in str(refused.value)
