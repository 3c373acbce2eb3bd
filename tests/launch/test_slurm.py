"""What is asked of Slurm: keys, refusals, names, the copy of the code, and how a job is followed."""

import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from common.checks import ConfigError
from launch.slurm.config import SlurmConfig, seconds_of, slurm_config, split_words
from launch.slurm.follow import State, follow
from launch.slurm.snapshot import snapshot
from scripts.slurm import elements_of, main, next_directory, prepare, purpose
from tests.configs.composing import config

DEBUG = ("+experiment=debug",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm.nods=2"], "slurm.nods is not a key; did you mean nodes?"),
        (["slurm.nodes=2.5"], "slurm.nodes=2.5 must be a whole number"),
        (["slurm.nodes=0"], "slurm.nodes=0 must be 1 or more"),
        (["slurm.cpus_per_task=x"], "must be a whole number or null"),
        (["slurm.requeue=maybe"], "slurm.requeue=maybe must be true or false"),
        (["slurm.time=soon"], "slurm.time=soon is no time; give minutes, HH:MM:SS or DAYS-HH:MM:SS"),
        (["slurm.time=2"], "slurm.signal_seconds=120 must be from 1 to 119, within slurm.time=2"),
        (
            ["slurm.gpus_per_node=8", "slurm.tasks_per_node=3"],
            "does not divide slurm.gpus_per_node=8.* use slurm.tasks_per_node=1, 2, 4, 8",
        ),
        (["slurm.options=[mail]"], "slurm.options=mail must be options of sbatch, such as --mail-type=END"),
        (["slurm.partition=a\n#SBATCH --qos=b"], "slurm.partition holds a line break"),
        (["slurm.setup=[a: b]"], "is no list of texts"),
        (["slurm.file=/nowhere.yaml"], "slurm.file=/nowhere.yaml cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(words, said):
    with pytest.raises(ValueError, match=said) as error:
        slurm_config(words)
    assert "\n" not in str(error.value) or "\n" in words[0]


def test_values_are_taken_as_typed_and_words_win_over_a_file(tmp_path):
    (tmp_path / "cluster.yaml").write_text(
        "partition: gpu\nnodes: 1\ntime: 2:00:00\nsetup: [module load cuda, 'x: y']\n"
    )
    slurm, words = split_words(
        [f"slurm.file={tmp_path}/cluster.yaml", "seed=1", "slurm.nodes=3", "slurm.options=[--a=1, '--b=x y']"]
    )
    assert words == ["seed=1"]
    assert (slurm.nodes, slurm.partition, slurm.time) == (3, "gpu", "2:00:00")
    assert slurm.setup == ["module load cuda", "x: y"] and slurm.options == ["--a=1", "--b=x y"]
    setup = "source ${HOME:-/}/env/bin/activate"
    assert slurm_config([f"slurm.setup={setup}", "slurm.qos=null"]).setup == [setup]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("02:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("0-0:0:9", 9)],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("slurm", "words", "said"),
    [
        (
            SlurmConfig(nodes=2, gpus_per_node=4),
            ("mesh.data=4",),
            r"slurm.nodes=2 \* slurm.gpus_per_node=4 is 8 devices; mesh.data=4 is 4 devices but 8 are here",
        ),
        (
            SlurmConfig(nodes=3),
            (),
            r"slurm.nodes=3 \* slurm.tasks_per_node=1 is 3 devices; .*global_batch_size=8",
        ),
        (
            SlurmConfig(nodes=2),
            ("mesh.data=1",),
            "is 2 devices; every mesh axis is 1, one device, but 2 are here",
        ),
    ],
)
def test_a_mesh_of_other_devices_than_the_job_has_is_refused(slurm, words, said):
    with pytest.raises(ConfigError, match=said):
        prepare(config(*DEBUG, *words), slurm, [*DEBUG, *words], [[]], [])


def test_an_array_names_its_runs_as_a_sweep_does_and_refuses_two_of_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slurm = SlurmConfig(array="seed=3 optim.learning_rate=1e-3,2e-3")
    words, elements = elements_of(slurm, list(DEBUG))
    submission, configs = prepare(config(*DEBUG, *elements[0]), slurm, words, elements, [])
    names = [element.name for element in submission.elements]
    assert names == [f"debug-seed=3,optim.learning_rate={rate}" for rate in (0.001, 0.002)]
    assert [one.run.name for one in configs] == names and submission.name == "debug"
    # What train.py -m makes of the same words.
    swept = elements_of(SlurmConfig(), ["-m", *DEBUG, "seed=0,1"])
    assert swept == ([], [[*DEBUG, "seed=0"], [*DEBUG, "seed=1"]])
    with pytest.raises(ConfigError, match="two elements of this array would share runs/debug-seed=0"):
        prepare(config(*DEBUG), SlurmConfig(array="x"), list(DEBUG), [["seed=0"], ["seed=0"]], [])
    with pytest.raises(ValueError, match="slurm.array=seed=0,1 and -m both make an array"):
        elements_of(SlurmConfig(array="seed=0,1"), ["-m", *DEBUG])


def test_without_submission_all_is_written_and_the_script_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "slurm.nodes=2", "slurm.submit=false"]) == 0
    here = tmp_path / "runs/debug.slurm/1"
    said = capsys.readouterr().out
    assert (here / "job.sh").read_text() in said
    assert (here / "code/train.py").exists() and "num_steps: 20" in (here / "config.yaml").read_text()
    assert not (tmp_path / "runs/debug").exists()  # which train.py would take for another's
    assert next_directory(here.parent) == here.parent / "2"  # an earlier job may still run from the first


def test_where_there_is_no_slurm_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*DEBUG]) == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_has_every_key_with_what_it_is():
    page = purpose()
    for field in fields(SlurmConfig):
        assert f"\n    {field.name}=" in page


def git(root: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(root), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_copy_is_the_code_as_it_is_and_later_edits_do_not_reach_it(tmp_path):
    root, copy = tmp_path / "root", tmp_path / "copy"
    (root / "configs").mkdir(parents=True)
    git(root, "init", "--quiet")
    for name in ("kept.py", "changed.py", "gone.py", "configs/__init__.py"):
        (root / name).write_text("committed\n")
    (root / ".gitignore").write_text("runs/\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=one")
    (root / "changed.py").write_text("not committed\n")
    (root / "gone.py").unlink()
    (root / "configs/new.yaml").write_text("untracked\n")
    for place in ("runs", "elsewhere"):
        (root / place).mkdir()
        (root / place / "large").write_text("no code\n")
    assert (
        snapshot(copy, root)
        == f"commit {git(root, 'rev-parse', 'HEAD')[:9]} with 3 files that are not committed"
    )
    for name in ("kept.py", "changed.py", "configs/new.yaml"):
        (root / name).write_text("edited while the job waits\n")
    there = [path for path in copy.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert {path.relative_to(copy).as_posix(): path.read_text() for path in there} == {
        **{".gitignore": "runs/\n", "kept.py": "committed\n", "changed.py": "not committed\n"},
        **{"configs/__init__.py": "committed\n", "configs/new.yaml": "untracked\n"},
    }
    assert git(copy, "diff", "--name-only", "HEAD").split() == ["changed.py", "gone.py"]
    assert git(copy, "rev-parse", "HEAD") == git(root, "rev-parse", "HEAD")


def test_code_that_is_no_checkout_is_copied_room_by_room(tmp_path):
    root = tmp_path / "root"
    snapshot(root / "first")  # of this code
    shutil_tree = root / "first"
    (shutil_tree / ".git").rename(tmp_path / "elsewhere")
    said = snapshot(root / "second", shutil_tree)
    assert said.endswith("which is no git checkout")
    for name in ("train.py", "configs/config.yaml", "training/loop.py", "pyproject.toml"):
        assert (root / "second" / name).exists()


def states(*names: str, status: int = 0, signal: int = 0) -> list[dict[str, State]]:
    return [{"7": State(name, "", status, signal, 1)} for name in names]


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (states("COMPLETED"), 0),
        (states("FAILED", status=2), 2),
        (states("FAILED", status=75), 75),
        (states("CANCELLED", signal=15), 143),
        (states("OUT_OF_MEMORY", signal=9), 137),
        (states("TIMEOUT"), 75),  # the same command goes on
        (states("NODE_FAIL"), 75),
        (states("FAILED"), 1),
    ],
)
def test_the_status_is_that_of_the_job(tmp_path, ends, status):
    assert watched(tmp_path, states("PENDING", "RUNNING") + ends)[0] == status


def watched(tmp_path, seen, before=lambda path, n: None):
    """The status and all that was said, of a job that goes through these states and stays in the last."""
    log, said, calls = tmp_path / "log", [], []

    def look(job):
        calls.append(job)
        before(log, len(calls))
        return seen[min(len(calls), len(seen)) - 1]

    status = follow("7", lambda element: log, poll=0, look=look, write=said.append)
    return status, "".join(said)


def test_following_goes_on_over_a_requeue_and_prints_each_line_once(tmp_path):
    seen = states("RUNNING", "FAILED", "PENDING", "RUNNING", "COMPLETED")

    def print_more(log, n):
        with log.open("a") as file:
            file.write(f"line {n}\n")

    status, said = watched(tmp_path, seen, print_more)
    assert status == 0
    assert [line for line in said.splitlines() if line.startswith("line")] == [
        f"line {n}" for n in range(1, 7)
    ]
    assert said.count("[7] running") == 2 and said.count("[7] completed") == 1


def test_of_an_array_the_worst_status_counts_and_a_forgotten_job_is_said(tmp_path):
    ended = {"7_0": State("COMPLETED", "", 0, 0, 1), "7_1": State("FAILED", "", 2, 0, 1)}
    assert watched(tmp_path, [{"7_[0-1]": State("PENDING", "Priority", 0, 0, 1)}, ended])[0] == 2
    with pytest.raises(OSError, match="Slurm no longer knows job 7"):
        watched(tmp_path, [{}])
