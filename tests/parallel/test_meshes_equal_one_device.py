"""Every mesh computes what one device computes; moments live where their parameters live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import Config
from models.config import ModelConfig
from optim.config import AdamWConfig, ConstantConfig, LionConfig, MuonConfig
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from training.config import RunConfig, TrainingConfig
from training.program import build_program
from training.state import init_state, shardings, state_bytes_per_device

RULES = {
    "embed": ["fsdp"],
    "heads": ["tensor"],
    "kv_heads": ["tensor"],
    "mlp": ["tensor"],
    "vocab": ["tensor"],
    "batch": ["replica", "data", "fsdp"],
    "length": ["context"],
    "act_heads": ["tensor"],
    "act_kv_heads": ["tensor"],
    "act_mlp": ["tensor"],
    "act_vocab": ["tensor"],
}
STEPS = 6
ONE = {"data": 1}
OPTIMIZERS = {"adamw": AdamWConfig(), "muon": MuonConfig(), "lion": LionConfig()}


def make_config(mesh, optim="adamw", **training):
    values = {"num_steps": STEPS, "global_batch_size": 8, "loss_chunk": 64, **training}
    config = Config(
        run=RunConfig(name="test"),
        model=ModelConfig(
            vocab_size=256, num_layers=2, d_model=64, num_heads=8, num_kv_heads=4, head_dim=8, d_ff=128
        ),
        mesh=MeshConfig(rules=RULES, **{"data": 1, **mesh}),
        optim=OPTIMIZERS[optim],
        schedule=ConstantConfig(warmup_steps=2),
        training=TrainingConfig(**values),
    )
    config.data.seq_len = 32
    return config


def packed_batch(step, rows=8, length=32):
    rng = np.random.default_rng(step)
    stream = rng.integers(0, 256, (rows, length + 1))
    cut = rng.integers(4, length - 4, (rows, 1))
    t = np.arange(length)[None]
    weights = np.ones((rows, length), np.float32)
    weights[0, : step + 3] = 0  # unequal weights, so that a mean of means would show
    return {
        "tokens": stream[:, :-1].astype(np.int32),
        "targets": stream[:, 1:].astype(np.int32),
        "positions": np.where(t < cut, t, t - cut).astype(np.int32),
        "segment_ids": np.where(t < cut, 1, 2).astype(np.int32),
        "loss_weights": weights,
    }


def run(config):
    devices = 1
    for size in vars(config.mesh).values():
        devices *= size if isinstance(size, int) else 1
    program = build_program(config, build_layout(config.mesh, jax.devices()[:devices]))
    state = init_state(
        program.model, program.tx, program.state, seed=0, ema=config.training.ema_decay is not None
    )
    step = program.compile_train()
    losses = []
    for i in range(STEPS):
        batch = jax.device_put(packed_batch(i), shardings(program.batch))
        state, metrics = step(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(losses), state, program


@pytest.fixture(scope="module")
def one_device():
    return {name: run(make_config(ONE, name))[0] for name in OPTIMIZERS}


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},  # twice as many devices as K/V heads: they are repeated
    {"tensor": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"replica": 2, "data": 2, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_mesh_equals_one_device(mesh, one_device):
    losses, _, _ = run(make_config(mesh))
    np.testing.assert_allclose(losses, one_device["adamw"], rtol=1e-5)


@pytest.mark.parametrize("optim", ["muon", "lion"])
def test_optimizers_equal_one_device(optim, one_device):
    losses, _, _ = run(make_config({"fsdp": 4, "tensor": 2}, optim))
    np.testing.assert_allclose(losses, one_device[optim], rtol=1e-5)


@pytest.mark.parametrize(
    "training",
    [
        {"accumulation_steps": 2},
        {"accumulation_steps": 4, "remat": "full"},
        {"remat": "dots", "scan_layers": False},
        {"attention": "chunked"},
        {"ema_decay": 0.9},
    ],
    ids=str,
)
def test_how_the_step_is_computed_does_not_change_it(training, one_device):
    losses, _, _ = run(make_config(ONE, **training))
    np.testing.assert_allclose(losses, one_device["adamw"], rtol=1e-5)


def test_accumulation_on_a_mesh_equals_one_device(one_device):
    losses, _, _ = run(make_config({"data": 2, "tensor": 2}, accumulation_steps=4))
    np.testing.assert_allclose(losses, one_device["adamw"], rtol=1e-5)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_moments_are_sharded_like_their_parameters(optim):
    config = make_config({"fsdp": 4, "tensor": 2}, optim, ema_decay=0.9)
    program = build_program(config, build_layout(config.mesh))
    state = init_state(program.model, program.tx, program.state, seed=0, ema=True)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # All but the norms (over fsdp only) and counters is split eight ways.
    assert state_bytes_per_device(state) < whole / 8 * 1.1
    _, after, _ = run(config)
    assert state_bytes_per_device(after) == state_bytes_per_device(state)


def test_initial_weights_do_not_depend_on_the_mesh():
    states = []
    for mesh in (ONE, {"fsdp": 4, "tensor": 2}):
        config = make_config(mesh)
        program = build_program(config, build_layout(config.mesh, jax.devices()[: 1 if mesh is ONE else 8]))
        states.append(init_state(program.model, program.tx, program.state, seed=3, ema=False))
    for a, b in zip(*(jax.tree.leaves(jax.device_get(s.params)) for s in states), strict=True):
        np.testing.assert_array_max_ulp(a, b, 4)  # the same random bits; the transform may round its last bit


def test_average_is_an_average():
    _, state, _ = run(make_config(ONE, ema_decay=0.5))
    moved = [
        float(jnp.max(jnp.abs(p - e)))
        for p, e in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True)
    ]
    assert max(moved) > 0
