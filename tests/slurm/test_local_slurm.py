"""A Slurm for one command leaves nobody behind, however the command ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import DEADLINE
from tests.training.ground import ROOT

pytestmark = pytest.mark.slurm
# A job of the Slurm's and a process that has left its session, each of which writes down who it is.
COMMAND = """
sbatch --output=/dev/null --wrap='echo $$ > job; exec sleep 1000'
setsid --fork bash -c 'echo $$ > orphan; exec sleep 1000'
until [ -s job ] && [ -s orphan ]; do sleep 0.1; done
dirname "$SLURM_CONF" > root
sleep "$1"
exit 7
"""


def start(tmp_path: Path, seconds: str) -> subprocess.Popen:
    local = [sys.executable, str(ROOT / "tests/slurm/local_slurm.py"), "--nodes", "1", "--"]
    return subprocess.Popen([*local, "bash", "-c", COMMAND, "bash", seconds], cwd=tmp_path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ended", ["by itself", "by a signal"])
def test_nobody_is_left(slurm, tmp_path, ended):
    process = start(tmp_path, "0" if ended == "by itself" else "1000")
    end = time.monotonic() + DEADLINE
    while not (tmp_path / "root").exists() or not (tmp_path / "root").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    root = Path((tmp_path / "root").read_text().strip())
    pids = [int((tmp_path / name).read_text()) for name in ("job", "orphan")]
    if ended == "by a signal":
        daemons = [int((root / name).read_text()) for name in ("slurmctld.pid", "n1.pid", "munge.pid")]
        assert all(map(alive, pids + daemons))
        pids += daemons
        os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=DEADLINE) == (7 if ended == "by itself" else 128 + signal.SIGTERM)
    assert not any(map(alive, pids))
    assert not root.exists()
