"""Checkpoints broken in every way that a disk has: nothing wrong is ever restored, and the run goes on.

`make test-faults` flips 1000 bits; CAMBRIAN_FLIPS=N another number. The suite itself flips 200
(`test_checkpoint.py`).
"""

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from artifacts.checkpoints.errors import CorruptCheckpoint
from artifacts.checkpoints.files import LIST
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.remote import Remote
from artifacts.config import CheckpointConfig
from common.errors import RunFault
from tests.training.ground import DROPPED
from tests.training.states import RECORD, abstract, assert_equal, few_leaves, flip, pick, written
from tests.training.test_resume import assert_same_run, finish, kill_in_a_save, training_rows, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.slow]
FLIPS = int(os.environ.get("CAMBRIAN_FLIPS", "1000"))
PORTIONS = 4  # so that processes share them
LENGTH = ("training.num_steps=30", "checkpoint.every=4", "checkpoint.keep=8", "eval.every=6")


def newest(path, like):
    with closing(Checkpoints(path, CheckpointConfig())) as checkpoints:
        return checkpoints.restore_newest(like)


@DROPPED
@pytest.mark.parametrize("portion", range(PORTIONS))
def test_of_many_flipped_bits_none_is_restored(tmp_path, dropped_reads, portion):
    """Over all files of a checkpoint of two, with their list and, every other time, without it."""
    path = tmp_path / "run" / "checkpoints"
    older, right = few_leaves(2), few_leaves(3)
    written(path, older, right).close()
    shutil.copytree(path, tmp_path / "whole")
    files = sorted(p for p in (path / "3").rglob("*") if p.is_file() and p.stat().st_size)
    rng, like = np.random.default_rng(portion), abstract(right)
    counts = Counter()
    for _ in range(FLIPS // PORTIONS):
        name = pick(files, rng).relative_to(path)
        if rng.random() < 0.5 and name.name != LIST:
            (path / "3" / LIST).unlink()
        (path / name).write_bytes(flip((path / name).read_bytes(), rng))
        # The whole way with quarantine for one in four; for the others, whether it is seen.
        state, wanted = (
            went_on(path, like, older, right) if rng.random() < 0.25 else looked(path, like, right)
        )
        same = state is None or all(map(np.array_equal, leaves(state), leaves(wanted)))
        counts["wrong" if not same else "harmless" if wanted is right and state is not None else "seen"] += 1
        for file in (name, Path("3") / LIST):
            if not (path / "3").is_dir():
                shutil.copytree(tmp_path / "whole" / "3", path / "3")
            shutil.copyfile(tmp_path / "whole" / file, path / file)
    print(dict(counts))
    assert counts["wrong"] == 0
    assert counts["seen"] > FLIPS / PORTIONS / 2


def went_on(path, like, older, right):
    """What a run would go on from, and what that should be."""
    found = newest(path, like)
    assert found is not None
    state, record, reasons = found
    if record["step"] == 3:
        assert not reasons
        return state, right
    assert len(reasons) == 1 and (path.parent / "quarantine" / "3" / "REASON").exists()
    return state, older


def looked(path, like, right):
    """The newest, or None where it is seen to be damaged."""
    try:
        with closing(Checkpoints(path, CheckpointConfig(), read_only=True)) as checkpoints:
            return checkpoints.restore(3, like)[0], right
    except CorruptCheckpoint:
        return None, right


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@DROPPED
def test_any_file_truncated_or_gone_costs_one_checkpoint_at_most(tmp_path, dropped_reads):
    path = tmp_path / "run" / "checkpoints"
    older, right = few_leaves(2), few_leaves(3)
    written(path, older, right).close()
    shutil.copytree(path, tmp_path / "whole")
    like = abstract(right)
    for file in sorted(p for p in (path / "3").rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for kept in {None, 0, len(whole) // 2, len(whole) - 1} - {-1, len(whole)}:
            if kept is None:
                file.unlink()
            else:
                file.write_bytes(whole[:kept])
            found = newest(path, like)
            assert found is not None, (file, kept)
            assert_equal(found[0], right if found[1]["step"] == 3 else older)
            # Only the list itself can be missed, as in a run that ended before it was made, or lose its
            # last line feed.
            harmless = file.name == LIST and kept in (None, len(whole) - 1)
            assert (found[1]["step"] == 3) == harmless, (file, kept)
            shutil.rmtree(path / "3", ignore_errors=True)
            shutil.copytree(tmp_path / "whole" / "3", path / "3")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 7 MB; where nobody may mount one, this is not tested, and says so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", disk], capture_output=True)
    if done.returncode:
        left_out = pytest.fail if os.environ.get("CAMBRIAN_REQUIRE_FAULTS") else pytest.skip
        left_out("needs the right to mount a file system; RLIMIT_FSIZE stands in for it in test_resume.py")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="module")
def undisturbed(ground):
    finish(ground.start("calm", *LENGTH))
    return "calm"


@pytest.mark.parametrize("kind", ("full", "read-only"))
def test_a_disk_that_refuses_in_mid_run_is_status_1_and_the_command_goes_on(
    ground, undisturbed, small_disk, kind
):
    """Checkpoints of about 1.1 MB each: the seventh is too many, or the third finds no way to be written."""
    name, words = f"disk_{kind}", (*LENGTH, f"checkpoint.directory={small_disk}/steps")
    process = ground.start(name, *words)
    if kind == "read-only":
        wait_until(process, lambda: (small_disk / "steps" / "8").is_dir())
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    _, err = finish(process, status=1)
    reason = "No space left on device" if kind == "full" else "Read-only file system"
    assert err.startswith("error: ") and reason in err and err.count("\n") == 1
    assert not (ground.run(name) / "summary.json").exists()
    subprocess.run(["mount", "-o", "remount,rw,size=100m", small_disk], check=True)
    out, _ = finish(ground.start(name, *words))
    assert "quarantined" not in out
    assert_same_run(ground, name, undisturbed)


def test_killed_in_saves_hashes_and_sends_a_run_ends_as_undisturbed(ground, undisturbed, tmp_path):
    """Four times, at a random moment from the first byte of a save on; then from the bucket alone."""
    rng, url = random.Random(5), f"file://{tmp_path}/bucket"
    words = (*LENGTH, f"checkpoint.directory={url}")
    kill_in_a_save(ground, "sent", 4, *words)
    for row in (8, 14):
        process = ground.start("sent", *words)
        wait_until(process, lambda row=row: training_rows(ground, "sent") >= row)
        time.sleep(rng.random() / 5)
        process.kill()
        process.communicate()
    shutil.rmtree(ground.run("sent") / "checkpoints")
    assert Remote(url).steps()
    finish(ground.start("sent", *words))
    assert_same_run(ground, "sent", undisturbed)
    for step in Remote(url).steps():
        assert Remote(url).bad_files(step, tmp_path) == {}


@DROPPED
def test_a_save_that_raises_is_no_checkpoint_and_the_one_before_it_is_used(tmp_path, monkeypatch):
    from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath as Temporary

    async def refuses(self, *args, **options):
        raise OSError(5, "Input/output error")

    path = tmp_path / "checkpoints"
    written(path, few_leaves(2)).close()
    checkpoints = Checkpoints(path, CheckpointConfig())
    with monkeypatch.context() as patched:
        patched.setattr(Temporary, "finalize", refuses)
        checkpoints.save(3, few_leaves(3), RECORD)
        with pytest.raises(RunFault, match="Input/output error"):
            checkpoints.close()
    found = newest(path, abstract(few_leaves()))
    assert found is not None and found[1]["step"] == 2 and found[2] == []
    assert_equal(found[0], few_leaves(2))
