"""Every mesh computes what one device computes; moments live where their parameters live."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifacts.config import RunConfig
from models.config import ModelConfig
from optim.config import AdamWConfig, ConstantConfig, LionConfig, MuonConfig
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from training.config import Config, TrainingConfig
from training.program import build_program
from training.state import init_state, shardings

RULES = {
    "embed": ["fsdp"],
    "heads": ["tensor"],
    "kv_heads": ["tensor"],
    "mlp": ["tensor"],
    "vocab": ["tensor"],
    "batch": ["replica", "data", "fsdp"],
    "length": ["context"],
    "act_length": ["context"],
    "act_heads": ["tensor"],
    "act_kv_heads": ["tensor"],
    "act_mlp": ["tensor"],
    "act_vocab": ["tensor"],
}
STEPS = 5
ONE = (("data", 1),)
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


def run(mesh=ONE, optim="adamw", **training):
    """Losses and gradient norms of each step, and the state and its bytes a device before and after."""
    return run_once(mesh, optim, tuple(training.items()))


def bytes_of_first_device(state):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


@functools.cache
def run_once(mesh, optim, training):
    config = make_config(dict(mesh), optim, **dict(training))
    ema = config.training.ema_decay is not None
    devices = math.prod(size for _, size in mesh)
    program = build_program(config, build_layout(config.mesh, jax.devices()[:devices]))
    state = init_state(program.model, program.tx, program.state, seed=0, ema=ema)
    before = bytes_of_first_device(state)
    step = program.compile_train()
    losses = []
    for i in range(STEPS):
        batch = jax.device_put(packed_batch(i), shardings(program.batch))
        state, metrics = step(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(losses), state, (before, bytes_of_first_device(state))


def mesh_of(**sizes):
    return tuple(sizes.items())


FSDP_TENSOR = mesh_of(fsdp=4, tensor=2)
# What is computed in the same run to save a compilation, and changes no loss.
ALSO = {FSDP_TENSOR: {"ema_decay": 0.5}, mesh_of(replica=2, fsdp=2, tensor=2): {"accumulation_steps": 2}}
MESHES = [
    mesh_of(data=8),
    mesh_of(fsdp=8),
    mesh_of(tensor=8),  # twice as many devices as K/V heads: they are repeated
    FSDP_TENSOR,
    mesh_of(replica=2, fsdp=2, tensor=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: ",".join(f"{a}={n}" for a, n in mesh))
def test_mesh_equals_one_device(mesh):
    losses, _, _ = run(mesh, **ALSO.get(mesh, {}))
    np.testing.assert_allclose(losses, run()[0], rtol=1e-5)


@pytest.mark.parametrize("optim", ["muon", "lion"])
def test_optimizers_equal_one_device(optim):
    losses, _, _ = run(FSDP_TENSOR, optim)
    np.testing.assert_allclose(losses, run(ONE, optim)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "training",
    [
        {"accumulation_steps": 4, "remat": "full"},
        {"remat": "dots", "scan_layers": False},
        {"attention": "chunked"},
    ],
    ids=str,
)
def test_how_the_step_is_computed_does_not_change_it(training):
    losses, _, _ = run(**training)
    np.testing.assert_allclose(losses, run()[0], rtol=1e-5)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_moments_are_sharded_like_their_parameters(optim):
    also = ALSO[FSDP_TENSOR] if optim == "adamw" else {}
    _, state, (before, after) = run(FSDP_TENSOR, optim, **also)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # All but the norms (over fsdp only) and counters is split eight ways.
    assert before < whole / 8 * 1.1
    assert after == before


def test_average_is_an_average():
    _, state, _ = run(FSDP_TENSOR, **ALSO[FSDP_TENSOR])
    moved = [
        float(jnp.max(jnp.abs(p - e)))
        for p, e in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True)
    ]
    assert max(moved) > 0


def test_initial_weights_do_not_depend_on_the_mesh():
    states = []
    for mesh in (ONE, FSDP_TENSOR):
        config = make_config(dict(mesh))
        program = build_program(config, build_layout(config.mesh, jax.devices()[: 1 if mesh is ONE else 8]))
        states.append(init_state(program.model, program.tx, program.state, seed=3, ema=False))
    for a, b in zip(*(jax.tree.leaves(jax.device_get(s.params)) for s in states), strict=True):
        np.testing.assert_array_max_ulp(a, b, 4)  # the same random bits; the transform may round its last bit
