"""What a stranger installs: few direct dependencies, each file by its hash, the same versions everywhere."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layering import ROOMS, ROOT, imports, module_name, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCKS = (
    *("requirements.lock", "requirements-test.lock", "requirements-serve.lock", "requirements-cuda.lock"),
)
# What we are compared with runs in an environment of its own, and no other files may know it.
PEERS = [
    ROOT / "benchmarks" / name
    for name in ("torch_baseline.py", "torch_generation.py", "serving/torch_serving.py")
]
PEER_PINS = ROOT / "benchmarks/requirements-torch.txt"
PYTHONS = ("3.11.9", "3.12.1", "3.13.0")

# Spelt in pieces, so that this file does not find itself.
MACHINE_PATH = re.compile("/(?:" + "|".join(("home", "root", "Users", "work", "farm")) + r")/[\w.]")
REGISTRY = re.compile(
    "|".join(rf"\b{name}\.{top}\b" for name, top in (("pypi", "org"), ("pythonhosted", "org")))
)
PIN = re.compile(r"(?P<requirement>[\w.-]+==[\w.!+]+( ; [^\\]+)?) \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def tracked() -> list[Path]:
    """Files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def pins(lock: str) -> list[Requirement]:
    """The pinned requirements of a lock file, with their markers."""
    matches = map(PIN.fullmatch, (ROOT / lock).read_text("utf-8").splitlines())
    return [Requirement(match["requirement"]) for match in matches if match]


def installed(lock: str, python: str) -> dict[str, list[str]]:
    """Package → versions that `python` on 64-bit Linux would install from a lock."""
    machine = {
        "python_full_version": python,
        "python_version": python.rsplit(".", 1)[0],
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    chosen: dict[str, list[str]] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(machine):
            chosen.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    return chosen


def test_core_dependencies_are_few_and_bounded_below():
    dependencies = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    assert len(dependencies) <= 20
    for dependency in dependencies:
        assert any(bound.operator == ">=" for bound in dependency.specifier), (
            f"{dependency} has no lower bound"
        )


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_pins_and_hashes_only(lock):
    """No index, URL, path or option: any mirror serves, and the hashes say whether it served the same."""
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    strange = [line for line in lines if not (PIN.fullmatch(line) or HASH.fullmatch(line))]
    assert not strange, strange[:5]
    unhashed = [
        a for a, b in zip(lines, [*lines[1:], ""], strict=True) if PIN.fullmatch(a) and not HASH.fullmatch(b)
    ]
    assert not unhashed, unhashed


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_lock_gives_each_python_what_is_declared(lock, python):
    chosen = installed(lock, python)
    assert all(len(versions) == 1 for versions in chosen.values())
    for line in PROJECT["project"]["dependencies"]:
        dependency = Requirement(line)
        version = chosen[canonicalize_name(dependency.name)][0]
        assert dependency.specifier.contains(version), (
            f"{lock} has {dependency.name} {version}, not {dependency}"
        )


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS[1:])
def test_other_locks_add_and_never_change(lock, python):
    """Tests and GPUs run the versions that the quickstart runs."""
    assert installed("requirements.lock", python).items() <= installed(lock, python).items()


def test_jax_follows_the_interpreter():
    assert installed("requirements.lock", "3.11.9")["jax"][0].startswith("0.10.")
    assert installed("requirements.lock", "3.12.1")["jax"][0].startswith(("0.11.", "0.12."))


def test_every_package_is_listed():
    tree = {path.parent.relative_to(ROOT) for path in tracked() if path.suffix == ".py"}
    packages = {".".join(parent.parts) for parent in tree if parent.parts and parent.parts[0] != "tests"}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
    modules = {path.stem for path in tracked() if path.suffix == ".py" and path.parent == ROOT}
    assert modules == set(PROJECT["tool"]["setuptools"]["py-modules"])


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_package_is_documented_and_typed(package):
    folder = ROOT / package.replace(".", "/")
    assert (ROOT / package.split(".")[0] / "py.typed").is_file()  # holds for what lies below (PEP 561)
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))


def test_tools_know_every_room():
    tool = PROJECT["tool"]
    assert set(tool["ruff"]["lint"]["isort"]["known-first-party"]) == {*ROOMS, "tests", "train"}
    assert set(tool["mypy"]["files"]) == {*ROOMS, "train.py", "tests"}


def test_versions_agree():
    version = PROJECT["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## ([\w.]+)", changes, re.MULTILINE)
    assert newest and newest[1] == version
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert citation and citation[1] == version


def test_licence_is_named_and_present():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")[:200]


def test_tracked_files_name_no_machine_and_no_registry():
    found = []
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for pattern in (MACHINE_PATH, REGISTRY):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, found[:10]


def test_every_import_is_declared():
    """A package that only comes along with another one may go away with it."""
    extras = [line for name, lines in PROJECT["project"]["optional-dependencies"].items() for line in lines]
    declared = {
        canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"] + extras
    }
    pinned = [line for line in PEER_PINS.read_text("utf-8").splitlines() if not line.startswith("#")]
    peer = declared | {canonicalize_name(Requirement(line).name) for line in pinned}
    # Of extras that are not installed nobody can say what they provide.
    providers = {"sklearn": ["scikit-learn"], "apache_beam": ["apache-beam"], **packages_distributions()}
    found = []
    for path in sources():
        allowed = peer if path in PEERS else declared
        for line, name in imports(path.read_text("utf-8"), module_name(path)):
            top = name.split(".")[0]
            beside = path.parent == ROOT / "scripts" and top == "command"  # run from its own directory
            if top in sys.stdlib_module_names or top in (*ROOMS, "train") or beside:
                continue
            if not allowed & {canonicalize_name(dist) for dist in providers.get(top, [top])}:
                found.append(
                    f"{module_name(path)}:{line} imports {top}, which pyproject.toml does not declare"
                )
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["/" + "home/me/x", "/" + "root/.cache", "py" + "pi.org/simple"])
def test_a_machine_path_or_registry_is_seen(text):
    assert MACHINE_PATH.search(text) or REGISTRY.search(text)
