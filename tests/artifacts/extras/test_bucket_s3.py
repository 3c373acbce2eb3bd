"""The laws of a bucket, and a run that loses its directory, with an S3 that moto serves on loopback."""

import shutil

import pytest

from artifacts.checkpoints.location import refuse_occupied
from artifacts.config import CheckpointConfig
from tests.artifacts.test_checkpoint_bucket import (
    Bucket,
)
from tests.data.extras import require
from tests.s3 import bucket
from tests.training.ground import Ground, make_ground


@pytest.fixture
def url(endpoint, monkeypatch):
    with bucket(endpoint, monkeypatch, "checkpoints"):
        yield "s3://checkpoints/run"


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"))


def ended(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def test_a_run_that_lost_its_directory_goes_on_from_the_bucket(ground, url):
    """As on a machine that is new: the directory is fetched, the checkpoint with the run's own command."""
    from scripts.checkpoint import main

    words = (
        "checkpoint.every=2",
        "schedule=constant",
        "schedule.warmup_steps=2",
        f"checkpoint.directory={url}",
    )
    ended(ground.start("whole", "training.num_steps=6", *words[:3]))
    ended(ground.start("lost", "training.num_steps=4", *words))
    shutil.rmtree(ground.run("lost"))
    _, err = ended(ground.start("lost", "training.num_steps=6", *words), status=2)
    assert "checkpoint of step 4" in err and err.count("\n") == 1
    assert main(["fetch", url, str(ground.run("lost"))]) == 0
    ended(ground.start("lost", "training.num_steps=6", *words))
    rows, wanted = ([r for r in ground.rows(name) if "loss" in r] for name in ("lost", "whole"))
    assert rows == wanted and len(rows) == 6
    assert ground.record("lost", 6)["digests"] == ground.record("whole", 6)["digests"]
    assert main(["verify", str(ground.run("lost")), "all=true"]) == 0
    shutil.rmtree(ground.run("lost") / "checkpoints")
    assert main(["verify", str(ground.run("lost")), "all=true"]) == 0  # in the bucket alone
    data = next(name for name in Bucket(url).names("6") if "/d/" in name)
    Bucket(url).damage(data)
    assert main(["verify", str(ground.run("lost"))]) == 1


def test_a_server_that_does_not_answer_is_one_line(url, tmp_path, monkeypatch):
    require("s3fs", "s3").S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    config = CheckpointConfig(directory=url)
    with pytest.raises(ValueError, match=r"cannot be listed \(.*AWS_ENDPOINT_URL") as error:
        refuse_occupied(tmp_path / "new", config)
    assert "\n" not in str(error.value)
    require("s3fs", "s3").S3FileSystem.clear_instance_cache()
    monkeypatch.undo()


def test_a_bucket_that_is_not_there_is_one_line_before_the_first_step(url, tmp_path):
    with pytest.raises(
        ValueError, match=r"checkpoint\.directory=s3://nowhere/run cannot be written"
    ) as error:
        refuse_occupied(tmp_path / "new", CheckpointConfig(directory="s3://nowhere/run"))
    assert "\n" not in str(error.value)
    refuse_occupied(tmp_path / "new", CheckpointConfig(directory=url))
    assert Bucket(url).names() == []  # the probe is gone
