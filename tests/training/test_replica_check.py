"""What several devices hold alike is compared, and the device that differs is named."""

import re

import jax
import numpy as np
import pytest

import training.safety.replica_check
from artifacts.checkpoints.manager import named_leaves
from common.errors import RunFault
from tests.parallel.small import make_config, make_program
from tests.training.test_processes import finish, watched
from training.loop import fit
from training.safety.replica_check import ReplicaCheck, odd_ones
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
    assert (
        f"device 5 of process 0 on {training.safety.replica_check.socket.gethostname()} ({TABLE})" in message
    )
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


# train.py, each process on a host of its own name; after the first step a bit of process 1 flips.
FLIPS = """
import os, runpy, sys
from types import SimpleNamespace
sys.path.insert(0, os.getcwd())
import jax
import training.safety.replica_check
from tests.training.test_replica_check import flipped
from training.step import FlatStep
process = os.environ["CAMBRIAN_PROCESS"]
training.safety.replica_check.socket = SimpleNamespace(gethostname=lambda: "host" + process)
real = FlatStep.on_leaves

def on_leaves(self, leaves, batch):
    FlatStep.on_leaves = real
    new, metrics = real(self, leaves, batch)
    at = max(range(len(new)), key=lambda n: new[n].size)
    return [flipped(x, jax.local_devices()[1].id) if n == at else x for n, x in enumerate(new)], metrics

if process == "1":
    FlatStep.on_leaves = on_leaves
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.faults
@pytest.mark.slow
def test_a_flip_on_another_host_is_named_with_it_and_ends_every_process_with_1(ground, tmp_path):
    words = ("guard.replica_every=2", "checkpoint.every=50", "eval.every=50")
    flip = watched(ground, tmp_path, *words, name="elsewhere", script=("-c", FLIPS))
    _, err = finish(flip, 1)
    found = re.findall(r"device \d+ of process \d on \w+", err)
    assert len(found) == 1 and found[0].endswith("of process 1 on host1")
    assert "replica check at step 2: " in err and "hold other numbers than the rest" in err
    assert err.count("error: ") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["1", "1"]
    assert not [path for path in (ground.run("elsewhere") / "checkpoints").glob("*")]
