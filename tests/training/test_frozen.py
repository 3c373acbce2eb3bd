"""Weights that do not train lie beside those that do: on any mesh, saved and verified with them."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifacts.checkpoints.errors import CorruptCheckpoint
from artifacts.checkpoints.files import LIST
from artifacts.checkpoints.inspect import export_weights
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import named_leaves
from artifacts.config import CheckpointConfig
from models.weights import merged
from optim.config import MuonConfig
from optim.muon import Matrix
from parallel.partition import join
from serving.generator import Generator
from serving.sampling import Sampling
from tests.parallel.small import make_config, make_program, packed_batch, place
from tests.training.states import assert_equal, written
from training.config import AdapterConfig, LocalSGDConfig
from training.objectives.base import build_objective
from training.state import matrix_dims, shardings

SMALL = {
    "num_layers": 4,
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 64,
    "tie_embeddings": False,
}
QLORA = AdapterConfig(rank=2, alpha=1.0, bits=4, group=8)
LORA = dataclasses.replace(QLORA, bits=None, group=None)


def program_of(mesh=None, adapters=QLORA, **values):
    config = make_config(mesh, model=SMALL, **values)
    return make_program(config, adapters)


def trained(program, steps=2):
    """The state after some steps from a b that is not zero, and each step's loss and gradient norm."""
    state, train, seen = started(program), program.compile_train(), []
    for i in range(steps):
        state, metrics = train(state, place(program, packed_batch(i)))
        seen.append([float(jnp.mean(metrics[name])) for name in ("loss", "grad_norm")])
    return state, np.array(seen)


def started(program):
    """Step 0 with every factor b at 0.02."""
    state = program.init_state(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.02 if path[-1].name == "b" else x, state.params
    )
    return state.replace(params=jax.device_put(params, shardings(program.state.params)))


@pytest.fixture(scope="module")
def alone():
    """One device: the program, its state after two steps on the host, and what it measured."""
    program = program_of()
    state, seen = trained(program)
    return program, jax.device_get(state), seen


def test_only_the_factors_train_and_by_the_gradient_of_the_merged_weight(alone):
    program, state, _ = alone
    assert {path[-1].name for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {"a", "b"}
    moments = jax.tree.leaves(state.opt_state["direction"].mu)
    assert len(moments) == len(jax.tree.leaves(state.params))
    first = started(program)
    assert_equal(first.frozen, state.frozen)  # to the bit
    for before, after in zip(jax.tree.leaves(first.params), jax.tree.leaves(state.params), strict=True):
        assert np.any(before != after)
    objective, batch = build_objective(make_config().objective), place(program, packed_batch(0))

    def gradients(params, frozen, whole):
        def of(params):
            weights = whole(join(params, frozen))
            means, _ = program.strategy.value_and_grad(
                objective, program.model, weights, batch, jax.random.key(0), program.ops
            )
            return means["objective"]

        return jax.grad(of)(params)

    ours = jax.jit(
        lambda params, frozen: program.strategy.value_and_grad(
            objective, program.model, params, batch, jax.random.key(0), program.ops, frozen
        )[1]
    )(first.params, first.frozen)
    theirs = jax.jit(lambda params, frozen: gradients(params, frozen, merged))(first.params, first.frozen)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(b).max())))


MESHES = {
    "fsdp_tensor": ({"fsdp": 2, "tensor": 2}, {}),
    "accumulation": ({"data": 2}, {"accumulation_steps": 2, "scan_layers": False, "remat": "dots"}),
    "context": ({"context": 2}, {}),
    "1f1b": ({"pipeline": 2, "data": 2}, {}),
    "interleaved": (
        {"pipeline": 2},
        {"pipeline": {"schedule": "interleaved_1f1b", "virtual_stages": 2}},
    ),
    "zero_bubble": ({"pipeline": 2}, {"pipeline": {"schedule": "zero_bubble"}}),
}


@pytest.mark.parametrize("name", MESHES)
def test_every_schedule_equals_one_device(name, alone):
    mesh, values = MESHES[name]
    program = program_of(mesh, **values)
    state, seen = trained(program)
    _, expected, losses = alone
    np.testing.assert_allclose(seen, losses, rtol=1e-5)
    found = jax.device_get(program.to_canonical(state))
    # Levels are the same to the bit; what is drawn, and scales of it, to the last one.
    for item, limits in (("params", {"rtol": 1e-5, "atol": 1e-5}), ("frozen", {"rtol": 1e-6})):
        names, others = named_leaves(getattr(found, item)), jax.tree.leaves(getattr(expected, item))
        for (path, x), y in zip(names.items(), others, strict=True):
            np.testing.assert_allclose(x, y, err_msg=path, **limits)


@pytest.fixture(scope="module")
def stored(alone, tmp_path_factory):
    """The checkpoint of the state after two steps."""
    program, state, _ = alone
    path = tmp_path_factory.mktemp("frozen") / "checkpoints"
    written(path, jax.device_put(state, shardings(program.canonical))).close()
    return path


def test_a_checkpoint_holds_both_with_digests_and_goes_on_bitwise(alone, stored):
    program, state, _ = alone
    checkpoints = Checkpoints(stored, CheckpointConfig())
    restored, record = checkpoints.restore(2, program.canonical)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_equal(restored, state)
    names = {name.rpartition("attention.q.")[2] for name in record["digests"] if "frozen.segments" in name}
    assert {"w.q", "w.scale"} <= names
    assert record["types"]["frozen.segments.0.0.attention.q.w.q"] == "uint8[4, 16, 4, 8]"
    train, batch = program.compile_train(), place(program, packed_batch(2))
    onward, _ = train(jax.device_put(state, shardings(program.state)), batch)
    again, _ = train(restored, batch)
    assert_equal(again, onward)


def test_a_checkpoint_of_one_device_restores_into_stages_and_shards(alone, stored):
    _, state, _ = alone
    for mesh in ({"fsdp": 2, "tensor": 2}, {"pipeline": 2}):
        program = program_of(mesh)
        restored, _ = Checkpoints(stored, CheckpointConfig()).restore(2, program.canonical)
        back = program.to_canonical(program.from_canonical(restored))
        assert_equal(jax.device_get(back), state)


def test_an_altered_byte_of_a_quantized_weight_is_found(alone, stored, tmp_path):
    program, state, _ = alone
    path = tmp_path / "checkpoints"
    shutil.copytree(stored, path)
    (path / "2" / LIST).unlink(missing_ok=True)  # by the array's own digest, not the file's
    levels = np.asarray(state.frozen["segments"]["0"]["0"]["mlp"]["up"].w.q).tobytes()
    file = next(f for f in sorted(path.rglob("*")) if f.is_file() and levels in f.read_bytes())
    raw = bytearray(file.read_bytes())
    raw[raw.index(levels) + 100] ^= 16
    file.write_bytes(raw)
    with pytest.raises(
        CorruptCheckpoint, match=r"1 arrays are altered, first frozen\.segments.*mlp\.up\.w\.q"
    ):
        Checkpoints(path, CheckpointConfig(), read_only=True).restore(2, program.canonical)


def test_weights_of_another_form_are_refused_by_name(stored):
    for adapters in (LORA, dataclasses.replace(QLORA, rank=4), dataclasses.replace(QLORA, bits=8), None):
        with pytest.raises(ValueError, match=r"checkpoints/2: \S+ is .* in this config; use the config"):
            Checkpoints(stored, CheckpointConfig()).restore(2, program_of(adapters=adapters).canonical)


def test_what_trains_is_not_exported_without_what_is_frozen(stored, tmp_path):
    with pytest.raises(
        ValueError,
        match="step 2 has weights that do not train beside its params.* writes all of them, merged",
    ):
        export_weights(
            stored.parent,
            Checkpoints(stored, CheckpointConfig(), read_only=True),
            2,
            tmp_path / "out",
            item="params",
            dtype="float32",
        )


def test_a_generator_on_a_mesh_writes_what_the_merged_model_writes(alone):
    """Quantized tables and merged projections, on the training mesh."""
    one, state, _ = alone
    many = program_of({"fsdp": 2, "tensor": 2})
    weights = jax.device_put(state.weights, shardings(many.state.weights))
    prompts, keys = [[1, 2, 3], [4] * 20], jax.random.split(jax.random.key(0), 2)
    written, scores = [], []
    for program, params in ((one, merged(state.weights)), (many, weights)):
        generator = Generator(program.model, params, program.ops, program.layout)
        written.append(generator.complete(prompts, Sampling(), keys, max_new_tokens=4))
        scores.append(np.concatenate(generator.score(prompts)))
    assert written[0] == written[1]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)


def test_muon_takes_the_factors_as_matrices_and_the_average_is_of_what_trains():
    """On a mesh: factors are split like their weight, and shared out among devices."""
    values = {"optim": MuonConfig(learning_rate=0.01), "ema_decay": 0.5, "adapters": LORA}
    outcomes = []
    for mesh in (None, {"fsdp": 2, "tensor": 2}):
        program = program_of(mesh, **values)
        state, seen = trained(program)
        assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)
        sums = program.compile_eval()(state.average, place(program, packed_batch(9)))
        outcomes.append(np.append(seen, float(sums["nll"])))
    np.testing.assert_allclose(outcomes[1], outcomes[0], rtol=1e-5)
    matrices = jax.tree.leaves(
        matrix_dims(program.placement.trained), is_leaf=lambda m: isinstance(m, Matrix)
    )
    assert len(matrices) == len(jax.tree.leaves(state.params))


def test_replicas_that_step_alone_share_what_is_frozen():
    config = dataclasses.replace(
        make_config({"replica": 2}, model=SMALL), local_sgd=LocalSGDConfig(inner_steps=2, exchange="float32")
    )
    program = make_program(config, QLORA)
    state, seen = trained(program, 2)
    assert np.isfinite(seen).all()
    first = started(program)
    assert_equal(state.frozen, first.frozen)
    assert jax.tree.structure(program.to_canonical(state).frozen) == jax.tree.structure(state.frozen)
