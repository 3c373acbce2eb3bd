"""A Ray on this machine; `make test-ray` has one in an environment of its own."""

import os
import shutil
import tempfile
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session")
def ray():
    if find_spec("ray") is None:
        missing = "Ray is not installed; `make test-ray` installs it into .venv-ray"
        pytest.fail(missing) if os.environ.get("CAMBRIAN_REQUIRE_RAY") else pytest.skip(missing)
    # It reports to nobody, and keeps no token in a home directory: nobody else is on this loopback.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    import ray

    room = tempfile.mkdtemp(prefix="ray-")  # a short path: there are sockets in it
    ray.init(
        _temp_dir=room,
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        # Replicas find our code where the tests do.
        runtime_env={"env_vars": {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}},
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(room, ignore_errors=True)
