"""Who may import whom. A back edge here is how a house becomes a ball of mud."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "artifacts",
    "benchmarks",
    "common",
    "compress",
    "configs",
    "data",
    "evaluation",
    "interop",
    "kernels",
    "launch",
    "models",
    "optim",
    "parallel",
    "planner",
    "scripts",
    "serving",
    "training",
)
# Room → what it may import of ours besides itself; a prefix covers the modules below it. From the ground up.
CORE = ("common", "kernels", "models", "parallel", "optim", "data")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "common": (),
    "kernels": ("common",),
    "optim": ("common",),
    "data": ("common",),
    "models": ("common", "kernels"),
    "parallel": ("common", "kernels"),
    "artifacts": ("common", "parallel.processes", "data"),
    "interop": ("common", "models", "data.tokens"),
    "serving": ("common", "kernels", "models", "parallel", "data.tokens", "artifacts"),
    "evaluation": ("common", "data.tokens", "serving"),
    "training": (*CORE, "artifacts", "interop", "serving", "evaluation"),
    "compress": (*CORE, "artifacts", "interop", "serving", "evaluation", "training"),
    "planner": (*CORE, "artifacts", "training", "serving"),
    "launch": (*CORE, "artifacts", "training", "planner"),
    "configs": (*CORE, "artifacts", "training", "planner", "launch"),
    "scripts": (*ROOMS, "train"),
    "benchmarks": (*ROOMS, "train"),
    "train": ROOMS,
}
# What a command line composes: these load nothing heavy.
CONFIGS = ("data.config", "models.config", "optim.config", "parallel.config", "training.config")
OURS = frozenset(MAY_IMPORT)
# `data` runs in worker processes that must start quickly and never touch a device.
DEVICE_LIBRARIES = ("chex", "flax", "jax", "jaxlib", "optax", "orbax")
HEAVY = (
    *DEVICE_LIBRARIES,
    "array_record",
    "matplotlib",
    "numpy",
    "pyarrow",
    "tensorboard",
    "tensorflow_datasets",
)


def sources() -> list[Path]:
    """Every source file of ours: train.py and the rooms, without the tests."""
    return [ROOT / "train.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]


def module_name(path: Path) -> str:
    """`data/loading/loader.py` → `data.loading.loader`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, dotted name) of all that `source` imports, wherever it stands: in functions and for types too.

    `from a import b` counts as `a.b`, since b may be a module; relative imports resolve against `module`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}" if base else alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def back_edges(source: str, module: str) -> list[str]:
    """What `module` imports of ours and may not, one line each."""
    room = module.split(".")[0]
    allowed = (room, *MAY_IMPORT[room])
    return [
        f"{module}:{line} imports {name}; {room} may import {', '.join(MAY_IMPORT[room]) or 'no other room'}"
        for line, name in imports(source, module)
        if name.split(".")[0] in OURS and not below(name, allowed)
    ]


def test_layers_import_only_downward():
    edges = [edge for path in sources() for edge in back_edges(path.read_text("utf-8"), module_name(path))]
    assert not edges, "\n".join(edges)


def import_graph() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports, wherever in the file, for types too."""
    modules = {module_name(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for _, name in imports(path.read_text("utf-8"), module):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def floors_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """How many modules stand on each other below each one, itself counted. ValueError names a circle."""
    floors: dict[str, int] = {}

    def floor(module: str, above: tuple[str, ...]) -> int:
        if module in above:
            raise ValueError(" -> ".join([*above[above.index(module) :], module]))
        if module not in floors:
            floors[module] = 1 + max((floor(below, (*above, module)) for below in graph[module]), default=0)
        return floors[module]

    for module in graph:
        floor(module, ())
    return floors


def test_no_circle_of_files_and_few_floors():
    """What a reader must climb to see where a thing comes from."""
    floors = floors_of(import_graph())
    tallest = max(floors, key=lambda module: floors[module])
    assert floors[tallest] <= 12, f"{tallest} stands on floor {floors[tallest]}"


def test_a_circle_is_seen():
    with pytest.raises(ValueError, match="b -> c -> b"):
        floors_of({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert floors_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


# Commands are doors, each by itself, and nobody walks from one to the next.
MOST = {"scripts": 26}


def test_no_folder_is_a_corridor():
    flat = Counter(path.parent for path in sources() if path.name != "__init__.py")
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder, count in flat.items()
        if count > MOST.get(folder.name, 20)
    }
    assert not crowded, f"too many files lie flat: {crowded}"


def class_names(source: str) -> list[str]:
    """The classes of a file that others can see."""
    found = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return [name for name in found if not name.startswith("_")]


def test_a_class_name_has_one_meaning():
    where: dict[str, list[str]] = {}
    for path in sources():
        for name in class_names(path.read_text("utf-8")):
            where.setdefault(name, []).append(module_name(path))
    twice = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert not twice, twice


def untyped_configs(source: str) -> list[str]:
    """Functions and fields that take `config: Any`."""
    tree = ast.parse(source)
    arguments = [node for node in ast.walk(tree) if isinstance(node, ast.arg) and node.arg == "config"]
    fields = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    named = [(f"line {node.lineno}", node.annotation) for node in arguments]
    named += [(f"line {f.lineno}", f.annotation) for f in fields if ast.unparse(f.target) == "config"]
    return [line for line, annotation in named if annotation is not None and ast.unparse(annotation) == "Any"]


def test_a_config_has_a_type():
    assert untyped_configs("class A:\n    config: Any\ndef f(config: Any, x: int): ...") == [
        "line 3",
        "line 2",
    ]
    found = {module_name(path): untyped_configs(path.read_text("utf-8")) for path in sources()}
    assert not {module: lines for module, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.loading.loader", "from training.step import train_step"),
        ("data.loading.loader", "def f():\n    import models.transformer"),
        ("optim.optimizers", "from parallel import mesh"),
        ("kernels.attention", "from parallel.mesh import make_mesh"),
        ("kernels.attention", "from parallel import mesh"),
        ("training.loop", "from ..planner import search"),
        ("training.loop", "import configs.schema"),
        ("serving.generator", "from data.loading.loader import Loader"),
        ("evaluation.harness", "from training.opening.opened import trained_model"),
        ("configs.schema", "from serving import text"),
        ("parallel.schedules.accumulate", "import importlib\nimportlib.import_module('models.ops')"),
    ],
)
def test_a_back_edge_is_seen(module, source):
    assert back_edges(source, module)


def test_forward_edges_pass():
    assert not back_edges("from kernels.names import NAMES\nimport models.ops", "models.layers")
    assert not back_edges("from data.tokens.tokenizer import load_tokenizer", "serving.generator")
    assert not back_edges("from training.config import RunConfig\nimport dataclasses", "configs.schema")


def test_data_names_no_device_library():
    found = [
        f"{module_name(path)}:{line} imports {name}"
        for path in sorted((ROOT / "data").rglob("*.py"))
        for line, name in imports(path.read_text("utf-8"), module_name(path))
        if below(name, DEVICE_LIBRARIES)
    ]
    assert not found, "\n".join(found)


def loaded(modules: list[str], watched: tuple[str, ...]) -> str:
    """Which of `watched` a new interpreter holds once it has imported `modules`, comma-separated."""
    code = f"import sys, {', '.join(modules)}\nprint(','.join(m for m in {watched!r} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_data_loads_no_device_library_through_others():
    modules = [module_name(path) for path in sorted((ROOT / "data").rglob("*.py")) if path.stem != "__init__"]
    assert loaded(modules, DEVICE_LIBRARIES) == ""


def test_configs_load_nothing_heavy():
    """`python train.py --help` answers at once because of this."""
    modules = [name for name in CONFIGS if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
    assert loaded([*modules, "configs.schema"], HEAVY) == ""


def test_packages_import_nothing_by_themselves():
    """An `__init__.py` with imports makes every import of the room pay for all of it."""
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources()
        if path.name == "__init__.py"
        for line, name in imports(path.read_text("utf-8"), module_name(path))
    ]
    assert not found, "\n".join(found)
