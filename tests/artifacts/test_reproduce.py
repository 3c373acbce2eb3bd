"""A run again comes out the same, and what is not as it was is named."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import yaml

from artifacts.manifest import surroundings
from artifacts.reproduce_diff import ABSENT, compare, differences, first_config, repeatable
from launch import reproduce as library
from scripts import reproduce
from tests.training.ground import ROOT
from training.loop import fit

WORDS = ("training.num_steps=8", "checkpoint.every=4", "eval.every=8", "schedule=constant")


@pytest.fixture(scope="module")
def made(ground):
    """A run of eight steps on the eight devices of the suite."""
    assert fit(ground.config("made", *WORDS)) == 0
    return "made"


@pytest.fixture
def copied(ground, made, tmp_path):
    """A copy of it that a test may alter."""
    shutil.copytree(ground.run(made), tmp_path / "runs/made")
    return tmp_path / "runs/made"


def edit(run, **facts):
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


@pytest.fixture
def quick(monkeypatch):
    """Asks this process, not another one, what it finds."""
    real = subprocess.run

    def run(words, **options):
        if words[:2] != [sys.executable, "-c"]:
            return real(words, **options)
        return subprocess.CompletedProcess(words, 0, json.dumps(surroundings(), default=str), "")

    monkeypatch.setattr(library.subprocess, "run", run)


def check(run, capsys, *more):
    status = reproduce.main([run.name, f"runs={run.parent}", "check=true", *more])
    return status, capsys.readouterr().out


def test_nothing_differs_where_nothing_has_changed(copied, quick, capsys):
    status, said = check(copied, capsys)
    assert "nothing differs" in said and status == 0, said


def test_a_changed_package_is_named_with_both_versions(copied, quick, capsys):
    packages = manifest(copied)["packages"]
    edit(copied, packages=packages | {"optax": "0.0.1", "gone": "1.0"}, system="another kernel")
    status, said = check(copied, capsys)
    assert status == 1
    lines = {tuple(line.split()) for line in said.splitlines()}
    assert ("package", "optax", "0.0.1", packages["optax"]) in lines
    assert ("package", "gone", "1.0", ABSENT) in lines
    (system,) = [line for line in said.splitlines() if line.startswith("system")]
    assert "another kernel" in system and system.endswith("(changes no number)")


def test_a_changed_text_is_named_and_nothing_is_run_on_it(ground, copied, quick, capsys, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(ground.path / "texts", texts)
    (texts / "0.txt").write_text("another text altogether")
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["data"] |= {"path": str(texts), "cache_dir": str(tmp_path / "data")}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    status, said = check(copied, capsys)
    assert status == 1 and "dataset digest" in said
    assert manifest(copied)["data"]["digest"] in said
    assert reproduce.main([copied.name, f"runs={copied.parent}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: dataset digest is ") and "restore it, or give here=true" in error
    shutil.rmtree(texts)
    status, said = check(copied, capsys)
    assert status == 1 and "none: " in said


def test_other_devices_threads_flags_and_files_are_named():
    then = {
        "python": "3.11.1",
        "packages": {"jax": "1"},
        "git": {"sha": "a", "diff_sha256": None, "untracked": ["notes.txt"]},
        "devices": {"platform": "gpu", "kind": "H100", "count": 8},
        "threads": {"affinity": 8, "cpus": 8},
        "jax": {"jax_enable_x64": False, "jax_compilation_cache_dir": "/here"},
        "environment": {"XLA_FLAGS": "--a"},
        "locks": {"requirements.lock": "x"},
        "data": {"digest": "d"},
    }
    assert differences(then, then) == []
    now = {
        **then,
        "git": {"sha": "b", "diff_sha256": "c", "untracked": ["new.py"]},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
        "threads": {"affinity": 2, "cpus": 4},
        "jax": {"jax_enable_x64": True, "jax_compilation_cache_dir": "/there"},
        "environment": {},
        "locks": {"requirements.lock": "y"},
        "tokenizer": {"digest": "t"},
    }
    found = {one.what: (one.then, one.now, one.matters) for one in differences(then, now)}
    assert found == {
        "commit": ("a", "b", True),
        "uncommitted changes (sha256 of git diff)": (ABSENT, "c", True),
        "untracked file notes.txt": ("there", ABSENT, False),
        "untracked file new.py": (ABSENT, "there", True),
        **{"devices platform": ("gpu", "cpu", True), "devices kind": ("H100", "cpu", True)},
        **{"devices count": ("8", "1", True), "threads affinity": ("8", "2", True)},
        **{"threads cpus": ("8", "4", False), "jax jax_enable_x64": ("False", "True", True)},
        **{"environment XLA_FLAGS": ("--a", ABSENT, True), "lock requirements.lock": ("x", "y", False)},
        "tokenizer digest": (ABSENT, "t", True),
    }


def test_the_first_starts_config_comes_back_out_of_the_last_ones():
    restarts = [
        {"step": 3, "config": {"mesh.data": [1, 2], "logging.new": [ABSENT, 5]}},
        {"step": 6, "config": {"mesh.data": [2, 4]}},
    ]
    last = {"mesh": {"data": 4}, "logging": {"new": 5}}
    assert first_config(last, {"restarts": restarts}) == {"mesh": {"data": 1}, "logging": {}}
    assert last == {"mesh": {"data": 4}, "logging": {"new": 5}}


def test_what_a_restart_changed_bounds_what_can_be_repeated():
    first = {
        "packages": {"jax": "1"},
        "git": {"sha": "a", "untracked": []},
        "jax": {"jax_compilation_cache_dir": 1},
    }
    same = {"step": 3, "config": {"eval.every": [1, 2]}, "git": {"sha": "a", "untracked": ["x"]}, "jax": {}}
    limit, notes = repeatable(first | {"restarts": [same]})
    assert limit is None and "nothing is lost" in notes[0]
    other = {"step": 5, "config": {"mesh.data": [1, 2]}, "packages": {"jax": "2"}}
    limit, notes = repeatable(
        first | {"restarts": [same, other, {"step": 7, "config": {"mesh.data": [2, 1]}}]}
    )
    assert limit == 5 and "packages, mesh.data (1, then 2)" in notes[1]
    limit, notes = repeatable(first | {"restarts": [], "rollbacks": [{"step": 4}]})
    assert limit is None and "1 rollbacks: the rerun meets the same fault" in notes[0]


def test_the_first_step_that_differs_is_told_with_its_distance():
    then = [{"step": i, "loss": 2.0, "grad_norm": 1.0} for i in (1, 2, 3)]
    assert compare(then, then, ("loss", "grad_norm")) == (3, None)
    now = [dict(row) for row in then]
    now[1]["grad_norm"] = 1.0 + 2**-23
    equal, mismatch = compare(then, now, ("loss", "grad_norm"))
    assert equal == 1 and str(mismatch) == (
        "step 2: grad_norm was 1.0 and is 1.0000001192092896, 1.19e-07 apart (1.19e-07 of it)"
    )
    assert compare(then, now, ("loss", "grad_norm"), 1e-6) == (3, None)
    assert compare(then, now[:2], ("loss",))[1].step == 3  # a row that is not there
    nan = [{"step": 1, "loss": float("nan")}]
    assert compare(nan, nan, ("loss",)) == (1, None)
    assert compare(nan, [{"step": 1}], ("loss",))[1] is not None


def test_bad_input_is_one_line(copied, capsys):
    for words, said in {
        ("nowhere",): "run=nowhere is no run's name or directory; ",
        ("made", "steps=0"): "steps=0 must be 1 or more",
        ("made", "tolerance=2"): "tolerance=2.0 must be 0 or more, and below 1",
    }.items():
        assert reproduce.main([*words, f"runs={copied.parent}"]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


def test_code_that_cannot_be_had_stops_it_with_the_reason(copied, quick, capsys):
    words = [copied.name, f"runs={copied.parent}"]
    edit(copied, git={"sha": "0" * 40, "diff_sha256": None, "untracked": []})
    assert reproduce.main(words) == 2
    assert "commit 000000000 is not in this repository" in capsys.readouterr().err
    edit(copied, git={"sha": "0" * 40, "diff_sha256": "1" * 64, "untracked": []})
    assert reproduce.main(words) == 2
    assert "git.diff, the run's uncommitted changes, is missing or altered" in capsys.readouterr().err
    edit(copied, git=None)
    assert reproduce.main(words) == 2
    assert "the run has no git commit; here=true runs with the code" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.faults
def test_a_rerun_is_identical_and_a_changed_row_is_found(ground, made, copied, capfd, tmp_path):
    words = [made, f"runs={ground.path}/runs"]
    assert reproduce.main([*words, f"output={tmp_path}/all"]) == 0
    assert "identical: 8 steps, loss and grad_norm bit for bit" in capfd.readouterr().out
    assert (tmp_path / "all/summary.json").is_file()
    log = copied / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    (third,) = [row for row in rows if row["step"] == 3 and "loss" in row]
    third["loss"] *= 1 + 2**-22
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = [copied.name, f"runs={copied.parent}", "steps=4"]
    assert reproduce.main(again) == 1
    said = capfd.readouterr().out
    assert "differs at step 3: loss was" in said and "2 steps before it are equal" in said
    assert not (copied.with_name("made-again") / "summary.json").exists()  # ended behind its fourth step


def said_by(cwd, environment, *command):
    """The exit status of a command in a process of its own, and all that it said."""
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.faults
def test_a_dirty_tree_is_named_and_its_run_is_repeated_when_the_tree_is_clean(tmp_path, ground):
    """A run of a changed tree, repeated when it is gone: in a worktree with the change applied."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    step = clone / "training/step.py"
    clean = step.read_text()
    step.write_text(clean + "\n# changed\n")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(clone)}
    words = ground.words("dirty", *WORDS, f"run.dir={tmp_path}/runs/dirty")

    run = partial(said_by, clone, environment)

    status, said = run("train.py", *words)
    assert status == 0, said
    command = ("scripts/reproduce.py", "dirty", f"runs={tmp_path}/runs")
    step.write_text(clean)
    (clone / "stray.py").touch()
    status, said = run(*command, "check=true")
    assert status == 1 and "uncommitted changes (sha256 of git diff)" in said
    assert "untracked file stray.py" in said
    status, said = run(*command, "steps=3")
    assert status == 0 and "identical: 3 steps" in said, said
    assert "the run's commit and changes, checked out" in said
    listed = subprocess.run(["git", "worktree", "list"], cwd=clone, capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1  # ours is gone again


@pytest.mark.slow
@pytest.mark.faults
def test_the_quickstart_itself_comes_out_the_same(tmp_path):
    """What the README says first, and reproduced by its name: its own data, tokenizer, model and Muon.

    As long as its data take to prepare: of its 640 steps the first 12.
    """
    shorter = ("training.num_steps=12", "schedule.warmup_steps=4", "eval.batches=1", "checkpoint.every=6")
    places = (
        f"run.dir={tmp_path}/runs/quickstart",
        f"data.cache_dir={tmp_path}/data",
        f"run.compile_cache={tmp_path}/xla",
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    run = partial(said_by, ROOT, environment)
    silent = ("sample.prompts=[]", "sample.parse_snippets=0")
    status, said = run("train.py", "+experiment=quickstart", *shorter, *silent, *places)
    assert status == 0, said
    status, said = run("scripts/reproduce.py", "quickstart", f"runs={tmp_path}/runs")
    assert status == 0 and "identical: 12 steps, loss and grad_norm bit for bit" in said, said
