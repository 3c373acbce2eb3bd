"""Devices by name: shapes and names are checked here; where the compilers are installed, they are asked."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from artifacts.config import RunConfig
from benchmarks.planner.described import describe_tpu
from models.config import ModelConfig
from optim.config import AdamWConfig, ConstantConfig
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from planner.described_devices import GPUS, TPU_NAMES, compiler_options, described_devices, gpu_topology
from planner.hlo.program import read_hlo
from tests.compilers import skip_without
from training import program
from training.config import Config, TrainingConfig


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


@pytest.mark.parametrize(("name", "extra"), [("h200", "plan-gpu"), ("v5p", "plan-tpu")])
def test_a_compiler_that_is_not_there_comes_with_its_install_command(name, extra, monkeypatch):
    def missing(*args, platform, **kwargs):
        if platform == "cuda":
            raise NotImplementedError("topology not implemented for cuda")
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        described_devices(name, "2x2x2")
    assert f"pip install -e '.[{extra}]'" in str(error.value)


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
        skip_without(error)
    assert {d.device_kind for d in devices} == {GPUS[name].kind}
    assert devices[0].compute_capability == "{}.{}".format(*GPUS[name].capability)
    assert len({d.process_index for d in devices}) == 8 // GPUS[name].per_host
    check_product(devices)


@pytest.mark.parametrize("name", TPU_NAMES)
def test_a_described_tpu_compiles(name):
    try:
        devices = described_devices(name, "2x2x2" if name in ("v5p", "tpu7x") else "2x4")
    except ImportError as error:
        skip_without(error)
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


def small_llama(**mesh):
    config = Config(
        run=RunConfig(name="described"),
        model=ModelConfig(
            vocab_size=1024, num_layers=8, d_model=512, num_heads=16, num_kv_heads=8, head_dim=64, d_ff=1024
        ),
        mesh=MeshConfig(rules=mesh_rules(), data=1, **mesh),
        optim=AdamWConfig(),
        schedule=ConstantConfig(warmup_steps=2),
        training=TrainingConfig(
            num_steps=4,
            global_batch_size=32,
            precision="bfloat16",
            remat="dots",
            loss_chunk=1024,
            attention="cudnn",
            max_documents=8,
        ),
    )
    config.data.seq_len = 512
    return config


def mesh_rules():
    path = Path(__file__).resolve().parents[2] / "configs" / "mesh" / "_rules.yaml"
    return yaml.safe_load(path.read_text("utf-8"))["rules"]


MESHES = {
    "fsdp x tensor": ({"fsdp": 8, "tensor": 8}, "1f1b"),
    "pipeline x fsdp x tensor": ({"pipeline": 4, "fsdp": 2, "tensor": 8}, "1f1b"),
    "pipeline x fsdp x tensor, backward split": ({"pipeline": 4, "fsdp": 2, "tensor": 8}, "zero_bubble"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "schedule"), MESHES.values(), ids=MESHES)
def test_a_step_on_64_described_gpus(sizes, schedule):
    """With cuDNN attention; parameters are only gathered over fsdp, activations never over tensor."""
    try:
        devices = described_devices("h200", 64)
    except ImportError as error:
        skip_without(error)
    config = small_llama(**sizes)
    config.pipeline.schedule = schedule
    layout = build_layout(config.mesh, devices)
    built = program.build_program(config, layout)
    options = {**built.compiler_options, **compiler_options(devices)}
    compiled = replace(built, compiler_options=options).compile_train()
    reading = read_hlo(compiled.as_text(), layout.mesh.shape)
    layers = config.model.num_layers // sizes.get("pipeline", 1)
    ticks = reading.custom_calls["__cudnn$fmhaSoftmaxBackward"] / layers
    assert ticks == (1 if layers == 8 else 8 + 3)
    assert all(c.branch is None for c in reading.collectives) and not reading.uncounted_loops
    by_kind = {}
    for (kind, axes), (_, size) in reading.totals().items():
        by_kind.setdefault(kind, {})[axes] = size
    assert set(by_kind["all-gather"]) == set(by_kind["reduce-scatter"]) == {("fsdp",)}
    assert set(by_kind.get("collective-permute", {("pipeline",): 0})) == {("pipeline",)}
    assert by_kind["all-reduce"].get(("fsdp",), 0) < 2**16  # norms of gradients, and no gradient
    assert compiled.memory_analysis().argument_size_in_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_step_on_described_tpus_has_splash_and_nothing_quadratic(scan_layers):
    try:
        devices = described_devices("v6e", "2x2")
    except ImportError as error:
        skip_without(error)
    config = small_llama(fsdp=4)
    sizes = {"num_layers": 2, "d_model": 384, "num_heads": 8, "num_kv_heads": 4, "d_ff": 768}
    config.model = replace(config.model, vocab_size=1280, **sizes)
    config.training = replace(
        config.training, attention="auto", global_batch_size=8, loss_chunk=512, scan_layers=scan_layers
    )
    config.data.seq_len = 1024
    row = describe_tpu(config, devices, "v6e", "2x2")
    assert (row.attention, row.why) == ("splash", "auto on tpu")
    assert not row.quadratic and not row.logits
    # Of two layers, looped over or not; its forward is not run again in the backward pass.
    kernels = ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals")
    assert row.kernels == {f"splash_mha_{name}": 2 for name in kernels}
