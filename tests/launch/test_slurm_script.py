"""The batch script, run by a real bash among clients of Slurm's that only write down what they are asked."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.config import SlurmConfig, split_words
from launch.slurm.script import Element, Submission, render
from scripts.slurm import prepare
from tests.configs.composing import config

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    *(
        "+experiment=debug",
        'sample.prompts=["def ","it\'s $HOME `ls`"]',
        "a=b c;rm -rf {x}",
        "two\nlines",
        "*",
    ),
    *("", "-x", "~", "ä#!\\"),
]
# Each client writes down its arguments; srun starts the command as its task 1, which is python.
FAKE = """#!/bin/bash
place=("$CAMBRIAN_COORDINATOR" "$CAMBRIAN_PROCESSES" "$CAMBRIAN_PROCESS")
{ printf '%s\\0' "$(basename "$0")" "${place[@]}" "$@"; printf '\\1'; } >> "$CALLS"
case $(basename "$0") in
    squeue) echo "$STATE" ;;
    srun)
        while [[ $1 == --* ]]; do shift; done
        SLURM_PROCID=1 "$@"
        /bin/sleep 0.01  # what comes now is newer
        if [ "${BEGUN:-}" ]; then mkdir -p runs/run0 && : > runs/run0/manifest.json; fi
        if [ "${VERDICT:-}" ]; then echo "$VERDICT" > "$CAMBRIAN_VERDICT"; fi
        exit "$STATUS"
        ;;
esac
"""


def example(here: Path, *words: list[str], **changes: object) -> Submission:
    elements = [Element(f"run{i}", f"runs/run{i}", own) for i, own in enumerate(words)]
    command = ["python", "scripts/slurm.py", "x"]
    made = Submission("example", here, here, command, elements, {}, "python", "mesh.data=2")
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def bash(tmp_path):
    """Runs a script among those clients; returns what became of it, and the calls by client."""
    clients = tmp_path / "clients"
    clients.mkdir()
    for name in ("srun", "squeue", "scontrol", "python", "sleep"):
        (clients / name).write_text(FAKE)
        (clients / name).chmod(0o755)

    def run(script: str, **environment: str):
        (tmp_path / "calls").write_text("")
        (tmp_path / "job.sh").write_text(script)
        given = {
            **{"PATH": f"{clients}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")},
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"},
            **{"STATUS": "0", "STATE": "RUNNING", **environment},
        }
        done = subprocess.run(
            ["bash", str(tmp_path / "job.sh")],
            env=given,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = [call.split("\0")[:-1] for call in (tmp_path / "calls").read_text().split("\1")[:-1]]
        return done, {call[0]: call[1:] for call in calls}

    return run


def test_the_run_gets_every_word_as_it_was_typed_and_its_place(tmp_path, bash):
    done, calls = bash(render(example(tmp_path, WORDS), SlurmConfig(nodes=2)))
    assert (done.returncode, done.stderr) == (0, "")
    coordinator, count, index, script, *words = calls["python"]
    assert (count, index) == ("2", "1")
    assert re.fullmatch(rf"{re.escape(os.uname().nodename)}:(2\d|3[01])\d\d\d", coordinator)
    assert script == f"{tmp_path}/code/train.py"
    assert words == WORDS


def test_each_element_of_an_array_gets_its_own(tmp_path, bash):
    script = render(example(tmp_path, WORDS, ["seed=1"]), SlurmConfig(array_limit=1))
    assert "#SBATCH --array=0-1%1\n" in script and "--dependency" not in script
    for i, words in enumerate([WORDS, ["seed=1"]]):
        _, calls = bash(script, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID=str(i))
        assert calls["python"][4:] == words


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        ("75", "RUNNING", True),
        ("138", "RUNNING", True),  # USR1 before Python listened
        ("75", "COMPLETING", False),  # somebody has cancelled it
        ("75", "", False),
        ("0", "RUNNING", False),
        ("1", "RUNNING", False),
        ("2", "RUNNING", False),
        ("137", "RUNNING", False),  # before it had come to the run's directory
        ("143", "RUNNING", False),
    ],
)
def test_a_job_is_started_again_after_75_and_only_while_it_runs(tmp_path, bash, status, state, requeued):
    done, calls = bash(render(example(tmp_path, WORDS), SlurmConfig()), STATUS=status, STATE=state)
    assert done.returncode == int(status)
    assert ("scontrol" in calls) == requeued
    if requeued:
        assert calls["scontrol"][3:] == ["requeue", "7"]


@pytest.mark.parametrize("status", ["129", "134", "137", "139", "143"])
@pytest.mark.parametrize(
    ("more", "requeued"),
    [
        ({"BEGUN": "1"}, True),
        ({"BEGUN": "1", "STATE": "COMPLETING"}, False),  # somebody has cancelled it
        ({}, False),  # nothing would count its starts
    ],
)
def test_a_job_with_a_killed_task_is_started_again_where_the_run_counts_its_starts(
    tmp_path, bash, status, more, requeued
):
    done, calls = bash(render(example(tmp_path, WORDS), SlurmConfig()), STATUS=status, **more)
    assert done.returncode == int(status)
    assert ("scontrol" in calls) == requeued


def test_a_manifest_of_an_earlier_start_counts_for_nothing(tmp_path, bash):
    script = render(example(tmp_path, WORDS), SlurmConfig())
    bash(script, STATUS="137", BEGUN="1")
    _, calls = bash(script, STATUS="137")
    assert "scontrol" not in calls


@pytest.mark.parametrize("highest", ["75", "134", "137"])
@pytest.mark.parametrize("verdict", ["1", "2"])
def test_a_verdict_wins_over_what_became_of_the_others(tmp_path, bash, highest, verdict):
    script = render(example(tmp_path, WORDS), SlurmConfig())
    done, calls = bash(script, STATUS=highest, BEGUN="1", VERDICT=verdict)
    assert done.returncode == int(verdict) and "scontrol" not in calls
    _, calls = bash(script, STATUS=highest, BEGUN="1")
    assert "scontrol" in calls  # it was that start's alone


def test_an_element_is_requeued_by_its_own_number(tmp_path, bash):
    """By SLURM_JOB_ID, which the last element shares with the array, all of them would be."""
    script = render(example(tmp_path, WORDS, WORDS), SlurmConfig())
    _, calls = bash(script, STATUS="75", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert calls["scontrol"][3:] == ["requeue", "7_1"]


def test_without_requeue_nobody_starts_it_again(tmp_path, bash):
    script = render(example(tmp_path, WORDS), SlurmConfig(requeue=False))
    done, calls = bash(script, STATUS="75")
    assert done.returncode == 75 and "scontrol" not in calls
    assert "#SBATCH --no-requeue" in script


def test_the_environment_is_written_down_by_name_and_without_secrets(tmp_path, bash):
    environment = {"XLA_FLAGS": "--xla_b='a b'"}
    script = render(example(tmp_path, WORDS, environment=environment), SlurmConfig())
    secret = {"AWS_SECRET_ACCESS_KEY": "s3cr3t", "SLURM_JWT": "s3cr3t", "HF_TOKEN": "s3cr3t"}
    bash(script, NCCL_DEBUG="INFO", LOADEDMODULES="cuda/12", **secret)
    written = (tmp_path / "environment-7.txt").read_text()
    assert "s3cr3t" not in written
    for line in ("XLA_FLAGS=--xla_b='a b'", "NCCL_DEBUG=INFO", "LOADEDMODULES=cuda/12", "SLURM_JOB_ID=7"):
        assert line in written.splitlines()


def test_setup_comes_before_the_flags_and_a_comment_stays_one(tmp_path, bash):
    made = example(tmp_path, WORDS, command=["python", "two\nlines"], environment={"XLA_FLAGS": "a"})
    script = render(made, SlurmConfig(setup=["module() { echo loaded $2; }", "module load cuda"]))
    done, _ = bash(script)
    assert "loaded cuda" in done.stdout and done.returncode == 0
    assert script.index("module load") < script.index("export XLA_FLAGS")


@pytest.mark.parametrize(
    "slurm",
    [
        SlurmConfig(),
        SlurmConfig(nodes=2, gpus_per_node=8, tasks_per_node=4, cpus_per_task=6, memory="0", exclusive=True),
        SlurmConfig(container="a b.sqsh", mounts=["/d:/d"], port=1234, options=["--comment=two words"]),
    ],
)
def test_scripts_are_sound_shell(tmp_path, slurm):
    for words in ([WORDS], [WORDS, WORDS]):
        script = tmp_path / "job.sh"
        script.write_text(render(example(tmp_path, *words), slurm))
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""
        if shutil.which("shellcheck"):
            # SC2089 and the like are about words that only look expanded: they are meant literally.
            command = ["shellcheck", "--severity=warning", str(script)]
            assert subprocess.run(command, capture_output=True).stdout == b""


def test_tasks_of_a_node_share_its_gpus_and_one_task_has_all(tmp_path):
    def step(**changes):
        return render(example(tmp_path, WORDS), SlurmConfig(gpus_per_node=8, **changes)).split("srun")[-1]

    assert "--gpus-per-task" not in step()
    assert "--gpus-per-task=2" in step(tasks_per_node=4)
    assert "JAX_PLATFORMS" not in render(example(tmp_path, WORDS), SlurmConfig(gpus_per_node=8))


def test_the_page_shows_the_script_of_its_command(monkeypatch):
    """docs/slurm.md: the command is composed, checked and rendered, and is what stands there."""
    page = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    command = re.search(r"^    python scripts/slurm.py (.*\\\n.*)$", page, re.MULTILINE)
    assert command
    typed = command[1].replace("\\\n", " ").split()
    monkeypatch.chdir("/")
    slurm, words = split_words(typed)
    shown = ["python", "scripts/slurm.py", *typed]
    submission, _ = prepare(config(*words), slurm, words, [[]], shown)
    there = Path("/shared/me")
    submission = replace(submission, here=there / "runs/llama3_8b.slurm/1", directory=there, environment={})
    script = render(replace(submission, python=str(there / ".venv/bin/python")), slurm)
    block = "".join(f"    {line}".rstrip() + "\n" for line in script.splitlines())
    assert block in page, block


# -- a server ------------------------------------------------------------------------------------------------


def serving(here: Path, *words: str) -> Submission:
    return example(here, [*words], name="quick.server", mesh="", url=here / "the url")


def test_a_server_gets_its_words_and_says_where_it_is(tmp_path, bash):
    (tmp_path / "the url").write_text("of an earlier start")
    script = render(serving(tmp_path, "quick", "name=a b"), SlurmConfig(port=9000))
    assert "#SBATCH --signal=USR1@120" in script and "#SBATCH --job-name=quick.server" in script
    done, calls = bash(script)
    assert done.returncode == 0, done.stderr
    said = calls["srun"][3:]
    assert said[:3] == ["--nodes=1", "--ntasks=1", "python"]
    assert said[4:] == ["quick", "name=a b", "host=0.0.0.0", "port=9000", f"url_file={tmp_path}/the url"]
    assert said[3] == f"{tmp_path}/code/scripts/serve.py"
    assert not (tmp_path / "the url").exists()


@pytest.mark.parametrize(
    ("status", "came", "requeued"),
    [
        (75, "", True),
        (138, "", True),
        (137, "yes", True),
        (137, "", False),
        (2, "yes", False),
        (0, "yes", False),
    ],
)
def test_a_server_is_started_again_where_it_left_by_itself_or_had_served(
    tmp_path, bash, status, came, requeued
):
    # What srun starts here ends with STATUS; a server that came up has written its URL before.
    script = render(serving(tmp_path, "quick"), SlurmConfig())
    if came:
        script = script.replace("status=$?", 'status=$?; sleep 0.01; echo http > "$url"')
    done, calls = bash(script, STATUS=str(status))
    assert done.returncode == status
    assert ("scontrol" in calls) is requeued


def test_a_server_is_one_process_and_says_itself_where_it_is(tmp_path, monkeypatch):
    from scripts.slurm import server

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quick").mkdir(parents=True)
    (tmp_path / "runs/quick/config.yaml").touch()
    made = server(SlurmConfig(), ["quick", "slots=4"], ["x"])
    assert (made.name, made.url) == ("quick.server", tmp_path / "runs/quick.server/url")
    assert made.here == tmp_path / "runs/quick.server/1" and made.elements[0].words == ["quick", "slots=4"]
    for words, slurm, said in (
        (["quick"], {"nodes": 2}, "slurm.nodes=2, but a server is one process"),
        (["quick"], {"tasks_per_node": 2}, "slurm.tasks_per_node=2, but"),
        (["quick"], {"array": "seed=0,1"}, "slurm.array=seed=0,1 is of runs"),
        (["quick", "port=1"], {}, "port=1 is the job's to say"),
        (["slots=4"], {}, "serve is without a model"),
        (["quack"], {}, "run=quack is no run's name"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            server(SlurmConfig(**slurm), words, ["x"])
