"""Figures of a load test from what became of each request: latencies, goodput, refusals, probes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from serving.load.client import SentRequest
from serving.load.config import LoadConfig, ServiceLevel
from serving.load.drive import Recording

QUANTILES = (0.5, 0.9, 0.95, 0.99)
Figures = dict[str, Any]


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """p50 to p99, and the largest; nothing where there are no values."""
    found = np.fromiter(values, float)
    if not len(found):
        return {}
    named = {f"p{100 * q:.0f}": float(np.quantile(found, q)) for q in QUANTILES}
    return {**named, "most": float(found.max())}


def per_token(attempt: SentRequest) -> float:
    """Mean seconds between two tokens of an answer; 0 where it has only one."""
    between = attempt.end - (attempt.first or attempt.end)
    return between / (attempt.tokens - 1) if attempt.tokens > 1 else 0.0


def is_good(attempt: SentRequest, slo: ServiceLevel) -> bool:
    """Whether a whole answer came within all limits, counted from when its request was due."""
    if not attempt.done or attempt.first is None:
        return False
    limits = (slo.first, slo.token, slo.whole)
    times = (attempt.first - attempt.due, per_token(attempt), attempt.end - attempt.due)
    return all(time <= limit for time, limit in zip(times, limits, strict=True))


def latencies(attempts: Sequence[SentRequest]) -> Figures:
    """Of whole answers: to the first token, between the parts that arrive, and to the end."""
    done = [a for a in attempts if a.done]
    return {
        "first": quantiles(a.first - a.due for a in done if a.first is not None),
        "gap": quantiles(gap for a in done for gap in a.gaps),
        "whole": quantiles(a.end - a.due for a in done),
    }


def refusals(attempts: Sequence[SentRequest]) -> Figures:
    """How many, how quickly they were told, and how many of them not when to come again."""
    refused = [a for a in attempts if a.refused]
    silent = sum(a.retry_after is None for a in refused)
    return {"count": len(refused), "seconds": quantiles(a.end - a.sent for a in refused), "silent": silent}


def summary(recording: Recording, config: LoadConfig) -> Figures:
    """All figures of a report, ready for JSON."""
    ends = list(accumulate(seconds for seconds, _ in recording.plan.stages))
    stages = [_stage(recording, config.slo, number, end) for number, end in enumerate(ends)]
    everything = [*recording.load, *recording.probes]
    failed = [a for a in everything if not a.done and not a.refused]
    idle, beside = latencies(recording.idle)["first"], latencies(recording.probes)["first"]
    goodput = [stage["goodput"] for stage in stages]
    most = max(range(len(stages)), key=lambda i: stages[i]["offered"])
    return {
        "server": f"{recording.target.host}:{recording.target.port}",
        "model": recording.target.model,
        "seed": config.seed,
        "saturation": recording.saturation,
        "slo": vars(config.slo),
        "requests": len(recording.load),
        "seconds": recording.plan.seconds,
        "stages": stages,
        "refusals": refusals(everything),
        "failures": {"count": len(failed), "why": dict(Counter(a.error for a in failed).most_common(5))},
        "probe": {"idle": idle, "load": beside, "ratio": _ratio(beside.get("p95"), idle.get("p95"))},
        "goodput": {
            "peak": max(goodput),
            "at_most_load": goodput[most],
            "share": _ratio(goodput[most], max(goodput)),
        },
        "late": quantiles(a.sent - a.due for a in everything),
        "waiting_most": max((s.get("waiting", 0.0) for s in recording.samples), default=None),
        "pages_most": max((s.get("pages", 0.0) for s in recording.samples), default=None),
    }


def _stage(recording: Recording, slo: ServiceLevel, number: int, end: float) -> Figures:
    """Latencies are of the requests that were due in it; rates of the answers that came while it lasted."""
    seconds, rate = recording.plan.stages[number]
    own = [a for a in recording.load if a.stage == number]
    came = [a for a in recording.load if a.done and end - seconds <= a.end < end]
    beside = [a for a in recording.probes if end - seconds <= a.due < end]
    return {
        "begin": end - seconds,
        "seconds": seconds,
        "load": rate / recording.saturation,
        "offered": len(own) / seconds,
        "asked": len(own),
        "answered": sum(a.done for a in own),
        "refused": sum(a.refused for a in own),
        "throughput": len(came) / seconds,
        "tokens_per_second": sum(a.tokens for a in came) / seconds,
        "goodput": sum(is_good(a, slo) for a in came) / seconds,
        "good_share": _ratio(sum(is_good(a, slo) for a in own), len(own)),
        **latencies(own),
        "probe": latencies(beside)["first"],
    }


def _ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
