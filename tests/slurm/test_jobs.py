"""What becomes of jobs that nobody disturbs, of those that a person ends, and of several at once."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.slurm.jobs import DEADLINE, SMALL, STEPS, client, submit
from tests.training.ground import ROOT

pytestmark = pytest.mark.slurm
SHORT = ("training.num_steps=3", "checkpoint.every=100000")


def test_a_cancelled_job_is_not_started_again(ground, paced):
    """It saves at the signal and ends with status 75, which would requeue it if nobody had ended it."""
    run = submit(ground, paced, "cancelled", "checkpoint.every=100000", pause=0.06).at_step(20)
    client("scancel", run.job)
    status = run.end()
    assert status == 128 + 15, run.log
    assert run.state() == "CANCELLED"
    assert "saved at step" in run.log and run.steps() < STEPS


def test_an_array_is_a_run_for_each_element_and_ends_with_the_worst_status(ground, paced):
    words = ("slurm.nodes=1", "mesh.data=1", f"run.dir={ground.path}/runs/${{run.name}}", *SHORT)
    array = submit(ground, paced, "array", *words, "slurm.array=seed=0,1")
    assert array.end() == 0, array.log
    rows = {seed: ground.rows(f"array-seed={seed}") for seed in (0, 1)}
    for of in rows.values():
        assert [row["step"] for row in of if "loss" in row] == [1, 2, 3]
    assert rows[0] != rows[1]


def test_what_a_job_refuses_is_its_status_and_nobody_starts_it_again(ground, paced):
    """The directory is another run's when the job begins, though it was not when it was submitted."""
    ground.run("taken").mkdir(parents=True)
    (ground.run("taken") / "something").write_text("of somebody else's")
    run = submit(ground, paced, "taken", *SHORT)
    assert run.end() == 2
    assert "has files but no config.yaml, so it is no run of ours" in run.log
    assert run.log.count(", start ") == 1


def sweep(ground, *words):
    command = [
        *(sys.executable, "train.py", "-m", *ground.words("swept", *SMALL, *SHORT, "mesh.data=1")),
        *(f"run.dir={ground.path}/runs/${{run.name}}", "hydra/launcher=submitit_slurm"),
        *(f"hydra.sweep.dir={ground.path}/sweep", "hydra.launcher.timeout_min=10", *words),
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, env=environment
    )


@pytest.fixture
def submitit():
    if find_spec("submitit") is None:
        missing = "submitit is not installed: pip install -e '.[slurm]'"
        pytest.fail(missing) if os.environ.get("CAMBRIAN_REQUIRE_SLURM") else pytest.skip(missing)


def test_a_sweep_by_submitit_is_a_job_for_each_run_and_ends_with_its_status(ground, submitit):
    done = sweep(ground, "seed=0,1")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in ground.path.glob("runs/swept-*") if (path / "summary.json").exists())
    assert len(names) == 2 and "seed=0" in names[0] and "seed=1" in names[1]
    manifests = [json.loads((ground.run(name) / "manifest.json").read_text()) for name in names]
    assert len({manifest["scheduler"]["SLURM_JOB_ID"] for manifest in manifests}) == 2
    refused = sweep(ground, "seed=0,1", "data.path=/nowhere")
    assert refused.returncode == 2, refused.stderr
