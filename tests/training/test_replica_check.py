"""What several devices hold alike is compared, and the device that differs is named."""

import jax
import numpy as np
import pytest

import training.replica_check
from tests.parallel.small import make_config, make_program
from training.checkpoint import named_leaves
from training.errors import RunFault
from training.loop import fit
from training.replica_check import ReplicaCheck, odd_ones
from training.step import FlatStep

MESHES = {
    "data": {"data": 8},
    "data and fsdp": {"data": 4, "fsdp": 2},
    "two alike": {"data": 2, "fsdp": 2, "tensor": 2},
}
FAULTS = (pytest.mark.faults, pytest.mark.slow)
MARKS = {"data": (), "data and fsdp": FAULTS, "two alike": FAULTS}
TABLE = "params.embed.table"


def flipped(leaf, device):
    """The same array, one bit of one device's copy changed: by hand, as no computation would."""
    parts = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.reshape(-1).view(np.uint32)[3] ^= 1 << 9
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def planted(program, leaves, name, device):
    at = list(named_leaves(program.state)).index(name)
    return [flipped(leaf, device) if n == at else leaf for n, leaf in enumerate(leaves)]


@pytest.mark.parametrize("mesh", [pytest.param(m, id=n, marks=MARKS[n]) for n, m in MESHES.items()])
def test_a_flipped_bit_in_one_copy_is_found_and_its_device_named(mesh):
    program = make_program(make_config(mesh, model={"num_layers": 1, "d_model": 32, "d_ff": 32}))
    leaves = jax.tree.leaves(program.init_state(0))
    check = ReplicaCheck(program.state, program.layout.mesh)
    check.look(1, leaves)  # nothing differs
    assert TABLE in check.names and any("mu." in name for name in check.names)
    with pytest.raises(RunFault) as fault:
        check.look(2, planted(program, leaves, TABLE, 5))
    message = str(fault.value)
    assert message.startswith("replica check at step 2: ") and "\n" not in message
    assert f"device 5 of process 0 on {training.replica_check.socket.gethostname()} ({TABLE})" in message
    others = [n for n in range(8) if n != 5 and f"device {n} of" in message]
    if mesh == MESHES["two alike"]:  # nobody can say which of two is right
        assert len(others) == 1 and "which is right is not known" in message
    else:
        assert not others and "hold other numbers than the rest" in message


def test_arrays_that_no_two_devices_share_are_not_looked_at():
    program = make_program(make_config({"fsdp": 8}, model={"num_layers": 1}))
    names = ReplicaCheck(program.state, program.layout.mesh).names
    assert "guard.last" in names and not [name for name in names if name.startswith("params.")]


def test_the_odd_ones_are_those_outside_of_a_majority():
    assert odd_ones({0: 7, 1: 7, 2: 7}) == ([], True)
    assert odd_ones({0: 7, 1: 9, 2: 7}) == ([1], True)
    assert odd_ones({0: 7, 1: 9}) == ([0, 1], False)
    assert odd_ones({0: 7, 1: 7, 2: 9, 3: 9}) == ([0, 1, 2, 3], False)


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_ends_within_n_steps_of_a_flip_and_no_checkpoint_has_it(ground, monkeypatch):
    """Every fourth step is looked at, and what is saved, every sixth. The flip comes behind the seventh."""
    words = ("training.num_steps=12", "checkpoint.every=6", "checkpoint.keep=9", "eval.every=50")
    steps_done = []

    def on_leaves(self, leaves, batch, real=FlatStep.on_leaves):
        steps_done.append(batch)
        new, metrics = real(self, leaves, batch)
        return (flip(new) if len(steps_done) == 7 else new), metrics

    def flip(leaves):
        at = max(range(len(leaves)), key=lambda n: leaves[n].size)
        return [flipped(leaf, 3) if n == at else leaf for n, leaf in enumerate(leaves)]

    monkeypatch.setattr(FlatStep, "on_leaves", on_leaves)
    with pytest.raises(RunFault, match="replica check at step 8: device 3 of process 0"):
        fit(ground.config("flip", *words, "guard.replica_every=4"))
    steps = {int(p.name) for p in (ground.run("flip") / "checkpoints").iterdir()}
    assert steps == {6}
    monkeypatch.undo()
    assert fit(ground.config("flip", *words, "guard.replica_every=4")) == 0
    assert fit(ground.config("unflipped", *words)) == 0
    assert ground.record("flip", 12)["digests"] == ground.record("unflipped", 12)["digests"]
