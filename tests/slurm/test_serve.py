"""A server as a job: at its time limit it answers what it has and starts again; no patient client fails."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from serving.load.client import Target, complete
from serving.load.plan import PlannedRequest
from tests.slurm.jobs import DEADLINE, SMALL, STARTED, Submitted, client
from tests.training.ground import ROOT

pytestmark = pytest.mark.slurm
USERS, TOKENS = 3, 8


@pytest.fixture(scope="module")
def server(ground):
    """A server of a small run, which scripts/slurm.py has submitted and follows."""
    words = ground.words("asked", *SMALL, "mesh.data=1", "data.seq_len=64", "training.num_steps=2")
    environment = {**os.environ, "XLA_FLAGS": ""}
    shared: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    trained = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, **shared)
    assert trained.returncode == 0, trained.stdout
    command = [
        *(sys.executable, str(ROOT / "scripts/slurm.py"), "serve", "asked", "slots=2", "max_len=64"),
        *("page=16", "chunk=16", "slurm.time=30", "slurm.signal_seconds=5"),
    ]
    process = subprocess.Popen(command, cwd=ground.path, **shared)
    STARTED.append(process)
    return Submitted(ground, "asked", process, kind="server")


class Patient:
    """Users who ask until they are answered, wherever the URL leads: what became of each attempt."""

    def __init__(self, url):
        self.url, self.attempts, self.answered, self.over = url, [], [], False

    async def user(self, number):
        while not self.over:
            await self.ask(PlannedRequest(0.0, number, (20 + number, 30, 40), TOKENS))

    async def ask(self, request):
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            if self.url.exists():
                target = replace(Target.of(self.url.read_text().strip()), model="asked")
                attempt = await complete(target, request, time.monotonic(), 60.0)
                self.attempts.append(attempt)
                if attempt.done:
                    self.answered.append(attempt)
                    return
            await asyncio.sleep(0.1)
        raise AssertionError(f"nobody has answered: {self.attempts[-1]}")

    async def run(self, disturb):
        users = [asyncio.create_task(self.user(number)) for number in range(USERS)]
        try:
            await asyncio.to_thread(disturb)
        finally:
            self.over = True
            await asyncio.gather(*users)


def test_at_its_limit_a_server_drains_and_starts_again_and_no_request_fails(server):
    url = server.directory.parent / "url"
    patient = Patient(url)

    def disturb():
        """The limit is lowered in mid-run; the notice comes up to 30 s before the 5 that are asked for."""
        server.until(lambda: len(patient.answered) >= 10)
        minutes = -(-(server.seconds() + 45) // 60)
        client("scontrol", "update", f"JobId={server.job}", f"TimeLimit={minutes}")
        server.again("TimeLimit=30")
        assert not url.exists()
        before = len(patient.answered)
        server.until(lambda: len(patient.answered) >= before + 10)

    asyncio.run(patient.run(disturb))
    assert ", start 2" in server.log
    # Refused while it drained, or nobody there: asked again. An answer that had begun was ended.
    broken = [a for a in patient.attempts if a.status not in (0, 503) and not a.done]
    assert broken == [] and not any(a.first and not a.done for a in patient.attempts)
    assert {attempt.tokens for attempt in patient.answered} == {TOKENS}
    client("scancel", server.job)
    server.end()
    assert server.state() == "CANCELLED" and not url.exists()
