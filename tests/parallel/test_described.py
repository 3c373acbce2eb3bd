"""Devices by name: shapes and names are checked here; where the compilers are installed, they are asked."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from parallel.config import MeshConfig
from parallel.described import (
    GPUS,
    TPU_NAMES,
    compiler_options,
    described_devices,
    gpu_topology,
)
from parallel.hlo import read_hlo
from parallel.mesh import build_layout


@pytest.mark.parametrize(
    ("name", "topology", "sizes"),
    [
        ("h200", "64", (1, 8, 8)),
        ("h200", 8, (1, 1, 8)),
        ("h200", "1", (1, 1, 1)),
        ("h200", "4", (1, 1, 4)),
        ("gb200", "64", (1, 16, 4)),
        ("h100", "3x4", (1, 3, 4)),
        ("h100", "2X4x8", (2, 4, 8)),
    ],
)
def test_shapes_of_gpu_clusters(name, topology, sizes):
    assert gpu_topology(name, topology) == sizes


@pytest.mark.parametrize(
    ("name", "topology", "words"),
    [
        ("h200", "12", ["hardware.topology=12", "hosts of 8 h200", "use 8 or 16", "12x1"]),
        ("h200", "8x", ["hardware.topology=8x", "(64)", "8x8"]),
        ("h200", "0", ["hardware.topology=0"]),
        ("h200", "-8", ["hardware.topology=-8"]),
        ("h200", "2x2x2x2", ["hardware.topology=2x2x2x2", "slices"]),
        ("h300", "8", ["hardware=h300", "did you mean h200?", "v5p"]),
        ("cpu", "8", ["hardware=cpu", "h200"]),
    ],
)
def test_what_is_no_cluster_is_refused(name, topology, words):
    with pytest.raises(ValueError) as error:
        described_devices(name, topology)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "package"), [("h200", "jax[cuda13]"), ("v5p", "jax[tpu]")])
def test_a_compiler_that_is_not_there_comes_with_its_install_command(name, package, monkeypatch):
    def missing(*args, platform, **kwargs):
        if platform == "cuda":
            raise NotImplementedError("topology not implemented for cuda")
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ImportError) as error:
        described_devices(name, "2x2x2")
    assert f"pip install '{package}'" in str(error.value)


def test_what_a_compiler_says_while_it_loads_is_kept_from_the_reader(monkeypatch, capfd):
    def loud(*args, **kwargs):
        os.write(2, b"E0000 a warning\n")
        raise RuntimeError("INVALID_ARGUMENT: no such torus\nand a trace")

    monkeypatch.setattr(topologies, "get_topology_desc", loud)
    with pytest.raises(ValueError, match=r"hardware.topology=3x5 is no v5p torus \(INVALID_ARGUMENT"):
        described_devices("v5p", "3x5")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", GPUS)
def test_a_described_gpu_compiles(name):
    try:
        devices = described_devices(name, 8)
    except ImportError as error:
        pytest.skip(f"NOT COMPILED FOR A GPU: {error}")
    assert {d.device_kind for d in devices} == {GPUS[name].kind}
    assert devices[0].compute_capability == "{}.{}".format(*GPUS[name].capability)
    assert len({d.process_index for d in devices}) == 8 // GPUS[name].per_host
    check_product(devices)


@pytest.mark.parametrize("name", TPU_NAMES)
def test_a_described_tpu_compiles(name):
    try:
        devices = described_devices(name, "2x2x2" if name in ("v5p", "tpu7x") else "2x4")
    except ImportError as error:
        pytest.skip(f"NOT COMPILED FOR A TPU: {error}")
    check_product(devices[:8] if name != "tpu7x" else devices)


def check_product(devices):
    """A product contracted over all devices: each multiplies its part, and parts are added up."""
    layout = build_layout(MeshConfig(data=1, tensor=len(devices)), devices)
    split = NamedSharding(layout.mesh, PartitionSpec(None, "tensor"))
    x = jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16, sharding=split)
    product = jax.jit(lambda x: x @ x.T, out_shardings=layout.replicated())
    compiled = product.lower(x).compile(compiler_options(devices))
    reading = read_hlo(compiled.as_text(), layout.mesh.shape)
    assert ("all-reduce", ("tensor",)) in reading.totals()
    assert reading.flops == 2 * 512 * 512 * 2048 // len(devices)
    assert compiled.memory_analysis().argument_size_in_bytes == 512 * 2048 * 2 // len(devices)
