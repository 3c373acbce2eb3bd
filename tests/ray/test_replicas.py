"""Replicas under Ray Serve: one, three at a peak, one again, and nobody who asks notices."""

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from serving.load.client import Target, complete, fetch
from serving.load.plan import PlannedRequest

USERS = 18  # at once: three replicas' worth
DEADLINE = 240  # seconds; only a hang takes so long


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
