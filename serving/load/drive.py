"""A load test from its first probe to the last answer: who is asked when, in one thread, by one clock."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from serving.load.client import SentRequest, Target, complete, fetch
from serving.load.config import LoadConfig
from serving.load.plan import LoadPlan, PlannedRequest, lengths, plan, probes

SAMPLE_SECONDS = 0.5
WATCHED = {  # /metrics, by vLLM's names → ours
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "pages",
}


@dataclass
class Recording:
    """All that was measured; times are seconds since the load began."""

    target: Target
    plan: LoadPlan
    saturation: float
    idle: list[SentRequest] = field(default_factory=list)
    load: list[SentRequest] = field(default_factory=list)
    probes: list[SentRequest] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)


async def drive(target: Target, config: LoadConfig) -> Recording:
    """Run a whole load test. Raises ValueError, OSError where the server cannot be tested so."""
    target = await find_model(target, config)
    idle = await one_by_one(target, config)
    saturation = config.saturation or await find_saturation(target, config)
    recording = Recording(target, plan(config, saturation), saturation, idle)
    beside = probes(config, recording.plan.seconds) if config.probe.per_second else []
    begin = time.monotonic()
    watch = asyncio.create_task(sample(target, recording, begin))
    try:
        recording.load, recording.probes = await asyncio.gather(
            at_their_times(target, recording.plan.requests, begin, config.request_seconds),
            at_their_times(target, beside, begin, config.request_seconds),
        )
        await asyncio.sleep(2 * SAMPLE_SECONDS)  # the queue is seen empty again
    finally:
        watch.cancel()
    for attempt in (*recording.load, *recording.probes):
        _since(attempt, begin)
    return recording


def _since(attempt: SentRequest, begin: float) -> None:
    attempt.due, attempt.sent, attempt.end = (t - begin for t in (attempt.due, attempt.sent, attempt.end))
    attempt.first = attempt.first - begin if attempt.first is not None else None


async def find_model(target: Target, config: LoadConfig) -> Target:
    """The target with its first model's name. ValueError where the texts are longer than it takes."""
    models = json.loads(await fetch(target, "/v1/models"))["data"]
    if not models:
        raise ValueError("the server has no model; see /v1/models")
    room = models[0].get("max_model_len")
    longest = config.prompt.most + config.answer.most
    if room is not None and longest > room:
        raise ValueError(
            f"prompt.most={config.prompt.most} and answer.most={config.answer.most} are {longest} tokens, "
            f"but the server takes {room}; lower one of them"
        )
    return replace(target, model=models[0]["id"])


async def one_by_one(target: Target, config: LoadConfig) -> list[SentRequest]:
    """Probes of an idle server; the first, which may find it cold, is not among them. Raises OSError."""
    beats = replace(config, probe=replace(config.probe, per_second=1.0))
    found = []
    for request in probes(beats, config.probe.idle + 1):
        found.append(await complete(target, request, time.monotonic(), config.request_seconds))
        if not found[-1].done:
            raise OSError(f"an idle server must answer, and did with {found[-1].status}: {found[-1].error}")
    return found[1:]


async def find_saturation(target: Target, config: LoadConfig) -> float:
    """Requests/s that the server answers while so many users ask without a pause. Raises OSError.

    Between the first tenth of the answers and the ninth: at the ends there are fewer users.
    """
    random = np.random.default_rng((config.seed, 1 << 22))
    count = config.users_requests
    sizes = zip(lengths(config.prompt, count, random), lengths(config.answer, count, random), strict=True)
    low, high = config.vocabulary
    waiting = [
        PlannedRequest(0.0, 0, tuple(random.integers(low, high, prompt).tolist()), int(answer))
        for prompt, answer in sizes
    ]
    ends: list[float] = []

    async def user() -> None:
        while waiting:
            attempt = await complete(target, waiting.pop(), time.monotonic(), config.request_seconds)
            if not attempt.done:
                raise OSError(
                    f"users={config.users} at once are answered with {attempt.status} ({attempt.error}); "
                    "lower users, or give saturation="
                )
            ends.append(attempt.end)

    await asyncio.gather(*(user() for _ in range(config.users)))
    first, last = count // 10, count - 1 - count // 10
    return (last - first) / (ends[last] - ends[first])


async def at_their_times(
    target: Target, requests: Sequence[PlannedRequest], begin: float, seconds: float
) -> list[SentRequest]:
    """Ask each when it is due, whatever has become of those before: an open loop."""
    asked = []
    for request in requests:
        due = begin + request.due
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        asked.append(asyncio.create_task(complete(target, request, due, seconds)))
    return list(await asyncio.gather(*asked))


async def sample(target: Target, recording: Recording, begin: float) -> None:
    """Note queue and pages until cancelled; a look that fails is left out, since the load is what counts."""
    while True:
        now = time.monotonic()
        try:
            found = read_metrics(await fetch(target, "/metrics"))
            if found:
                recording.samples.append({"time": now - begin, **found})
        except (OSError, ValueError):
            pass
        await asyncio.sleep(max(0.0, now + SAMPLE_SECONDS - time.monotonic()))


def read_metrics(text: str) -> dict[str, float]:
    """The watched figures of Prometheus' text, over all models."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in WATCHED and not line.startswith("#"):
            found[WATCHED[name]] = found.get(WATCHED[name], 0.0) + float(line.rsplit(" ", 1)[-1])
    return found
