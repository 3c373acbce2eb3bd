"""How processes find each other; what they do together stands in tests/training/test_processes.py."""

import os
import socket
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from parallel import processes
from parallel.processes import ClusterFault, PeerFault, Place
from tests.training.ground import ROOT

OURS = {
    "CAMBRIAN_COORDINATOR": "127.0.0.1:4000",
    "CAMBRIAN_PROCESSES": "4",
    "CAMBRIAN_PROCESS": "3",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_our_variables_say_where_a_process_stands():
    assert processes.place_in(OURS) == Place("127.0.0.1:4000", 4, 3)
    assert processes.place_in({}) is None
    assert processes.place_in({**OURS, "CAMBRIAN_COORDINATOR": "[::1]:4000"}).coordinator == "[::1]:4000"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"CAMBRIAN_PROCESS": "4"}, "CAMBRIAN_PROCESS=4 must be from 0 to 3"),
        ({"CAMBRIAN_PROCESS": "-1"}, "CAMBRIAN_PROCESS=-1 must be from 0 to 3"),
        ({"CAMBRIAN_PROCESS": "one"}, "CAMBRIAN_PROCESS=one is not a whole number"),
        ({"CAMBRIAN_PROCESSES": "0"}, "CAMBRIAN_PROCESSES=0 must be 1 or more"),
        ({"CAMBRIAN_PROCESSES": ""}, "CAMBRIAN_PROCESSES is not set, but others"),
        ({"CAMBRIAN_COORDINATOR": "host"}, "CAMBRIAN_COORDINATOR=host is no address"),
        ({"CAMBRIAN_COORDINATOR": "host:70000"}, "CAMBRIAN_COORDINATOR=host:70000 is no address"),
    ],
)
def test_nonsense_in_them_is_one_line(changed, said):
    with pytest.raises(ValueError, match=said) as caught:
        processes.initialize({**OURS, **changed})
    assert "\n" not in str(caught.value)


def test_a_launcher_counts_only_where_it_started_several_tasks():
    assert processes.launcher(SRUN) == "slurm"
    assert processes.launcher({**SRUN, "SLURM_NTASKS": "1"}) is None
    # What a batch script sees that never called srun: JAX by itself would wait for a second task.
    assert processes.launcher({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}) is None
    mpi = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert processes.launcher(mpi) == "ompi"
    assert processes.launcher({**mpi, "OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert processes.launcher({"TPU_WORKER_HOSTNAMES": "a,b"}) == "gketpu"
    assert processes.launcher({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert processes.launcher({}) is None


def free_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def muster(count, present, limit):
    """What each of these processes met in `_muster`, as threads: None or the error."""
    address, met = f"127.0.0.1:{free_port()}", {}

    def come(index):
        try:
            processes._muster(Place(address, count, index), limit)
            met[index] = None
        except ClusterFault as error:
            met[index] = str(error)

    threads = [threading.Thread(target=come, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return met


def test_processes_find_each_other_in_any_order():
    assert muster(4, [3, 1, 2, 0], 20) == {0: None, 1: None, 2: None, 3: None}


def test_who_is_missing_is_said_with_the_address_and_the_limit():
    met = muster(3, [0, 1], 1)
    assert "did not join 127.0.0.1:" in met[0] and "within 1 s: 2;" in met[0]
    assert "the coordinator 127.0.0.1:" in met[1] and "within 1 s" in met[1]
    assert "CAMBRIAN_JOIN_SECONDS" in met[0] and "CAMBRIAN_JOIN_SECONDS" in met[1]


def test_a_port_that_is_taken_is_one_line():
    with closing(socket.create_server(("", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterFault, match=f"{address}: Address already in use; choose another port"):
            processes._muster(Place(address, 2, 0), 1)


# Both join, past a proxy that refuses, and meet once; then one waits at a place where the other never comes.
WAITS = """
import os, sys
from parallel import processes
before = dict(os.environ)
processes.initialize()
assert os.environ == before and "http_proxy" in before
assert processes.exchange("the plan", processes.process_index()) == [0, 1]
if processes.is_primary():
    sys.stdin.read()
try:
    processes.exchange("the plan", None, seconds=1)
except processes.ClusterFault as error:
    print(error)
    processes.leave(1)
"""


def test_a_job_is_joined_past_any_proxy_and_a_peer_that_never_comes_is_an_error_that_says_where():
    """Many clusters set http_proxy on all nodes; gRPC asked it for the coordinator, and JAX aborted."""
    place = {"CAMBRIAN_COORDINATOR": f"localhost:{free_port()}", "CAMBRIAN_PROCESSES": "2"}
    nobody = f"http://127.0.0.1:{free_port()}"
    proxies = dict.fromkeys(("grpc_proxy", "https_proxy", "http_proxy", "HTTP_PROXY"), nobody)
    place |= proxies | {"no_grpc_proxy": "", "no_proxy": "elsewhere", "CAMBRIAN_JOIN_SECONDS": "30"}
    absent, waiting = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **place, "CAMBRIAN_PROCESS": str(index)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    )
    try:
        out, err = waiting.communicate(timeout=120)
    finally:
        waiting.kill()
        absent.kill()
        absent.communicate()
    assert waiting.returncode == 1 and not err, err
    assert out.startswith("process 1 waited 1 s at most for the others at 'the plan': ")
    assert out.count("\n") == 1


def test_a_process_alone_agrees_with_itself():
    processes.initialize({})
    processes.initialize({**OURS, "CAMBRIAN_PROCESSES": "1", "CAMBRIAN_PROCESS": "0"})
    assert (processes.process_count(), processes.process_index(), processes.is_primary()) == (1, 0, True)
    assert processes.exchange("values", 5) == [5]
    assert processes.from_primary("value", lambda: object) is object
    assert processes.prints_error("a line")
    processes.same("value", 1, "never")
    with pytest.raises(KeyError), processes.all_or_none("block"):
        raise KeyError("passes as it is")


@pytest.mark.parametrize(
    ("raised", "elsewhere"),
    [
        (ValueError("bad"), ValueError),
        (OSError("bad"), ValueError),
        (RuntimeError("bad"), PeerFault),
        (ClusterFault("bad"), ClusterFault),
    ],
)
def test_what_one_raises_all_raise_with_the_same_line(monkeypatch, raised, elsewhere):
    said = [None, processes._said(raised), processes._said(ValueError("later"))]
    monkeypatch.setattr(processes, "process_index", lambda: 1)
    with pytest.raises(type(raised)) as own:
        processes._compare(said, raised)
    assert own.value is raised
    monkeypatch.setattr(processes, "process_index", lambda: 0)
    with pytest.raises(elsewhere, match="^bad$") as other:
        processes._compare(said, None)
    assert type(other.value) is elsewhere
    processes._compare([None, None], None)
