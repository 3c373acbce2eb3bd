"""The same job as one, two and four processes, of eight devices in all: jobs of the real command.

Losses agree to 1e-6: gloo adds in another order than one process does, so not to the last bit.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from data.errors import DataError
from data.loading.held_out import EvalBatches
from data.loading.loader import Loader
from data.pipeline import follow, prepare
from tests.training.ground import ROOT
from tests.training.test_resume import assert_few_redone
from training.device_batches import placing, rows_here
from training.loop import fit

SMALL = (
    *("data.seq_len=16", "model.num_layers=1", "model.d_model=32", "model.d_ff=32", "model.num_heads=4"),
    *("model.num_kv_heads=4", "training.global_batch_size=8", "schedule=constant", "schedule.warmup_steps=1"),
    *("training.num_steps=6", "checkpoint.every=3", "eval.every=3", "eval.batches=1", "logging.every=1"),
)
SAMPLES = ("sample.prompts=[ab]", "sample.max_new_tokens=4", "logging.tensorboard=true")
DEADLINE = 240  # seconds; only a hang takes so long


def job(ground, processes, name, *words):
    return subprocess.Popen(
        [
            *(sys.executable, "scripts/launch_local.py", "--processes", str(processes)),
            *ground.words(name, *SMALL, *words),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == status, err
    return out, err


def files(directory):
    """What a run wrote, without what each start or checkpoint format names anew."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    kept = {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}
    return kept, len([name for name in names if name.startswith("tensorboard/")])


def assert_same_losses(rows, wanted):
    assert [(r["step"], "loss" in r) for r in rows] == [(r["step"], "loss" in r) for r in wanted]
    for row, other in zip(rows, wanted, strict=True):
        for key in ("loss", "grad_norm", "eval/loss"):
            if key in other:
                assert row[key] == pytest.approx(other[key], rel=1e-6), (row["step"], key)
        assert row.get("tokens") == other.get("tokens")


@pytest.fixture(scope="module")
def one(ground):
    """One process with the eight devices of the test suite itself."""
    assert fit(ground.config("one", *SMALL, *SAMPLES)) == 0
    return "one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, ()),
        # Two processes share each row: one has its first half, the other its second.
        pytest.param(
            4,
            ("mesh=long_context", "mesh.data=2", "mesh.fsdp=1", "mesh.context=2", "mesh.tensor=2"),
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_every_count_of_processes_gives_the_same_losses_and_writes_the_run_once(ground, one, processes, mesh):
    name = f"of_{processes}"
    out, err = finish(job(ground, processes, name, *SAMPLES, *mesh))
    assert not err
    assert_same_losses(ground.rows(name), ground.rows(one))
    assert files(ground.run(name)) == files(ground.run(one))
    assert (ground.run(name) / "samples/6.txt").read_text() == (ground.run(one) / "samples/6.txt").read_text()
    assert out.count("step 6/6") == out.count("training loss") == 1
    manifest = json.loads((ground.run(name) / "manifest.json").read_text())
    assert (manifest["devices"]["count"], manifest["devices"]["processes"]) == (8, processes)
    record, wanted = ground.record(name, 6), ground.record(one, 6)
    assert (record["types"], record["data"], record["tokens"]) == (
        wanted["types"],
        wanted["data"],
        wanted["tokens"],
    )


def rank(launcher, number):
    """The process id of a rank."""
    for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if f"CAMBRIAN_PROCESS={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
                b"\0"
            ):
                return pid
    raise AssertionError(f"no rank {number}")


def steps_done(ground, name):
    path = ground.run(name) / "metrics.jsonl"
    return sum(b'"loss"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_a_notice_to_one_stops_all_and_checkpoints_cross_process_counts(ground):
    """Three steps by one process, two of which one is killed, two of which one has a notice, one to the end.

    Of the notice nothing is lost: every step that has a row is in the checkpoint, though rank 1 alone had it.
    """
    fit(ground.config("crossing", *SMALL, "training.num_steps=3"))
    killed = job(ground, 2, "crossing", *LONG)
    at_step(killed, ground, "crossing", 8)
    os.kill(rank(killed, 1), signal.SIGKILL)
    _, err = finish(killed, 128 + signal.SIGKILL)
    assert "rank 1 was ended by SIGKILL" in err
    reached = newest(ground, "crossing")
    written = steps_done(ground, "crossing")  # rows behind the checkpoint are written once more
    assert_few_redone([written], [reached], every=3)
    noticed = job(ground, 2, "crossing", *LONG)
    at_step(noticed, ground, "crossing", written + 1)
    os.kill(rank(noticed, 1), signal.SIGUSR1)
    _, err = finish(noticed, 75)
    saved = newest(ground, "crossing")
    said = f"stopped: SIGUSR1; saved at step {saved}, from where the same command goes on"
    assert [line.partition("] ")[2] for line in err.splitlines()] == [said]
    assert steps_done(ground, "crossing") == saved > reached
    last = f"training.num_steps={saved + 2}"
    fit(ground.config("crossing", *SMALL, last))
    fit(ground.config("uncrossed", *SMALL, last))
    rows, wanted = ([row for row in ground.rows(name) if "loss" in row] for name in ("crossing", "uncrossed"))
    assert_same_losses(rows, wanted)
    manifest = json.loads((ground.run("crossing") / "manifest.json").read_text())
    assert [start["step"] for start in manifest["restarts"]] == [3, reached, saved]


LONG = ("training.num_steps=2000", "eval.every=2000")  # stopped long before


def at_step(process, ground, name, step):
    end = time.monotonic() + DEADLINE
    while steps_done(ground, name) < step:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def newest(ground, name):
    return max(int(p.name) for p in (ground.run(name) / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.mark.slow
def test_what_stops_a_job_is_said_once_and_every_rank_has_the_status(ground, one, tmp_path):
    statuses = tmp_path / "statuses"
    new = ("data.path=/nowhere", "run.name=new", f"run.dir={ground.run('new')}")
    cases = {
        "before JAX": (("model.num_heads=5",), "model.num_kv_heads=4 must divide model.num_heads=5"),
        "the primary's": (("seed=7",), "was made with another configuration: seed is 0 there and 7 now"),
        "in its data": (new, "data.path=/nowhere does not exist"),
    }
    for case, (words, said) in cases.items():
        statuses.mkdir()
        out, err = finish(watched(ground, statuses, *words), 2)
        assert err.count("error: ") == 1 == len(err.splitlines()) and said in err, (case, err)
        assert {path.read_text() for path in statuses.iterdir()} == {"2"}, case
        assert len(list(statuses.iterdir())) == 2
        shutil.rmtree(statuses)
    assert not ground.run("new").exists()


def watched(ground, statuses, *words, name="one", script=("train.py",)):
    """A job of two whose ranks leave their exit status in a directory. script: what Python runs."""
    rank = (
        "import os, subprocess, sys; "
        "s = subprocess.run([sys.executable, *sys.argv[2:]]).returncode; "
        "open(sys.argv[1] + '/' + os.environ['CAMBRIAN_PROCESS'], 'w').write(str(s)); sys.exit(s)"
    )
    launcher = (
        "import sys; from launch.local import LaunchOptions, LocalJob; "
        "sys.exit(LocalJob(LaunchOptions(2, 4, 5, []), [sys.executable, '-c', *sys.argv[1:]]).run())"
    )
    command = [
        sys.executable,
        "-c",
        launcher,
        rank,
        str(statuses),
        *script,
        *ground.words(name, *SMALL),
        *words,
    ]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def prepared(ground):
    return prepare(ground.config("rows").data, ground.config("rows").tokenizer, progress=False)


def test_another_process_opens_what_one_has_prepared(ground, prepared, tmp_path):
    facts = json.loads(json.dumps(prepared.facts()))
    there = follow(facts)
    assert (there.digest, there.description) == (prepared.digest, prepared.description)
    assert there.tokenizer.digest == prepared.tokenizer.digest
    np.testing.assert_array_equal(there.train.tokens, prepared.train.tokens)
    facts["stores"]["train"] = str(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="elsewhere.* is missing.* a file system that all processes share"):
        follow(facts)


@pytest.mark.parametrize("rows", [np.arange(2, 5), np.array([0, 1, 6, 7]), np.array([7])])
def test_a_process_makes_any_rows_of_a_batch(ground, prepared, rows):
    config = ground.config("rows")
    loader = Loader(prepared, config.data, global_batch_size=8, seed=0)
    held_out = EvalBatches(prepared.validation, config.data, batch_size=8)
    for step in (0, 1, 1000):
        whole = loader.batch(step)
        for key, value in loader.batch(step, rows).items():
            np.testing.assert_array_equal(value, whole[key][rows])
    for part, whole in zip(held_out.batches(rows), held_out, strict=True):  # the last one is padded
        for key, value in part.items():
            np.testing.assert_array_equal(value, whole[key][rows])


@pytest.mark.parametrize("spec", [P("fsdp", "context"), P(("fsdp", "tensor"), None), P(None, "tensor"), P()])
def test_placed_rows_are_the_batch(spec):
    """With one process all rows are here; that others' are left out is what the jobs above show."""
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)
    tokens = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    abstract = {"tokens": jax.ShapeDtypeStruct((8, 4), np.int32, sharding=NamedSharding(mesh, spec))}
    rows = rows_here(abstract)
    assert rows.tolist() == list(range(8))
    placed = placing(abstract, rows)({"tokens": tokens})["tokens"]
    assert placed.sharding == abstract["tokens"].sharding
    np.testing.assert_array_equal(placed, tokens)
