"""Pipeline tables: order, bubble, memory."""

import numpy as np
import pytest

from parallel.schedules.tables import IDLE, fold_runs, make_schedule, timeline

TABLES = [
    ("gpipe", 4, 8, 1),
    ("1f1b", 4, 8, 1),
    ("1f1b", 4, 2, 1),  # fewer microbatches than stages
    ("1f1b", 2, 1, 1),
    ("interleaved_1f1b", 4, 8, 2),
    ("interleaved_1f1b", 2, 8, 3),
    ("interleaved_1f1b", 4, 4, 4),
    ("zero_bubble", 4, 8, 1),
    ("zero_bubble", 4, 2, 1),
]


def build(name, P, M, v):
    return make_schedule(name, stages=P, microbatches=M, virtual_stages=v)


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_every_unit_passes_every_stage_once_and_in_order(table):
    name, P, M, v = table
    schedule = build(*table)
    ticks = {}
    for kind in ("forward", "backward", "weight"):
        grid = getattr(schedule, kind)
        for s in range(P):
            units = grid[:, s][grid[:, s] != IDLE]
            expected = range(M * v) if kind != "weight" or schedule.split else []
            assert sorted(units) == list(expected), (kind, s)
            ticks |= {(kind, int(u), s): int(np.flatnonzero(grid[:, s] == u)[0]) for u in units}
    for m in range(M):
        path = [(m * v + c, s) for c in range(v) for s in range(P)]  # the way through the layers
        for (u, s), (u2, s2) in zip(path, path[1:], strict=False):
            # What a stage hands over arrives one tick later, and nothing waits anywhere else.
            assert ticks["forward", u2, s2] == ticks["forward", u, s] + 1
            assert ticks["backward", u, s] == ticks["backward", u2, s2] + 1
        u, s = path[-1]
        assert ticks["backward", u, s] >= ticks["forward", u, s]
    for u in range(M * v if schedule.split else 0):
        at = {ticks["weight", u, s] for s in range(P)}
        assert len(at) == 1 and all(max(at) >= ticks["backward", u, s] for s in range(P))


@pytest.mark.parametrize("table", [t for t in TABLES if t[0] != "zero_bubble"], ids=str)
def test_bubble_is_the_ideal(table):
    _, P, M, v = table
    assert build(*table).bubble == pytest.approx((P - 1) / (v * M + P - 1), rel=1e-12)


@pytest.mark.parametrize(("P", "M"), [(4, 8), (8, 32), (2, 2)])
def test_split_backward_takes_the_weights_out_of_the_bubble(P, M):
    schedule = build("zero_bubble", P, M, 1)
    assert schedule.cost == 3 * (M + P - 1) + M
    assert schedule.bubble < build("1f1b", P, M, 1).bubble


def test_kept_inputs_do_not_grow_with_microbatches_but_under_gpipe():
    for P in (2, 4, 8):
        for name, v in (("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1)):
            peaks = {build(name, P, M, v).peak_inputs for M in (2 * P, 4 * P, 16 * P)}
            assert len(peaks) == 1 and peaks.pop() <= 2 * v * P - 1, (name, P)
        assert [build("gpipe", P, M, 1).peak_inputs for M in (P, 4 * P)] == [P, 4 * P]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_no_place_is_taken_twice(table):
    schedule = build(*table)
    for begin, end, (taken, left, count) in (
        (schedule.forward, schedule.backward, schedule.slots),
        (schedule.backward, schedule.weight, schedule.weight_slots),
    ):
        if not (end != IDLE).any():
            continue
        for s in range(schedule.stages):
            holds = {}
            for t in range(len(begin)):
                if begin[t, s] != IDLE:
                    assert taken[t, s] not in holds and taken[t, s] < count
                    holds[taken[t, s]] = begin[t, s]
                if end[t, s] != IDLE:
                    assert holds.pop(left[t, s]) == end[t, s]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_runs_cover_every_tick_and_do_not_multiply(table):
    name, P, M, v = table
    schedule = build(*table)
    for runs in (schedule.runs, schedule.forward_runs):
        ticks = [t for pattern, repeats in fold_runs(runs) for t in spread(pattern, repeats)]
        assert ticks == list(range(ticks[-1] + 1))
    more = build(name, P, 16 * P, v)
    assert len(fold_runs(more.runs)) <= 6
    heads = sum(run.count for run in schedule.runs if run.work.head)
    assert heads == M  # the head is computed once a microbatch, never on an idle tick


def spread(pattern, repeats):
    size = sum(run.count for run in pattern)
    return range(pattern[0].start, pattern[0].start + size * repeats)


def test_timeline_is_readable():
    assert timeline(build("1f1b", 2, 3, 1)) == (
        "stage 0: F0   F1   F2B0 B1   B2\nstage 1: .    F0B0 F1B1 F2B2 ."
    )


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (("2f2b", 4, 8, 1), ["pipeline.schedule=2f2b", "interleaved_1f1b"]),
        (("1f1b", 4, 8, 2), ["pipeline.virtual_stages=2", "use pipeline.virtual_stages=1"]),
        (("interleaved_1f1b", 4, 8, 1), ["pipeline.virtual_stages=1", "2 or more"]),
        (("interleaved_1f1b", 4, 6, 2), ["pipeline.microbatches=6", "mesh.pipeline=4", "use 8"]),
        (("1f1b", 4, 0, 1), ["pipeline.microbatches=0", "1 or more"]),
    ],
)
def test_what_is_no_schedule_is_refused(numbers, words):
    with pytest.raises(ValueError) as error:
        build(*numbers)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
