"""Eight devices on a CPU for every test, set before JAX is imported.

The tests compile hundreds of small programs and run each a few times, so LLVM's optimizations are left out,
and where JAX still can, fusions go to LLVM at once and not through MLIR: each halves the time to compile.
Bitwise equality is tested in runs of `train.py` itself, which are compiled as anybody's.
"""

import gc
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.parts import SMOKE, part_of, read_part, unit

# An unknown flag ends the process with its name, so that a JAX without one of these is noticed.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # later ones have no other way
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(FLAGS)

# Started in the background, a shell has us ignore Ctrl-C, and what we start would too: there are tests of it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--part", metavar="K/N", type=read_part, help="the K-th of N parts, and what is smoke")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    """Slow is also what breaks jobs or needs a Slurm; files with slow tests come first; of the rest a part.

    Each file is one process's (`--dist loadfile`), so that short ones at the end let both end together.
    """
    for item in items:
        if any(item.get_closest_marker(name) for name in ("faults", "slurm")):
            item.add_marker("slow")
        if item.nodeid.startswith(SMOKE) and not item.get_closest_marker("matrix"):
            item.add_marker("smoke")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if config.option.part is not None:
        part, count = config.option.part
        left = [i for i in items if part_of(unit(i), count) != part and not i.get_closest_marker("smoke")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="module")
def endpoint():
    """An S3 on loopback, for what speaks to buckets."""
    from tests.data.extras import require

    server = require("moto.server", "s3").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def forgotten_compile_cache():
    """What runs in this process kept of executables ends with their module: others compile with no options.

    One with collectives that lacks those of `common.host.one_order` is not safe to come from there.
    """
    yield
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_compilation_cache_dir is not None:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """Where runs of `train.py` find what another test, process or step of `.ci/run` has compiled.

    It is made anew for each run of pytest, or of `.ci/run`, so that no test passes by what older code left.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    return Path(os.environ.get("CAMBRIAN_TEST_CACHE") or shared / "compiled")


@pytest.fixture(scope="session")
def ground(tmp_path_factory, compile_cache):
    """One ground for all end-to-end tests, so that data and executables are made once."""
    from tests.training.ground import make_ground

    return make_ground(tmp_path_factory.mktemp("ground"), compile_cache)


@pytest.fixture
def dropped_reads():
    """What Orbax leaves behind at a failed read is collected here, where its complaint is expected."""
    yield
    gc.collect()


def pytest_terminal_summary(terminalreporter):
    """The table of meshes, wherever some of it was run (`tests/parallel/test_matrix.py`)."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)]
    rows = sorted(
        f"{value} {'equal' if report.passed else 'DIFFERS'}"
        for report in reports
        for name, value in report.user_properties
        if name == "matrix"
    )
    if rows:
        terminalreporter.section("each mesh against one device: largest relative difference")
        terminalreporter.write_line(
            f"{'model, mesh, schedule or kind':<62} {'loss':>8} {'grads':>8} {'5 steps':>8}"
        )
        for row in rows:
            terminalreporter.write_line(row)
