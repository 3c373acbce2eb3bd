"""Devices to a named mesh: sizes that multiply out, and slow links only where mesh.dcn puts them."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from parallel.config import MESH_AXES, ContextConfig, MeshConfig, PipelineConfig, divisors, mesh_shape
from parallel.mesh import build_layout, device_grid

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Chip:
    """What a device of a pod says of itself."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"  # a TPU's would need coordinates on a torus
    device_kind: str = "chip"


@dataclass(frozen=True)
class Host:
    """A device of a cluster without slices."""

    id: int
    process_index: int
    platform: str = "neuron"
    device_kind: str = "core"


def pod(slices, each):
    """`slices` of `each` chips, two a process, as no one would list them."""
    chips = [Chip(s * each + c, (s * each + c) // 2, s) for s in range(slices) for c in range(each)]
    return [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]


def grid(config, devices):
    return device_grid(mesh_shape(config, len(devices)), config.dcn, devices)


def by_slice(found, attribute="slice_index"):
    return np.vectorize(lambda device: getattr(device, attribute))(found)


def along(array, axis):
    """The array with one mesh axis in front and all others behind it: [size, rest]."""
    return np.moveaxis(array, MESH_AXES.index(axis), 0).reshape(array.shape[MESH_AXES.index(axis)], -1)


def test_a_dcn_axis_crosses_slices_and_no_other_does():
    config = MeshConfig(data=1, replica=2, fsdp=2, tensor=2, dcn={"replica": 2})
    slices = by_slice(grid(config, pod(2, 4)))
    assert slices.shape == (2, 1, 1, 2, 1, 1, 2)
    assert along(slices, "replica").tolist() == [[0] * 4, [1] * 4]


def test_an_axis_may_lie_partly_inside_a_slice():
    config = MeshConfig(data=4, fsdp=2, dcn={"data": 2})
    slices = along(by_slice(grid(config, pod(2, 4))), "data")
    assert slices.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_two_axes_may_cross_slices():
    config = MeshConfig(data=1, replica=2, pipeline=2, fsdp=-1, dcn={"replica": 2, "pipeline": 2})
    slices = by_slice(grid(config, pod(4, 2)))
    assert slices.reshape(2, 2, 2).tolist() == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]


def test_every_device_is_in_the_mesh_once():
    for dcn in ({}, {"data": 2}, {"data": 2, "tensor": 1}):
        found = grid(MeshConfig(data=4, tensor=2, dcn=dcn), pod(2, 4))
        assert sorted(device.id for device in found.flat) == list(range(8))


def test_processes_stand_for_slices_where_there_are_none():
    hosts = [Host(i, i // 4) for i in range(8)]
    processes = by_slice(
        grid(MeshConfig(data=1, replica=2, fsdp=4, dcn={"replica": 2}), hosts), "process_index"
    )
    assert along(processes, "replica").tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (pod(4, 2), ["mesh.dcn.replica=2 asks for 2 slices", "8 devices are 4 slices", "product is 4"]),
        (pod(1, 8), ["asks for 2 slices", "8 devices are 1 slice;", "use mesh.dcn={}"]),
        ([Host(i, 0) for i in range(8)], ["8 devices are 1 slice, counted by process", "use mesh.dcn={}"]),
        ([Chip(i, i, int(i > 2)) for i in range(8)], ["hold 3, 5 devices", "equal slices"]),
    ],
)
def test_slices_that_are_not_there_are_refused(devices, words):
    with pytest.raises(ValueError) as error:
        grid(MeshConfig(data=1, replica=2, fsdp=4, dcn={"replica": 2}), devices)
    for word in words:
        assert word in str(error.value), error.value


def test_one_process_without_slices_says_so():
    with pytest.raises(ValueError, match="8 devices are 1 slice, counted by process; use mesh.dcn={}"):
        build_layout(MeshConfig(data=8, dcn={"data": 2}), jax.devices())


def test_a_factor_of_one_needs_no_slices():
    mesh = build_layout(MeshConfig(data=8, dcn={"data": 1}), jax.devices()).mesh
    assert dict(mesh.shape) == {**dict.fromkeys(MESH_AXES, 1), "data": 8}
    assert list(mesh.devices.flat) == jax.devices()


def test_a_factor_that_does_not_divide_its_axis_is_refused():
    with pytest.raises(
        ValueError, match="mesh.dcn.data=3 does not divide mesh.data=8; use mesh.dcn.data=1, 2, 4, 8"
    ):
        mesh_shape(MeshConfig(data=-1, dcn={"data": 3}), 8)


@pytest.mark.parametrize("axis", MESH_AXES)
def test_any_axis_takes_what_is_left(axis):
    sizes = mesh_shape(MeshConfig(**{"data": 1, axis: -1}), 8)
    assert sizes == {**dict.fromkeys(MESH_AXES, 1), axis: 8}
    other = "fsdp" if axis != "fsdp" else "data"
    assert mesh_shape(MeshConfig(**{"data": 1, axis: -1, other: 2}), 8)[axis] == 4


def test_neighbours_along_the_last_axis_are_neighbours_on_the_machine():
    mesh = build_layout(MeshConfig(data=2, tensor=4), jax.devices()).mesh
    ids = np.vectorize(lambda device: device.id)(mesh.devices).reshape(2, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeshConfig(tensor=0), ["mesh.tensor=0", "-1 for what is left"]),
        (lambda: MeshConfig(dcn={"date": 2}), ["an axis of mesh.dcn=date", "did you mean data?"]),
        (lambda: MeshConfig(dcn={"data": 0}), ["mesh.dcn.data=0", "1 or more"]),
        (lambda: PipelineConfig(schedule="1fb1"), ["pipeline.schedule=1fb1", "did you mean 1f1b?"]),
        (lambda: PipelineConfig(microbatches=0), ["pipeline.microbatches=0", "1 or more"]),
        (lambda: PipelineConfig(virtual_stages=0), ["pipeline.virtual_stages=0", "1 or more"]),
        (lambda: ContextConfig(attention="rang"), ["context.attention=rang", "did you mean ring?"]),
    ],
)
def test_a_value_that_can_never_be_is_refused_at_once(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_divisors():
    assert [divisors(n) for n in (1, 7, 12, 36)] == [
        (1,),
        (1, 7),
        (1, 2, 3, 4, 6, 12),
        (1, 2, 3, 4, 6, 9, 12, 18, 36),
    ]


TWO = """
import sys, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from parallel.config import MeshConfig
from parallel.mesh import build_layout
mesh = build_layout(MeshConfig(data=1, tensor=2, fsdp=-1, dcn={"fsdp": 2})).mesh
found = [[d.process_index for d in row] for row in mesh.devices.reshape(4, 2)]
assert found == [[0, 0], [0, 0], [1, 1], [1, 1]], found
total = jax.jit(lambda x: x.sum())(jax.make_array_from_callback(
    (8,), jax.NamedSharding(mesh, jax.P(("fsdp", "tensor"))), lambda index: np.arange(8.0)[index]))
assert float(total) == 28.0
"""


def test_two_real_processes_are_two_slices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO, str(port)]
    env = {**os.environ, **flags}
    started = [
        subprocess.Popen([*command, str(p)], cwd=ROOT, env=env, stderr=subprocess.PIPE) for p in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
