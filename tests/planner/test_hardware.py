"""A cluster from its datasheet: sizes that agree, and one line where they do not."""

from dataclasses import replace

import pytest
import yaml

from configs.groups import CONFIG_DIR, options
from parallel.hardware import DeviceConfig, HardwareConfig, LinkConfig, default_torus, machine_of
from planner.described_devices import GPUS


def hardware(name, **changes):
    """As the file has it."""
    words = yaml.safe_load((CONFIG_DIR / "hardware" / f"{name}.yaml").read_text())
    device = words.pop("device")
    links = [LinkConfig(**link) for link in device.pop("links")]
    return HardwareConfig(**{**words, "device": DeviceConfig(**device, links=links), **changes})


DATASHEETS = [name for name in options("hardware") if name not in ("auto", "cpu")]


@pytest.mark.parametrize("name", DATASHEETS)
def test_every_datasheet_is_a_machine(name):
    machine = machine_of(hardware(name))
    assert machine.name == name
    assert machine.devices == machine.per_node
    near, far = machine.links[0], machine.links[-1]
    assert near.bytes_per_second > far.bytes_per_second
    assert machine.bandwidth > near.bytes_per_second
    assert machine.flops["bfloat16"] == hardware(name).peak_tflops * 1e12


@pytest.mark.parametrize(
    ("name", "changes", "devices", "topology"),
    [
        ("h200", {}, 8, "1x8"),
        ("h200", {"nodes": 2}, 16, "2x8"),
        ("h100", {"topology": "8x8"}, 64, "8x8"),
        ("h100", {"topology": "64"}, 64, "8x8"),
        ("h100", {"topology": "1x1"}, 1, "1x1"),
        ("gb200", {"nodes": 18}, 72, "18x4"),
        ("v5p", {"topology": "4x4x4"}, 64, "4x4x4"),
        ("v5p", {"topology": "2*4x4x4"}, 128, "2*4x4x4"),
        ("v5p", {"nodes": 16}, 64, "4x4x4"),
        ("v6e", {"topology": "16x16", "nodes": 64}, 256, "16x16"),
    ],
)
def test_nodes_and_topology_say_how_many(name, changes, devices, topology):
    machine = machine_of(hardware(name, **changes))
    assert (machine.devices, machine.topology) == (devices, topology)


def test_without_either_the_mesh_says_it():
    assert machine_of(hardware("h200"), 32).devices == 32
    assert machine_of(hardware("h200", nodes=1), 32).devices == 8


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("h200", {"topology": "8x8", "nodes": 2}, ["topology=8x8 is 64", "nodes=2 of 8 are 16"]),
        ("v5p", {"topology": "4x4"}, ["hardware.topology=4x4", "4x4x4"]),
        ("v6e", {"topology": "ax4"}, ["hardware.topology=ax4", "16x16"]),
        ("h200", {"topology": "2*8"}, ["hardware.topology=2*8", "8x8"]),
        ("h200", {"device": None}, ["hardware=h200", "hardware.device.memory_gib"]),
    ],
)
def test_what_is_no_cluster_is_one_line(name, changes, words):
    with pytest.raises(ValueError) as error:
        machine_of(hardware(name, **changes))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (DeviceConfig, {"kind": "gpus"}, ["hardware.device.kind=gpus", "did you mean gpu?"]),
        (DeviceConfig, {"per_node": 0}, ["per_node=0", "1 or more"]),
        (DeviceConfig, {"reached": 1.5}, ["reached=1.5", "at most 1"]),
        (DeviceConfig, {"memory_gib": -1.0}, ["memory_gib=-1.0", "above 0"]),
        (LinkConfig, {"gigabytes_per_second": 0.0}, ["gigabytes_per_second=0.0", "above 0"]),
        (LinkConfig, {"devices": 0}, ["links.devices=0", "null"]),
        (HardwareConfig, {"nodes": 0}, ["hardware.nodes=0", "1 or more"]),
    ],
)
def test_values_out_of_range_are_refused(kind, values, words):
    with pytest.raises(ValueError) as error:
        kind(**values)
    assert all(word in str(error.value) for word in words), error.value


def test_a_torus_is_as_even_as_can_be():
    assert default_torus(64, 3) == (4, 4, 4)
    assert default_torus(256, 2) == (16, 16)
    assert default_torus(128, 3) == (4, 4, 8)
    assert default_torus(7, 2) == (1, 7)


def test_what_a_program_may_fill_is_less_than_there_is():
    full = replace(hardware("h200").device, memory_gib=141.0)
    assert machine_of(hardware("h200")).memory_bytes < machine_of(hardware("h200", device=full)).memory_bytes


@pytest.mark.parametrize("name", [name for name in DATASHEETS if hardware(name).device.kind == "gpu"])
def test_datasheet_and_description_are_of_one_gpu(name):
    gpu = GPUS[name]
    device = hardware(name).device
    assert 0.9 * gpu.memory_bytes < device.memory_gib * 2**30 < gpu.memory_bytes
    assert device.bandwidth * 1e9 == pytest.approx(gpu.bandwidth, rel=0.01)
    assert device.per_node == gpu.per_host
    assert (device.fp8_tflops is not None) == (gpu.capability >= (8, 9))
