"""Replicas under Ray Serve: one, three at a peak, one again, and nobody who asks notices."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.load.client import Target, complete, fetch
from serving.load.drive import read_metrics
from serving.load.plan import PlannedRequest
from tests.training.ground import ROOT

USERS = 18  # at once: three replicas' worth
DEADLINE = 420  # seconds; only a hang takes so long


def paced_service(made: str):
    """A service without a model that takes its time, and says in a file that it was made."""
    import os

    from serving.http.server import Service
    from tests.serving.fake_engine import TOKENIZER, FakeEngine

    (Path(made) / str(os.getpid())).touch()
    service = Service(FakeEngine(slots=6, pause=0.02), TOKENIZER, "tiny")
    service.ready = True
    return service


def count(serve):
    """Replicas that run now."""
    [application] = serve.status().applications.values()
    return application.deployments["replica"].replica_states.get("RUNNING", 0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def user(target, number, over, found):
    """Ask without a pause until it is over."""
    while not over.is_set():
        request = PlannedRequest(0.0, 0, (number + 1, 2, 3), 40)
        found.append(await complete(target, request, time.monotonic(), 120.0))


async def peak(target, serve):
    """Many users until there are three replicas, then one until there is one; all that became of it."""
    found, seen = [], []
    end = time.monotonic() + DEADLINE
    for users, wanted in ((USERS, 3), (1, 1)):
        over = asyncio.Event()
        tasks = [asyncio.create_task(user(target, number, over, found)) for number in range(users)]
        while (there := await asyncio.to_thread(count, serve)) != wanted:
            seen += [there] if seen[-1:] != [there] else []
            assert time.monotonic() < end, seen
            await asyncio.sleep(0.2)
        seen.append(wanted)
        over.set()
        await asyncio.gather(*tasks)
    return found, seen


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own
def test_replicas_follow_a_peak_up_and_down_and_no_request_fails(ray, tmp_path):
    from ray import serve

    from serving.ray_app import ReplicaConfig, replicas

    config = ReplicaConfig(
        most=3, target=6, limit=32, cpus=0.5, up_seconds=1, down_seconds=3, drain_seconds=60
    )
    made = str(tmp_path)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(replicas(lambda: paced_service(made), config), name="tiny")
        target = Target("127.0.0.1", port, model="tiny")
        assert json.loads(asyncio.run(fetch(target, "/ready")))["status"] == "ready"
        assert count(serve) == 1
        found, seen = asyncio.run(peak(target, serve))
    finally:
        serve.shutdown()
    assert [attempt.error for attempt in found if not attempt.done] == []
    assert len(found) > USERS and all(attempt.tokens == 40 for attempt in found)
    assert seen[0] == 1 and max(seen) == 3 and seen[-1] == 1, seen
    assert len(list(tmp_path.iterdir())) == 3  # each an engine and a process of its own


TINY = (
    *("data.seq_len=256", "model.num_layers=1", "model.d_model=32", "model.d_ff=32", "model.num_heads=4"),
    *("model.num_kv_heads=4", "training.global_batch_size=2", "training.num_steps=2", "mesh.data=1"),
    *("eval.every=100000", "eval.batches=1", "schedule=constant", "schedule.warmup_steps=1"),
)


@pytest.mark.ray
def test_the_command_serves_a_run_and_ends_when_all_is_answered(ground):
    """A clone that is not installed, a model, and a SIGTERM while an answer is being written."""
    environment = {**os.environ, "XLA_FLAGS": "", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
    shared: dict = {"cwd": ground.path, "env": environment, "text": True, "stderr": subprocess.STDOUT}
    train = [sys.executable, str(ROOT / "train.py"), *ground.words("tiny", *TINY)]
    done = subprocess.run(train, stdout=subprocess.PIPE, check=False, **shared)
    assert done.returncode == 0, done.stdout
    target, log = Target("127.0.0.1", free_port(), model="tiny"), ground.path / "ray.txt"
    words = ["tiny", "ray=true", f"port={target.port}", "slots=2", "page=32", "chunk=32", "max_len=256"]
    with log.open("w") as file:
        command = [sys.executable, str(ROOT / "scripts/serve.py"), *words]
        process = subprocess.Popen(command, stdout=file, **shared)
    try:
        end = time.monotonic() + DEADLINE
        while "serves tiny" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)

        async def leave():
            """Ask for a long text and have the server leave once it has begun."""
            long = PlannedRequest(0.0, 0, (20, 30, 40), 200)
            task = asyncio.create_task(complete(target, long, time.monotonic(), 60.0))
            while '"running": 1' not in json.dumps(read_metrics(await fetch(target, "/metrics"))):
                assert not task.done(), "it was over before it could be disturbed"
            process.terminate()
            return await task

        attempt = asyncio.run(leave())
        assert attempt.done and attempt.tokens == 200, attempt
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"least": 0}, "least=0 must be 1 or more"),
        ({"least": 3, "most": 2}, "most=2 must be least=3 or more"),
        ({"target": 9, "limit": 8}, "limit=8 must be target=9 or more"),
        ({"gpus": -1}, "gpus=-1 must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    from serving.ray_app import ReplicaConfig

    with pytest.raises(ValueError, match=said):
        ReplicaConfig(**changes)
