"""A Slurm whose nodes are all this machine; `make test-slurm` starts it (`tests/slurm/local_slurm.py`)."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import STARTED
from tests.training.ground import ROOT, Ground, make_ground


@pytest.fixture(scope="session")
def slurm() -> Path:
    """The directory of its configuration, daemons' process ids and logs."""
    conf = os.environ.get("SLURM_CONF", "")
    if conf and shutil.which("sbatch"):
        return Path(conf).parent
    if os.environ.get("CAMBRIAN_REQUIRE_SLURM"):
        pytest.fail("no Slurm here; run these by `make test-slurm`")
    pytest.skip("no Slurm here; `make test-slurm` starts one (as root: apt-get install slurm-wlm munge)")


@pytest.fixture(scope="session", autouse=True)
def nobody_stays():
    """A test that failed leaves a process that follows its job, and one that starts a daemon leaves that."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="session")
def ground(slurm, tmp_path_factory, compile_cache) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"), compile_cache)


@pytest.fixture(scope="session")
def paced(tmp_path_factory) -> Path:
    """An interpreter that runs `train.py` at the pace that PAUSE says, and compiles as anybody's does."""
    path = tmp_path_factory.mktemp("paced") / "python"
    path.write_text(f'#!/bin/bash\nunset XLA_FLAGS\nexec {sys.executable} {ROOT}/tests/slurm/paced.py "$@"\n')
    path.chmod(0o755)
    return path
