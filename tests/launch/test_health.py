"""What figures say of devices: planted slow, wrong and missing ones are named, and nobody else is."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from launch.check import links as between_devices
from launch.check import probe
from launch.check.verdict import MATMUL, DeviceReading, LinkReading, Report, judge, medians, table

FIGURES = {MATMUL: 700.0, "memory GB/s": 3000.0, "all-reduce data GB/s": 300.0}


def readings(count=8, each=4):
    """Devices on hosts of `each`, no two with quite the same figures."""
    return [
        DeviceReading(
            i,
            f"gpu:{i % each}",
            "NVIDIA H100",
            i // each,
            f"node{i // each}",
            {name: value * (1 + 0.01 * (i % 3)) for name, value in FIGURES.items()},
            memory=80 * 2**30,
        )
        for i in range(count)
    ]


def links(count=8):
    """A ring: between hosts a tenth of what goes inside one."""
    return [LinkReading(i, (i + 1) % count, 40.0 if i % 4 == 3 else 400.0) for i in range(count)]


def altered(all_of_them, number, **figures):
    them = list(all_of_them)
    them[number] = replace(them[number], figures={**them[number].figures, **figures})
    return them


def named(findings):
    return [(finding.kind, finding.devices) for finding in findings]


def test_sound_devices_are_fine_though_no_two_are_equal():
    assert judge(readings(), links(), slow=0.8, peak_tflops=989.4) == []


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("number", [0, 5, 7])
def test_one_figure_below_the_threshold_names_the_device_and_its_host(name, number):
    for share, found in ((0.79, [("slow", (number,))]), (0.83, [])):
        planted = altered(readings(), number, **{name: FIGURES[name] * share})
        findings = judge(planted, links(), slow=0.8)
        assert named(findings) == found
        if findings:
            line = findings[0].line
            assert f"device {number} (gpu:{number % 4} of process {number // 4} on node{number // 4})" in line
            assert name in line and "of the median" in line


def test_a_slow_link_is_compared_with_links_of_its_kind():
    for number in range(8):
        slowed = [replace(link, rate=link.rate / 2) if link.source == number else link for link in links()]
        found = judge(readings(), slowed, slow=0.8)
        # Of two links between hosts the slower is 0.67 of their median, which lies between them.
        assert named(found) == [("slow", (number, (number + 1) % 8))]
        assert "the link from device" in found[0].line


def test_kinds_are_compared_with_their_own_and_no_speed_is_judged_at_0():
    mixed = [replace(r, kind="NVIDIA A100") if r.device >= 4 else r for r in readings()]
    for number in range(4, 8):
        mixed = altered(mixed, number, **{name: value / 3 for name, value in FIGURES.items()})
    assert judge(mixed, [], slow=0.8) == []
    planted = altered(readings(), 2, **{MATMUL: 1.0})
    assert judge(planted, links(), slow=0.0, peak_tflops=989.4) == []


def test_all_equally_slow_shows_against_the_datasheet():
    capped = readings()
    for number in range(8):
        capped = altered(capped, number, **{MATMUL: 300.0})
    assert judge(capped, links(), slow=0.8) == []
    found = judge(capped, links(), slow=0.8, peak_tflops=989.4)
    assert named(found) == [("slow", (i,)) for i in range(8)]
    assert "30% of hardware.peak_tflops=989" in found[0].line


def test_what_is_wrong_or_missing_is_named_without_a_threshold():
    them = readings(12)
    them[3] = replace(them[3], wrong=["the matmul f32 product is wrong in 1 of 8192 rows"])
    them[6] = replace(them[6], memory=40 * 2**30)
    del them[9]
    found = judge(them, [], slow=0.0)
    assert named(found) == [("wrong", (3,)), ("missing", (8, 10, 11)), ("missing", (6,))]
    assert "process 2 on node2 has 3 devices, others have 4" in found[1].line
    assert "has 40.0 GiB of memory, others 80.0" in found[2].line
    report = Report(them, links()[:3], medians(them), found)
    rows = table(report).splitlines()
    assert len(rows) == 2 + 11 + 1
    assert [row.split()[-1] for row in rows[2:6]] == ["fine", "fine", "fine", "wrong"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_changed_element_of_a_product_shows_its_row_and_a_right_product_none(dtype):
    a, b = probe._factors(96)
    right = np.asarray(
        jax.jit(lambda a, b: jax.numpy.matmul(a, b, preferred_element_type=np.float32))(
            a.astype(dtype), b.astype(dtype)
        )
    )
    np.testing.assert_array_equal(right, a.astype(np.float64) @ b.astype(np.float64))
    assert probe.wrong_rows(right, a, b).size == 0
    rng = np.random.default_rng(2)
    for _ in range(100):
        row, column, bit = rng.integers(96), rng.integers(96), rng.integers(32)
        wrong = right.copy()
        wrong.view(np.uint32)[row, column] ^= np.uint32(1) << np.uint32(bit)
        # The lowest bits of a float that holds a whole number stand for fractions, and those show too.
        assert probe.wrong_rows(wrong, a, b).tolist() == [row]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_turns_of_a_ring_hold_each_link_once_and_no_device_twice(count):
    turns = between_devices.ring_turns(count)
    assert sorted(link for turn in turns for link in turn) == [(i, (i + 1) % count) for i in range(count)]
    for turn in turns:
        ends = [end for link in turn for end in link]
        assert len(set(ends)) == len(ends)
    assert between_devices.ring_turns(1) == []


def test_what_collectives_must_give_is_what_they_give():
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("data", "tensor"))
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    ring = Mesh(mesh.devices.reshape(-1), ("ring",))
    probes = [
        make(mesh, axis, 60)
        for make in (between_devices.all_reduce, between_devices.all_gather)
        for axis in mesh.axis_names
    ]
    for each in [*probes, between_devices.permute(ring, between_devices.ring_turns(6)[1], 60)]:
        for shard in each.run(each.given).addressable_shards:
            got = np.asarray(shard.data).reshape(-1)
            np.testing.assert_array_equal(got, each.wanted(numbers[shard.device]))
            assert (got != 0).any() or each.name == "link"
