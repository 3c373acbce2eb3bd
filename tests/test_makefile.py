"""The two commands, with an interpreter that only writes down what it was asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `-c` is how make asks for the version; `-m venv [--clear] DIR` puts this script into a new environment.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    -c*) echo "$FAKE_VERSION"; exit ;;
    "-m venv") for folder; do :; done
        [ "$3" = --clear ] && rm -rf "$folder"
        mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python" ;;
esac
echo "$*" >> "$FAKE_LOG"
"""


class Checkout:
    """A directory with the Makefile and the locks, and a log of what its interpreters did."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-test.lock"):
            shutil.copy(ROOT / name, root / name)
            self.touch(name, 1_000_000_000)
        (root / "benchmarks").mkdir()
        shutil.copy(ROOT / "benchmarks/requirements-torch.txt", root / "benchmarks")
        (root / "python").write_text(FAKE_PYTHON)
        (root / "python").chmod(0o755)

    def touch(self, name: str, time: int) -> None:
        os.utime(self.root / name, (time, time))

    def make(self, *arguments: str, version: str = "3.11") -> subprocess.CompletedProcess:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        for name in ("PY", "VENV", "TESTS", "JOBS", "ARGS"):  # of the make that runs this suite
            kept.pop(name, None)
        kept |= {"FAKE_LOG": str(self.root / "log"), "FAKE_VERSION": version}
        return subprocess.run(
            ["make", *arguments],
            cwd=self.root,
            env=kept,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def done(self) -> list[str]:
        """What was run since the last look."""
        log = self.root / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def installs(lines: list[str]) -> list[str]:
    return [line.split()[-1] for line in lines if " install " in line]


def test_quickstart_installs_the_lock_then_the_project_then_runs(checkout):
    result = checkout.make("quickstart", "PY=./python", "ARGS=training.num_steps=3")
    assert result.returncode == 0, result.stderr
    lines = checkout.done()
    assert lines[0] == "-m venv .venv"
    assert installs(lines) == ["requirements.lock", "."]
    assert "--require-hashes" in lines[1] and "--no-deps" in lines[2]
    assert lines[-1] == "train.py +experiment=quickstart training.num_steps=3"


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_second_call_installs_nothing(checkout, target):
    checkout.make(target, "PY=./python")
    assert installs(checkout.done())
    assert checkout.make(target, "PY=./python").returncode == 0
    assert len(checkout.done()) == 1  # the run itself


def test_test_tools_come_on_top_of_the_quickstart(checkout):
    checkout.make("quickstart", "PY=./python")
    checkout.done()
    checkout.make("test", "PY=./python")
    assert installs(checkout.done()) == ["requirements-test.lock"]


def test_pytorch_has_an_environment_of_its_own(checkout):
    for _ in range(2):  # the second call has nothing to do
        assert checkout.make("torch-env", "PY=./python").returncode == 0
    lines = checkout.done()
    assert lines[0] == "-m venv --clear .venv-torch"
    assert installs(lines) == ["benchmarks/requirements-torch.txt"] and len(lines) == 2
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    ("lock", "tag"), [("requirements-serve.lock", "cpu"), ("requirements-cuda.lock", "cuda")]
)
def test_an_image_is_named_for_its_lock_and_told_its_commit(checkout, lock, tag):
    said = checkout.make("--dry-run", "image", f"LOCK={lock}").stdout
    assert f"docker build --build-arg LOCK={lock} --tag cambrian:{tag} " in said
    assert '--build-arg COMMIT="$(git describe --always --dirty' in said


def test_changed_lock_is_installed(checkout):
    checkout.make("quickstart", "PY=./python")
    checkout.done()
    checkout.touch("requirements.lock", 4_000_000_000)
    checkout.make("quickstart", "PY=./python")
    assert "requirements.lock" in installs(checkout.done())


def test_environment_is_kept_until_another_python_is_asked_for(checkout):
    checkout.make("test", "PY=./python", version="3.12")
    checkout.done()
    checkout.make("test", version="3.12")  # no PY: the environment's own
    assert len(checkout.done()) == 1
    checkout.make("test", "PY=./python", version="3.13")
    lines = checkout.done()
    assert lines[0] == "-m venv --clear .venv"
    assert installs(lines) == ["requirements.lock", ".", "requirements-test.lock"]


@pytest.mark.parametrize(
    ("python", "says"), [("no-such-python", "does not start"), ("./python", "is Python 3.10")]
)
def test_unusable_python_is_one_line(checkout, python, says):
    result = checkout.make("quickstart", f"PY={python}", version="old-3.10")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"PY={python} {says}" in result.stderr and "PY=python3.12" in result.stderr
    assert not (checkout.root / ".venv").exists()
