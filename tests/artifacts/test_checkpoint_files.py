"""Every file of a checkpoint has a sha256, made behind the loop, and what goes wrong there ends the run."""

import subprocess
import threading

import numpy as np
import pytest

import artifacts.checkpoints.background as care_module
from artifacts.checkpoints.errors import CorruptCheckpoint
from artifacts.checkpoints.files import LIST, bad_files, files_of, list_files, read_list
from artifacts.checkpoints.manager import Checkpoints
from artifacts.config import CheckpointConfig
from common.errors import RunFault
from tests.training.ground import DROPPED
from tests.training.states import RECORD, abstract, assert_equal, few_leaves, flip, make_state, written
from training.loop import fit


def test_the_list_is_of_every_file_and_sha256sum_reads_it(tmp_path):
    written(tmp_path / "checkpoints", few_leaves()).close()
    step = tmp_path / "checkpoints" / "3"
    listed = read_list(step)
    assert listed is not None and sorted(listed) == files_of(step)
    assert {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()} == {*listed, LIST}
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", LIST], cwd=step, check=True)
    assert bad_files(step, listed) == {}


def test_a_bad_file_is_named_with_what_is_wrong(tmp_path):
    for name in ("sound", "altered", "gone"):
        (tmp_path / name).write_text(name)
    listed = list_files(tmp_path)
    (tmp_path / "altered").write_bytes(flip(b"altered", np.random.default_rng(0)))
    (tmp_path / "gone").unlink()
    (tmp_path / "more").touch()
    assert bad_files(tmp_path, listed) == {
        "altered": "is altered (sha256)",
        "gone": "is missing",
        "more": "is not in the list",
    }
    assert "altered" not in bad_files(tmp_path, listed, largest=3)


@pytest.mark.parametrize("line", ["x", f"{'0' * 64}  ../../out", f"{'0' * 64}  /etc/passwd", "\xff"])
def test_a_list_that_is_none_is_damage(tmp_path, line):
    (tmp_path / LIST).write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(CorruptCheckpoint, match=LIST):
        read_list(tmp_path)


def test_a_save_returns_before_its_files_are_hashed_and_the_next_one_waits(tmp_path, monkeypatch):
    go_on, hashed = threading.Event(), []

    def slow(directory):
        assert go_on.wait(60)
        hashed.append(directory.name)
        return list_files(directory)

    monkeypatch.setattr(care_module, "list_files", slow)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=1))
    checkpoints.save(1, few_leaves(1), RECORD)
    checkpoints.wait()  # committed: what a notice to leave waits for
    assert hashed == [] and checkpoints.steps() == [1]
    threading.Timer(0.2, go_on.set).start()
    checkpoints.save(2, few_leaves(2), RECORD)
    assert hashed == ["1"]  # before its directory could be removed under the hand that hashes it
    checkpoints.close()
    assert hashed == ["1", "2"]


def test_a_checkpoint_whose_run_ended_before_the_list_is_verified_by_its_arrays_and_gets_it(tmp_path):
    path = tmp_path / "checkpoints"
    written(path, make_state(3)).close()
    (path / "3" / LIST).unlink()
    checkpoints = Checkpoints(path, CheckpointConfig())
    found = checkpoints.restore_newest(abstract(make_state()))
    assert found is not None and found[2] == []
    assert_equal(found[0], make_state(3))
    checkpoints.close()
    listed = read_list(path / "3")
    assert listed and bad_files(path / "3", listed) == {}


@DROPPED
def test_an_altered_file_that_no_array_depends_on_is_seen(tmp_path, dropped_reads):
    """What digests of arrays miss: here, how the arrays were split over devices."""
    path = tmp_path / "checkpoints"
    written(path, make_state(2), make_state(3)).close()
    file = path / "3" / "params" / "_sharding"
    file.write_bytes(file.read_bytes() + b" ")
    found = Checkpoints(path, CheckpointConfig()).restore_newest(abstract(make_state()))
    assert found is not None
    assert_equal(found[0], make_state(2))
    assert "params/_sharding, which is altered" in found[2][0]


def plant(monkeypatch, kind, last):
    """Break what happens behind the loop to the last checkpoint, and only to that."""
    if kind == "writer":
        from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath as Temporary

        whole = Temporary.finalize

        async def finalize(self, *args, **options):
            if self.get_final().name == str(last):
                raise OSError(28, "No space left on device")
            return await whole(self, *args, **options)

        monkeypatch.setattr(Temporary, "finalize", finalize)
        return

    def broken(directory):
        if directory.name == str(last):
            raise OSError(5, "Input/output error")
        return list_files(directory)

    monkeypatch.setattr(care_module, "list_files", broken)


@DROPPED
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("kind", ("writer", "hashes"))
def test_what_fails_behind_the_loop_after_the_last_step_ends_the_run_as_a_fault(
    ground, monkeypatch, dropped_reads, kind
):
    config = ground.config(f"late_{kind}", "training.num_steps=6", "checkpoint.every=3")
    with monkeypatch.context() as patched:
        plant(patched, kind, 6)
        with pytest.raises(RunFault, match="could not be written") as error:
            fit(config)
    assert error.value.status == 1 and "\n" not in str(error.value)
    assert not (ground.run(f"late_{kind}") / "summary.json").exists()
    assert fit(config) == 0  # and the same command goes on
    assert ground.record(f"late_{kind}", 6)["step"] == 6
    step = ground.run(f"late_{kind}") / "checkpoints" / "6"
    assert bad_files(step, read_list(step) or {}) == {}
