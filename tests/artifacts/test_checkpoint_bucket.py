"""Checkpoints that are sent away come back as they were, or say that they did not.

These laws hold of any file system that fsspec speaks: here of a folder, of S3 in `extras/test_bucket_s3.py`.
"""

import shutil
import threading

import fsspec
import numpy as np
import pytest

import artifacts.checkpoints.remote as remote_module
from artifacts.checkpoints.errors import CorruptCheckpoint
from artifacts.checkpoints.files import LIST
from artifacts.checkpoints.location import refuse_occupied
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.remote import Remote
from artifacts.config import CheckpointConfig
from common.errors import RunFault
from tests.training.ground import DROPPED
from tests.training.states import RECORD, abstract, assert_equal, flip, make_state, written


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket/run"


class Bucket:
    """What a test does to objects behind a Remote's back."""

    def __init__(self, url):
        self.fs, self.root = fsspec.core.url_to_fs(url)

    def names(self, below=""):
        self.fs.invalidate_cache()
        found = self.fs.find(f"{self.root}/{below}".rstrip("/"))
        return sorted(path[len(self.root) + 1 :] for path in found)

    def damage(self, name):
        raw = self.fs.cat_file(f"{self.root}/{name}")
        self.fs.pipe_file(f"{self.root}/{name}", flip(raw, np.random.default_rng(0)))


def opened(tmp_path, url, **config):
    return Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(**config), remote=Remote(url))


def sent(tmp_path, url, *steps, **config):
    """A run whose checkpoints of these steps are here and there."""
    (tmp_path / "run").mkdir()
    states = [make_state(step) for step in steps]
    written(tmp_path / "run" / "checkpoints", *states, remote=Remote(url), **config).close()


def test_a_lost_directory_is_restored_from_the_bucket_which_keeps_the_newest(tmp_path, url):
    sent(tmp_path, url, 1, 2, 3, keep=2)
    assert Remote(url).steps() == [2, 3]
    local = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "3").rglob("*") if p.is_file())
    assert sorted(name.rsplit("/", 1)[1] for name in Bucket(url).names("3")) == local
    shutil.rmtree(tmp_path / "run")
    checkpoints = opened(tmp_path, url, keep=2)
    assert checkpoints.steps() == [2, 3] and checkpoints.local_steps() == []
    found = checkpoints.restore_newest(abstract(make_state()))
    assert found is not None and found[1]["step"] == 3 and found[2] == []
    assert_equal(found[0], make_state(3))
    assert checkpoints.local_steps() == [3]
    checkpoints.save(4, make_state(4), RECORD)
    checkpoints.close()
    assert Remote(url).steps() == [3, 4]


@DROPPED
def test_an_object_that_was_altered_is_quarantined_and_the_one_before_it_used(tmp_path, url, dropped_reads):
    sent(tmp_path, url, 1, 2, 3)
    shutil.rmtree(tmp_path / "run")
    data = next(name for name in Bucket(url).names("3") if "/d/" in name)
    Bucket(url).damage(data)
    assert Remote(url).bad_files(3, tmp_path) == {data.removeprefix("3/"): "is altered (sha256)"}
    checkpoints = opened(tmp_path, url)
    found = checkpoints.restore_newest(abstract(make_state()))
    assert found is not None and found[1]["step"] == 2
    assert_equal(found[0], make_state(2))
    assert len(found[2]) == 1 and "is altered (sha256)" in found[2][0]
    assert checkpoints.remote.steps() == [1, 2]
    assert "quarantine/3/REASON" in Bucket(url).names() and Bucket(url).names("3") == []
    checkpoints.save(3, make_state(3), RECORD)  # the redone step takes the place
    checkpoints.close()
    assert Remote(url).bad_files(3, tmp_path) == {}


@DROPPED
def test_a_checkpoint_damaged_here_is_fetched_again(tmp_path, url, dropped_reads):
    sent(tmp_path, url, 2, 3)
    file = tmp_path / "run" / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    file.write_bytes(flip(file.read_bytes(), np.random.default_rng(1)))
    checkpoints = opened(tmp_path, url)
    found = checkpoints.restore_newest(abstract(make_state()))
    checkpoints.close()
    assert found is not None and found[1]["step"] == 3
    assert_equal(found[0], make_state(3))
    assert (tmp_path / "run" / "quarantine" / "3" / "REASON").exists()
    assert Remote(url).steps() == [2, 3]


@pytest.mark.parametrize("what", ("list gone", "list altered", "object gone"))
def test_what_is_there_in_part_is_no_checkpoint(tmp_path, url, what):
    sent(tmp_path, url, 2, 3)
    shutil.rmtree(tmp_path / "run")
    bucket = Bucket(url)
    if what == "list altered":
        bucket.fs.pipe_file(f"{bucket.root}/3/{LIST}", b"nonsense\n")
    else:
        name = f"3/{LIST}" if what == "list gone" else "3/params/_METADATA"
        bucket.fs.rm_file(f"{bucket.root}/{name}")
    checkpoints = opened(tmp_path, url)
    found = checkpoints.restore_newest(abstract(make_state()))
    checkpoints.close()
    assert found is not None and found[1]["step"] == 2
    assert bucket.names("3") == []  # half sent: removed; damaged: quarantined
    assert bool(bucket.names("quarantine")) == (what != "list gone")


def test_what_a_killed_start_did_not_send_the_next_one_sends(tmp_path, url):
    (tmp_path / "run").mkdir()
    written(tmp_path / "run" / "checkpoints", make_state(3)).close()
    checkpoints = opened(tmp_path, url)
    assert checkpoints.restore_newest(abstract(make_state())) is not None
    checkpoints.close()
    assert Remote(url).steps() == [3]


@pytest.mark.parametrize("when", ("next save", "wait", "close"))
def test_a_send_that_fails_surfaces_and_leaves_no_checkpoint_there(tmp_path, url, monkeypatch, when):
    put = Remote._put

    def broken(self, path, name):
        if name.endswith("_METADATA") and name.startswith("2/"):
            with self._plainly("written"):
                raise OSError(5, "the line went dead")
        put(self, path, name)

    monkeypatch.setattr(Remote, "_put", broken)
    (tmp_path / "run").mkdir()
    checkpoints = opened(tmp_path, url)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), RECORD)
    with pytest.raises(RunFault, match=r"cannot be written \(OSError.*went dead") as error:
        if when == "next save":
            checkpoints.save(3, make_state(3), RECORD)
        else:
            getattr(checkpoints, when)()
    assert "\n" not in str(error.value)
    assert Remote(url).steps() == [1]


def test_bytes_that_do_not_arrive_are_noticed(tmp_path, url, monkeypatch):
    put = Remote._put

    def short(self, path, name):
        if name.endswith("_METADATA"):
            cut = tmp_path / "cut"
            cut.write_bytes(path.read_bytes()[:-1])
            path = cut
        put(self, path, name)

    monkeypatch.setattr(Remote, "_put", short)
    monkeypatch.setattr(remote_module, "TRANSFERS", 1)
    (tmp_path / "run").mkdir()
    checkpoints = opened(tmp_path, url)
    checkpoints.save(1, make_state(1), RECORD)
    with pytest.raises(RunFault, match="arrived with"):
        checkpoints.close()
    assert Remote(url).steps() == []


def test_the_loop_goes_on_while_a_checkpoint_is_sent(tmp_path, url, monkeypatch):
    go_on, put = threading.Event(), Remote._put

    def slow(self, path, name):
        assert go_on.wait(60)
        put(self, path, name)

    monkeypatch.setattr(Remote, "_put", slow)
    (tmp_path / "run").mkdir()
    checkpoints = opened(tmp_path, url)
    checkpoints.save(1, make_state(1), RECORD)  # returns, though nothing can be sent yet
    go_on.set()
    checkpoints.close()
    assert Remote(url).steps() == [1]


def test_a_new_run_does_not_write_among_the_checkpoints_of_another(tmp_path, url):
    config = CheckpointConfig(directory=url)
    refuse_occupied(tmp_path / "new", config)
    sent(tmp_path, url, 3)
    with pytest.raises(ValueError, match=r"checkpoint of step 3, but .* is new; .*checkpoint.py fetch"):
        refuse_occupied(tmp_path / "new", config)


def test_a_url_that_cannot_be_spoken_is_refused():
    for directory in ("ftp://there", "s3://", "://x", ""):
        with pytest.raises(ValueError, match=r"checkpoint\.directory="):
            CheckpointConfig(directory=directory)


def test_a_list_in_the_bucket_cannot_name_files_outside(tmp_path, url):
    sent(tmp_path, url, 3)
    bucket = Bucket(url)
    bucket.fs.pipe_file(f"{bucket.root}/3/{LIST}", b"0" * 64 + b"  ../../out\n")
    with pytest.raises(CorruptCheckpoint, match="altered"):
        Remote(url).fetch(3, tmp_path / "back")
