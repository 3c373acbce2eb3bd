"""A checkpoint gives back what was saved, on any mesh, or says that it cannot: never other numbers."""

import json
import resource
import shutil
import threading
from contextlib import closing
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import artifacts.checkpoints.record as record_module
from artifacts.checkpoints.digest import digests
from artifacts.checkpoints.files import LIST
from artifacts.checkpoints.manager import Checkpoints, CorruptCheckpoint
from artifacts.checkpoints.record import named_leaves, state_digest
from artifacts.config import CheckpointConfig
from common.errors import RunFault
from optim.config import AdamWConfig
from optim.optimizers import make_optimizer
from tests.training.ground import DROPPED
from tests.training.states import (
    RECORD,
    abstract,
    assert_equal,
    few_leaves,
    flip,
    make_state,
    pick,
    written,
)
from training.state import TrainState

FLIPS = 200


def mesh(**axes):
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One small checkpoint, read by all who do not change it."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    written(path, make_state(3)).close()
    return path


def test_what_is_restored_is_what_was_saved(saved):
    state, record = Checkpoints(saved, CheckpointConfig()).restore(3, abstract(make_state()))
    assert_equal(state, make_state(3))
    assert {key: record[key] for key in RECORD} == RECORD
    assert jax.tree.structure(state) == jax.tree.structure(make_state())


def test_layouts_restore_the_same_numbers_and_digests(saved):
    """Written by one device; read by eight, split two ways."""
    eight = mesh(fsdp=4, tensor=2)

    def split(leaf):
        return NamedSharding(eight, PartitionSpec(*[["fsdp", "tensor", None][i] for i in range(leaf.ndim)]))

    def legal(leaf):
        fits = all(n % w == 0 for n, w in zip(leaf.shape, (4, 2), strict=False))
        return split(leaf) if fits else NamedSharding(eight, PartitionSpec())

    state, record = Checkpoints(saved, CheckpointConfig()).restore(3, abstract(make_state(), legal))
    assert_equal(state, make_state(3))
    table = state.params["embed"]["table"]
    assert table.addressable_shards[0].data.shape == (4, 4)
    for item in ("params", "opt_state", "ema"):
        here = digests({f"{item}.{name}": x for name, x in named_leaves(getattr(state, item)).items()})
        assert here == {n: d for n, d in record["digests"].items() if n.split(".")[0] == item}


def test_moments_in_bfloat16_go_on_bitwise_after_a_restore(tmp_path):
    """What is rounded at random depends on the step alone, not on whether the run was interrupted."""
    config = AdamWConfig(moment_dtype="bfloat16")
    tx = make_optimizer(config, lambda _: 1.0, decay_mask=True, matrices={"w": None}, seed=1)
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)}

    @jax.jit
    def step(state):
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    state = step(TrainState(jnp.zeros((), jnp.int32), gradient, tx.init(gradient)))
    checkpoints = written(tmp_path / "checkpoints", state)
    restored, record = checkpoints.restore(1, abstract(state))
    checkpoints.close()
    assert {kind for name, kind in record["types"].items() if name.endswith("u.w")} == {"bfloat16[8, 16]"}
    assert_equal(step(restored), step(state))


def test_saved_numbers_survive_the_donation_of_the_state(tmp_path):
    """The save is still under way when the next steps overwrite the very buffers that it writes."""
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 7, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    big = jnp.arange(4_000_000, dtype=jnp.float32)
    state = make_state(3).replace(params={"big": big.copy()}, ema=None)
    like = abstract(state)
    checkpoints.save(3, state, RECORD)
    for _ in range(3):
        state = spoil(state)
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore(3, like)
    np.testing.assert_array_equal(restored.params["big"], big)


def outcome(path, like):
    """The restored state, or None where the damage was seen; anything else that is raised is a failure."""
    try:
        with closing(Checkpoints(path, CheckpointConfig(), read_only=True)) as checkpoints:
            return checkpoints.restore(3, like)[0] if checkpoints.steps() else None
    except CorruptCheckpoint:
        return None


@DROPPED
@pytest.mark.parametrize("listed", (True, False), ids=("by the list of files", "by arrays alone"))
def test_flipped_bits_are_seen_or_harmless(tmp_path, dropped_reads, listed):
    path, right = tmp_path / "checkpoints", few_leaves()
    written(path, right).close()
    if not listed:
        (path / "3" / LIST).unlink()
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    rng = np.random.default_rng(0)
    like, seen = abstract(right), 0
    for _ in range(FLIPS // 2):
        file = pick(files, rng)
        whole = file.read_bytes()
        file.write_bytes(flip(whole, rng))
        state = outcome(path, like)
        if state is None:
            seen += 1
        else:
            assert_equal(state, right)
        file.write_bytes(whole)
    assert_equal(outcome(path, like), right)
    # Small files are all in the list; without it, the flips do reach what matters.
    assert seen == FLIPS // 2 if listed else seen > FLIPS / 8


@DROPPED
def test_truncated_and_deleted_files_are_seen_or_harmless(tmp_path, dropped_reads):
    path, right = tmp_path / "checkpoints", few_leaves()
    written(path, right).close()
    like, seen = abstract(right), 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for kept in (None, 0, len(whole) // 2):
            if kept is None:
                file.unlink()
            else:
                file.write_bytes(whole[:kept])
            state = outcome(path, like)
            if state is None:
                seen += 1
            else:
                assert_equal(state, right)
            file.write_bytes(whole)
    assert seen > 5


def damage(step_directory):
    """Lose half of every data file."""
    for file in [p for p in step_directory.rglob("*") if p.is_file() and p.parent.name == "d"]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@DROPPED
def test_a_corrupt_checkpoint_is_quarantined_and_the_one_before_it_used(tmp_path, dropped_reads):
    path = tmp_path / "checkpoints"
    written(path, make_state(1), make_state(2), make_state(3)).close()
    damage(path / "3")
    checkpoints = Checkpoints(path, CheckpointConfig())
    found = checkpoints.restore_newest(abstract(make_state()))
    assert found is not None
    state, record, quarantined = found
    assert_equal(state, make_state(2))
    assert record["step"] == 2 and len(quarantined) == 1
    assert (tmp_path / "quarantine" / "3" / "REASON").read_text().strip() == quarantined[0]
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, make_state(3), RECORD)  # the redone step takes the place
    checkpoints.close()
    assert_equal(outcome(path, abstract(make_state())), make_state(3))


@DROPPED
def test_a_checkpoint_without_its_record_is_quarantined_and_its_place_free(tmp_path, dropped_reads):
    """Orbax would not list it, or not open the directory; and the redone step would find its place taken."""
    path = tmp_path / "checkpoints"
    states = [make_state(step) for step in (1, 2, 3, 4)]
    written(path, *states, keep=4).close()
    (path / "3" / "_CHECKPOINT_METADATA").unlink()
    file = path / "4" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace("commit_timestamp", "commit_timestamx"))  # one flipped bit
    checkpoints = Checkpoints(path, CheckpointConfig(keep=4))
    found = checkpoints.restore_newest(abstract(make_state()))
    assert found is not None and found[1]["step"] == 2
    assert len(found[2]) == 2
    for state in states[2:]:
        checkpoints.save(int(state.step), state, RECORD)
    checkpoints.close()
    assert sorted(p.name for p in path.iterdir()) == ["1", "2", "3", "4"]
    assert_equal(outcome(path, abstract(make_state())), make_state(3))


@DROPPED
def test_where_nothing_can_be_trusted_nothing_is_restored(tmp_path, dropped_reads):
    path = tmp_path / "checkpoints"
    written(path, make_state(1), make_state(3)).close()
    damage(path / "1")
    damage(path / "3")
    with pytest.raises(RunFault, match="no checkpoint"):
        Checkpoints(path, CheckpointConfig()).restore_newest(abstract(make_state()))
    assert sorted(p.name for p in (tmp_path / "quarantine").iterdir()) == ["1", "3"]


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    path = tmp_path / "checkpoints"
    written(path, make_state(2)).close()
    (path / "2").rename(path / "3")
    assert outcome(path, abstract(make_state())) is None


@pytest.mark.parametrize("rows", [8, 4], ids=["same shape", "other shape"])
def test_arrays_of_another_checkpoint_are_seen(tmp_path, rows):
    """A directory put together from two, each file of it sound."""
    right, other = few_leaves(), few_leaves()
    other = other.replace(params={**other.params, "scale": jnp.full(rows, 7.0)})
    written(tmp_path / "checkpoints", right).close()
    written(tmp_path / "other", other).close()
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "params")
    shutil.copytree(tmp_path / "other" / "3" / "params", tmp_path / "checkpoints" / "3" / "params")
    assert outcome(tmp_path / "checkpoints", abstract(right)) is None


def test_no_checkpoint_is_no_fault(tmp_path):
    assert Checkpoints(tmp_path / "none", CheckpointConfig()).restore_newest(abstract(make_state())) is None


@pytest.mark.parametrize("change", ["dtype", "shape", "missing", "added"])
def test_another_shape_or_dtype_is_refused_by_name(saved, change):
    like = abstract(make_state())
    scale = like.params["rest"]["scale"]
    other = {
        "dtype": jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16, sharding=scale.sharding),
        "shape": jax.ShapeDtypeStruct((4,), scale.dtype, sharding=scale.sharding),
    }
    rest = dict(like.params["rest"])
    if change == "missing":
        del rest["scale"]
    elif change == "added":
        rest["more"] = scale
    else:
        rest["scale"] = other[change]
    like = like.replace(params={**like.params, "rest": rest})
    name = "params.rest.more" if change == "added" else "params.rest.scale"
    with pytest.raises(ValueError, match=name) as error:
        Checkpoints(saved, CheckpointConfig(), read_only=True).restore(3, like)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("keep", "average_last", "left"), [(1, 0, [5]), (2, 0, [4, 5]), (1, 3, [3, 4, 5])])
def test_the_newest_are_kept_and_those_to_be_averaged(tmp_path, keep, average_last, left):
    states = [make_state(step, ema=False) for step in range(1, 6)]
    checkpoints = written(tmp_path / "checkpoints", *states, keep=keep, average_last=average_last)
    assert checkpoints.steps() == left


def test_the_mean_of_checkpoints_is_the_mean_of_their_weights(tmp_path):
    states = [make_state(step) for step in (1, 2, 3)]
    checkpoints = written(tmp_path / "checkpoints", *states)
    mean = checkpoints.mean_weights([1, 2, 3], abstract(states[0]).params)
    for name, leaf in named_leaves(mean).items():
        wanted = np.mean([np.asarray(named_leaves(s.params)[name], np.float64) for s in states], axis=0)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-7)


def test_weights_alone_are_verified_too(tmp_path):
    path = tmp_path / "checkpoints"
    checkpoints = written(path, make_state(3))
    like = abstract(make_state())
    assert_equal(checkpoints.restore_weights(3, like.params), make_state(3).params)
    assert_equal(checkpoints.restore_weights(3, like.params, item="ema"), make_state(3).ema)
    checkpoints.close()
    written(path.with_name("plain"), make_state(3, ema=False)).close()
    with pytest.raises(ValueError, match="ema"):
        Checkpoints(path.with_name("plain"), CheckpointConfig()).restore_weights(3, like.params, item="ema")


@pytest.fixture
def small_files():
    """The system refuses to write beyond 20 kB into any file, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@DROPPED
@pytest.mark.parametrize("when", ["wait", "next save", "close"])
def test_a_save_that_fails_in_the_background_surfaces(tmp_path, small_files, dropped_reads, when):
    big = make_state(1, ema=False).replace(params={"big": jnp.arange(50_000, dtype=jnp.float32)})
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(1, big, RECORD)
    with pytest.raises(RunFault, match="could not be written") as error:
        if when == "next save":
            checkpoints.save(2, make_state(2), RECORD)
        else:
            getattr(checkpoints, when)()
    assert "\n" not in str(error.value)
    assert Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).steps() == []


def test_a_wait_that_is_interrupted_takes_no_step_from_the_disk(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a wait: the save goes on, and is what the same command will go on from."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with closing(checkpoints), monkeypatch.context() as patch:
        checkpoints.save(3, make_state(3), RECORD)
        patch.setattr(threading.Thread, "join", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
        patch.undo()
        assert 3 not in checkpoints.steps()  # what Orbax believes
        assert checkpoints.newest_committed() == 3


def test_a_record_survives_json_and_names_the_state(saved):
    checkpoints = Checkpoints(saved, CheckpointConfig(), read_only=True)
    record = checkpoints.record(3)
    assert json.loads(json.dumps(record)) == record
    other = dict(record, digests={**record["digests"], "params.rest.scale": 1})
    assert state_digest(record) != state_digest(other)


@DROPPED
def test_a_large_state_is_read_in_parts_and_each_is_verified(tmp_path, monkeypatch, dropped_reads):
    monkeypatch.setattr(record_module, "PART", 1)
    path = tmp_path / "checkpoints"
    written(path, make_state(3)).close()
    parts = list(record_module.in_parts(record_module.items_of(make_state(3))))
    assert 5 < len(parts) <= record_module.PARTS + 1
    like = abstract(make_state())
    assert_equal(outcome(path, like), make_state(3))
    damage(path / "3")
    (path / "3" / LIST).unlink()
    assert outcome(path, like) is None
