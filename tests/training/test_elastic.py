"""The same command on other devices: the mesh is found again, and the run goes on with the same samples.

Real jobs are killed and noticed here; what each step was fed is written down by the processes themselves, row
by row, and compared with what one loader alone gives.
"""

import hashlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
import yaml

from artifacts.directory import RunDirectory
from common.errors import Requeue
from data.loading.loader import Loader
from data.pipeline import prepare
from scripts import autoscale as script
from tests.training.ground import ROOT
from tests.training.test_processes import SMALL, at_step, finish, newest, rank, steps_done
from tests.training.test_resume import assert_few_redone
from training.autoscale import apply
from training.autoscale.apply import (
    DECIDED,
    DEPTH,
    Scaled,
    by_process,
    nodes_wanted,
    queue_depth,
    scale,
    settled,
)
from training.autoscale.policy import TooFew
from training.legal.nearest import legal
from training.loop import fit

# Eight rows, on eight devices one each; the full mesh is asked for at every start.
ELASTIC = ("autoscale=nodes", "mesh.data=8", "eval.every=2000")
# Losses of a run that changed devices against one that did not: other sums in another order. Measured: 8e-8
# over 12 steps of one process, 2e-7 over some 20 of several.
TOLERANCE = 1e-6


def composed(ground, *words):
    return ground.config("elastic", *SMALL, "autoscale=nodes", *words)


@pytest.mark.parametrize(
    ("words", "devices", "mesh", "turns"),
    [
        (("mesh.data=8",), 8, {"data": 8}, 1),
        (("mesh.data=8",), 7, {"data": 4}, 2),
        (("mesh.data=8", "training.global_batch_size=24"), 7, {"data": 6}, 2),
        (("mesh=fsdp", "autoscale.max_devices=8"), 4, {"fsdp": 4}, 2),
        (("mesh.data=2", "mesh.tensor=4"), 7, {"tensor": 4}, 2),
        # Below mesh.fsdp=4 a device would hold more, so fewer devices are used rather than another mesh.
        (("mesh.data=2", "mesh.fsdp=4", "training.global_batch_size=24"), 7, {"fsdp": 4}, 2),
        (
            ("mesh.data=4", "mesh.pipeline=2", "pipeline.microbatches=2", "model.num_layers=2"),
            4,
            {"data": 2},
            4,
        ),
        (("mesh.data=-1", "autoscale.rows_per_device=2"), 4, {"data": 4}, 1),
    ],
)
def test_meshes_are_legal_by_the_rules_of_every_config(ground, words, devices, mesh, turns):
    config = composed(ground, *words)
    made = settled(config, devices, None)
    assert made.turns == turns and {a: made.sizes[a] for a in mesh} == mesh
    there = apply.applied(config, made)
    assert legal(there, made.used) is None
    assert there.training.global_batch_size == config.training.global_batch_size
    # The rules that are asked are the config's: 32 wide, which 3 does not divide, nor 5 the four heads.
    assert made.used == math.prod(made.sizes.values())


def test_replicas_that_step_alone_do_not_move(ground):
    alone = composed(
        ground,
        "mesh.replica=2",
        "mesh.data=4",
        "local_sgd.inner_steps=3",
        "eval.every=3",
        "checkpoint.every=3",
    )
    assert settled(alone, 5, None).sizes["replica"] == 2
    with pytest.raises(ValueError, match="mesh.replica=2 stays as it is.* start on 2, 4, 8 devices"):
        settled(alone, 1, None)


SLICES = ("mesh=multi_slice", "mesh.replica=4")


def test_slices_are_lost_and_found_whole(ground):
    """Four slices of two devices; `mesh.dcn` follows, and is empty on the last one."""
    config = composed(ground, *SLICES)
    for devices, replicas, turns in ((8, 4, 1), (6, 2, 2), (4, 2, 2), (2, 1, 4), (16, 4, 1)):
        made = settled(config, devices, None, each=2)
        assert (made.sizes["replica"], made.sizes["fsdp"], made.turns) == (replicas, 2, turns)
        there = apply.applied(config, made)
        assert there.mesh.dcn == ({"replica": replicas} if replicas > 1 else {})
        assert settled(config, devices, {**made.sizes}) == made  # a slice is what it was at the last start
    with pytest.raises(ValueError, match="fits 1 device; start on 2, 4, 8 devices"):
        settled(config, 1, None, each=2)
    with pytest.raises(
        ValueError, match=r"mesh.dcn.replica=4: how many devices a slice has shows at a first"
    ):
        settled(config, 8, None)
    with pytest.raises(
        ValueError, match="a slice is used whole, and 3 devices are not .* whose product is 3"
    ):
        settled(composed(ground, *SLICES, "mesh.fsdp=2"), 6, None, each=3)
    with pytest.raises(ValueError, match="mesh.dcn.fsdp=2: autoscale counts slices along one of"):
        settled(composed(ground, "mesh=fsdp", "mesh.fsdp=8", "+mesh.dcn.fsdp=2"), 8, None, each=4)


@pytest.mark.parametrize(
    ("processes", "used", "held"),
    [
        ([0, 0, 1, 1, 2, 2], 6, [2, 2, 2]),
        ([0, 0, 1, 1, 2, 2], 4, [2, 2]),
        ([0, 0, 0, 0, 1, 1, 1, 1], 6, [3, 3]),
        ([0, 0, 0, 0, 1, 1, 1, 1], 5, [4, 1]),
        ([0, 1, 2, 3], 1, [1]),
        ([0] * 8, 6, [6]),
    ],
)
def test_as_few_processes_as_hold_the_mesh_and_each_the_same(processes, used, held):
    assert by_process(processes, used) == held


def test_the_depth_of_a_queue_is_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(DEPTH, "7")
    assert queue_depth("env") == 7
    monkeypatch.setenv(DEPTH, "many")
    with pytest.raises(ValueError, match="CAMBRIAN_QUEUE_DEPTH .* holds 'many', which is no number"):
        queue_depth("env")
    monkeypatch.delenv(DEPTH)
    with pytest.raises(ValueError, match="CAMBRIAN_QUEUE_DEPTH .* is not set"):
        queue_depth("env")
    (tmp_path / "depth").write_text("12\n")
    assert queue_depth(str(tmp_path / "depth")) == 12
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        queue_depth(str(tmp_path / "nowhere"))


def test_squeue_counts_pending_jobs_of_the_partition_but_not_this_one(tmp_path, monkeypatch):
    """A stand-in for the command: what it was asked is in a file, what it answers is squeue's format."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nprintf "11\\n12\\n12\\n40\\n"\n')
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    assert queue_depth("squeue") == 3
    asked = (tmp_path / "asked").read_text()
    assert "--states=PENDING" in asked and "--partition=gpu" in asked and "--array" in asked
    squeue.write_text("#!/bin/sh\necho slurm_load_jobs error >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"squeue failed \(slurm_load_jobs error\)"):
        queue_depth("squeue")


def test_nodes_to_ask_for_are_the_full_size_or_what_the_queue_leaves(ground):
    config = composed(ground, "mesh.data=8")
    assert nodes_wanted(config, 2)[0] == 4
    assert nodes_wanted(config, 3)[0] == 3
    queue = ground.config("elastic", *SMALL, "autoscale=queue", "mesh.data=8", "autoscale.min_devices=2")
    assert nodes_wanted(queue, 2, pending=9)[0] == 1
    assert nodes_wanted(queue, 2, pending=0)[0] == 4
    assert nodes_wanted(queue, 2, {"data": 4}, pending=2)[0] == 2
    free = composed(ground, "mesh.data=-1", "autoscale.rows_per_device=1")
    with pytest.raises(ValueError, match="autoscale.max_devices=null"):
        nodes_wanted(free, 2)
    with pytest.raises(TooFew, match="min_devices=5"):
        settled(composed(ground, "mesh.data=8", "autoscale.min_devices=5"), 7, None)


def test_what_was_decided_before_processes_left_holds_for_this_run_alone(ground, tmp_path, monkeypatch):
    config = ground.config("elastic", *SMALL, "autoscale=queue", "mesh.data=8", "autoscale.min_devices=2")
    run = RunDirectory(tmp_path, {})
    monkeypatch.setenv(DEPTH, "9")
    small = scale(config, run)
    assert small.config.mesh.data == small.decision.used == len(small.devices()) == 2
    assert small.config.training.accumulation_steps == 4 and config.training.accumulation_steps == 1
    decided = {"run": str(tmp_path), "decision": asdict(small.decision)}
    monkeypatch.setenv(DECIDED, json.dumps(decided))
    monkeypatch.setenv(DEPTH, "0")
    assert scale(config, run) == small
    assert scale(config, RunDirectory(tmp_path / "other", {})).decision.used == 8
    assert scale(replace(config, autoscale=None), run) == Scaled(replace(config, autoscale=None))


def test_the_script_prints_a_number_of_nodes_and_says_why_beside_it(ground, tmp_path, capsys):
    config = ground.config("elastic", *SMALL, "autoscale=queue", "mesh.data=8", "autoscale.min_devices=2")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    whole = {"mesh": {"data": 8}, "devices": {"count": 8}, "hosts": ["a", "b"]}
    half = {"mesh": {"data": 4}, "devices": {"count": 4}, "hosts": ["a"]}
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {"restarts": [half]}))
    for words, out, why in (
        (("queue=0",), "2\n", "0 waiting, 0 or fewer: up to 8 devices\n"),
        (("queue=2",), "1\n", "as at the last start, 4 devices\n"),
        (("queue=9", "devices_per_node=1"), "2\n", "down to autoscale.min_devices\n"),
    ):
        assert script.main([str(tmp_path), *words]) == 0
        said = capsys.readouterr()
        assert said.out == out and why in said.err
    assert script.main([str(tmp_path), "queue=0", "devices=5"]) == 0
    assert capsys.readouterr().out.startswith("4 of 5 devices: mesh.data 8 to 4, ")
    assert script.main([str(tmp_path), "devices=0"]) == 2
    assert capsys.readouterr().err == "error: devices=0 must be 1 or more\n"
    assert script.main([str(tmp_path), "queue=0", "devices=1"]) == 2
    assert "autoscale.min_devices=2, but of 1 devices 1 can be used" in capsys.readouterr().err


def restarts(ground, name):
    """What the manifest says of each start: step, devices used, sentences."""
    manifest = json.loads((ground.run(name) / "manifest.json").read_text())
    starts = [{**manifest, "step": 0}, *manifest["restarts"]]
    return [(s["step"], s["autoscale"]["used"], s["autoscale"]["lines"]) for s in starts]


def largest_difference(rows, wanted):
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    return max(
        abs(row["loss"] - other["loss"]) / other["loss"] for row, other in zip(rows, wanted, strict=True)
    )


def losses(ground, name):
    return [row for row in ground.rows(name) if "loss" in row]


@pytest.mark.slow
@pytest.mark.faults
def test_devices_8_4_6_8_of_one_process_give_the_losses_of_8(ground, monkeypatch, capsys):
    """Batch 24, so that 6 devices divide it. Every start by the same words but the number of steps."""
    words = (*SMALL, *ELASTIC, "training.global_batch_size=24")
    everything = jax.devices()
    for steps, count in ((3, 8), (6, 4), (9, 7), (12, 8)):
        here = everything[:count]
        monkeypatch.setattr(jax, "devices", lambda here=here: here)
        assert fit(ground.config("resized", *words, f"training.num_steps={steps}")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "autoscale 6 of 7 devices: mesh.data 8 to 6, training.accumulation_steps 1 to 2; the batch stays"
        in said
    )
    assert [(step, used) for step, used, _ in restarts(ground, "resized")] == [(0, 8), (3, 4), (6, 6), (9, 8)]
    assert fit(ground.config("unresized", *words, "training.num_steps=12")) == 0
    difference = largest_difference(losses(ground, "resized"), losses(ground, "unresized"))
    assert difference < TOLERANCE, difference
    assert ground.record("resized", 12)["data"] == ground.record("unresized", 12)["data"]
    with pytest.raises(Requeue, match="autoscale.min_devices=8, but of 4 devices 4 can be used"):
        monkeypatch.setattr(jax, "devices", lambda: everything[:4])
        fit(ground.config("resized", *words, "training.num_steps=15", "autoscale.min_devices=8"))
    # What was asked for stays in the run's directory, so the next start and the launcher still see 8.
    capsys.readouterr()
    assert script.main([str(ground.run("resized")), "--devices-per-node", "3"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert script.main([str(ground.run("resized")), "--devices", "5"]) == 0
    assert capsys.readouterr().out.startswith("4 of 5 devices: mesh.data 8 to 4, ")


# train.py with a witness: whatever batch the loader gives to be trained on is written down, row by row.
WITNESS = """
import hashlib, json, os, runpy, sys
sys.path.insert(0, os.getcwd())
from data.loading.loader import Loader
batch = Loader.batch

def watched(self, step, rows=None):
    made = batch(self, step, rows)
    numbers = range(len(made["tokens"])) if rows is None else rows
    seen = {int(n): hashlib.sha256(row.tobytes()).hexdigest() for n, row in zip(numbers, made["tokens"])}
    with open(f"{os.environ['WITNESS']}-{os.getpid()}", "a") as file:
        file.write(json.dumps([step, seen]) + "\\n")
    return made

Loader.batch = watched
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def start(ground, witness, processes, *words, name="elastic"):
    """The command as a job of `processes` with two devices each, its batches written to `witness`-*."""
    launcher = (
        "import sys; from launch.local import LaunchOptions, LocalJob; "
        "options = LaunchOptions(int(sys.argv[1]), 2, 60, []); "
        "sys.exit(LocalJob(options, [sys.executable, '-c', *sys.argv[2:]]).run())"
    )
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            launcher,
            str(processes),
            WITNESS,
            *ground.words(name, *SMALL, *ELASTIC, *words),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "WITNESS": str(witness)},
    )


def rows_fed(witness):
    """{step: {row: digest}} of a start, from the files of all its processes; any two agree."""
    fed = {}
    for path in witness.parent.glob(f"{witness.name}-*"):
        for line in path.read_text().splitlines():
            step, seen = json.loads(line)
            for row, digest in seen.items():
                assert fed.setdefault(step, {}).setdefault(int(row), digest) == digest
    return fed


def assert_fed_as_one_loader(ground, witness, first, last):
    """Steps behind `first` up to `last` had every row of the batch, each the one of a loader by itself."""
    config = ground.config("elastic", *SMALL, "mesh.data=8")
    prepared = prepare(config.data, config.tokenizer, progress=False)
    alone = Loader(prepared, config.data, global_batch_size=8, seed=config.seed)
    fed = rows_fed(witness)
    for step in range(first, last):
        tokens = alone.batch(step)["tokens"]
        wanted = {i: hashlib.sha256(np.asarray(row).tobytes()).hexdigest() for i, row in enumerate(tokens)}
        assert fed[step] == wanted, step


@pytest.mark.slow
@pytest.mark.faults
def test_processes_4_killed_2_noticed_3_then_4_have_every_step_once_and_the_samples_of_one(ground, tmp_path):
    """Four processes of two devices, one killed; two go on until a notice; then three, of which one idles."""
    long = "training.num_steps=2000"
    killed = start(ground, tmp_path / "a", 4, long)
    at_step(killed, ground, "elastic", 7)  # behind the second save, which begins when the first is committed
    os.kill(rank(killed, 2), signal.SIGKILL)
    finish(killed, 128 + signal.SIGKILL)
    reached, written = newest(ground, "elastic"), steps_done(ground, "elastic")
    assert_few_redone([written], [reached], every=3)
    noticed = start(ground, tmp_path / "b", 2, long)
    at_step(noticed, ground, "elastic", written + 2)
    os.kill(rank(noticed, 1), signal.SIGTERM)
    finish(noticed, 75)
    saved = newest(ground, "elastic")
    assert steps_done(ground, "elastic") == saved > reached  # nothing is redone
    middle, last = saved + 3, saved + 6
    out, _ = finish(start(ground, tmp_path / "c", 3, f"training.num_steps={middle}"))
    assert "autoscale  4 of 6 devices: mesh.data 8 to 4, training.accumulation_steps 1 to 2" in out
    assert "2 devices stay idle: the next number that fits is 8" in out
    finish(start(ground, tmp_path / "d", 4, f"training.num_steps={last}"))
    assert [(step, used) for step, used, _ in restarts(ground, "elastic")] == [
        *((0, 8), (reached, 4), (saved, 4), (middle, 8)),
    ]
    assert [row["step"] for row in losses(ground, "elastic")] == list(range(1, last + 1))
    for witness, first, end in (
        ("a", 0, reached),
        ("b", reached, saved),
        ("c", saved, middle),
        ("d", middle, last),
    ):
        assert_fed_as_one_loader(ground, tmp_path / witness, first, end)
    fit(ground.config("inelastic", *SMALL, "mesh.data=8", f"training.num_steps={last}"))
    difference = largest_difference(losses(ground, "elastic"), losses(ground, "inelastic"))
    assert difference < TOLERANCE, difference
