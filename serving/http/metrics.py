"""What `/metrics` answers with: the names of vLLM, which autoscalers, routers and load tools read already.

Gauges and counters are read from the engine's load at each scrape; times are observed as answers end.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from serving.follow import Followed
from serving.request import Answering, Finished, Load

# Upper edges of buckets. A token on one CPU core takes some 10 ms, on a GPU less than one.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# Name, what it says, buckets.
TIMES = {
    "time_to_first_token_seconds": ("from the arrival of a request to its first token", SECONDS),
    "inter_token_latency_seconds": ("between two tokens of an answer", SECONDS),
    "request_time_per_output_token_seconds": ("mean between the tokens of an answer", SECONDS),
    "e2e_request_latency_seconds": ("from the arrival of a request to its end", SECONDS),
    "request_queue_time_seconds": ("that a request waited for a slot", SECONDS),
    "request_prefill_time_seconds": ("from a request's first chunk to its first token", SECONDS),
    "request_decode_time_seconds": ("from a request's first token to its last", SECONDS),
    "request_prompt_tokens": ("tokens of a prompt", COUNTS),
    "request_generation_tokens": ("tokens of an answer", COUNTS),
}
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}  # the engine's word and vLLM's


@dataclass
class Timing:
    """When an answer's request arrived and its tokens came, by the monotonic clock."""

    arrived: float
    tokens: list[float] = field(default_factory=list)


class Metrics:
    """One registry of one engine's figures, all with the label model_name.

    followed: where a server stands that follows a run; None where it does not.
    """

    followed: Callable[[], Followed] | None = None

    def __init__(self, engine: Answering, model_name: str, page: int = 0) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._engine, self._name, self._page = engine, model_name, page
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._times = {
            name: Histogram(
                f"vllm:{name}", says, ["model_name"], buckets=edges, registry=self.registry
            ).labels(model_name)
            for name, (says, edges) in TIMES.items()
        }

        def counter(name: str, says: str, label: str) -> Counter:
            return Counter(f"vllm:{name}", says, ["model_name", label], registry=self.registry)

        self._ends = counter("request_success", "answers that ended, by why", "finished_reason")
        self._refused = counter("admission_rejections", "requests not taken on, by why", "reason")
        for reason in REASONS.values():  # there from the first scrape, so that a rate can be made
            self._ends.labels(model_name, reason)

    def refused(self, reason: str) -> None:
        """Count a request that was not taken on."""
        self._refused.labels(self._name, reason).inc()

    def ended(self, timing: Timing, now: float, finished: Finished | None, reason: str | None) -> None:
        """Observe an answer at its end. reason: why, None where the engine failed."""
        self._ends.labels(self._name, REASONS.get(reason or "", "error")).inc()
        seen = {"e2e_request_latency_seconds": now - timing.arrived}
        if timing.tokens:
            seen["time_to_first_token_seconds"] = timing.tokens[0] - timing.arrived
        if (gaps := len(timing.tokens) - 1) > 0:
            seen["request_time_per_output_token_seconds"] = (timing.tokens[-1] - timing.tokens[0]) / gaps
        if finished is not None:
            seen["request_queue_time_seconds"] = finished.queued_seconds
            seen["request_prefill_time_seconds"] = finished.prefill_seconds
            seen["request_decode_time_seconds"] = finished.decode_seconds
            seen["request_prompt_tokens"] = finished.prompt_tokens
            seen["request_generation_tokens"] = finished.written_tokens
        for name, value in seen.items():
            self._times[name].observe(value)
        between = self._times["inter_token_latency_seconds"]
        for before, after in zip(timing.tokens, timing.tokens[1:], strict=False):
            between.observe(after - before)

    def text(self) -> bytes:
        """All figures in Prometheus's text form."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """Called by a scrape: what the engine holds now, and has counted."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        load = self._engine.load()
        behind = () if self.followed is None else _behind(self.followed())
        for name, says, value in (*_gauges(load), *behind):
            gauge = GaugeMetricFamily(name, says, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        for name, says, value in _counters(load):
            counter = CounterMetricFamily(name, says, labels=["model_name"])
            counter.add_metric([self._name], value)
            yield counter
        labels = ["model_name", "block_size", "num_gpu_blocks", "version"]
        info = GaugeMetricFamily("vllm:cache_config_info", "the engine's pages and weights", labels=labels)
        info.add_metric([self._name, str(self._page), str(load.pages), load.version], 1)
        yield info


def _gauges(load: Load) -> Iterator[tuple[str, str, float]]:
    yield "vllm:num_requests_running", "requests that hold a slot", load.running
    yield "vllm:num_requests_waiting", "requests that wait for one", load.waiting
    yield "vllm:kv_cache_usage_perc", "share of the pages that requests hold, 1 is all", _share(load)
    yield "cambrian_serving_slots", "requests that can run at once", load.slots
    yield "cambrian_serving_waiting_tokens", "tokens of prompts that wait", load.waiting_tokens
    yield "cambrian_serving_cached_pages", "pages that the prefix cache alone holds", load.pages_cached
    if load.trainer_gap is not None:
        says = "nats at most between log-probabilities as written and as evaluation has them, last answer"
        yield "cambrian_serving_trainer_gap", says, load.trainer_gap


def _behind(followed: Followed) -> Iterator[tuple[str, str, float]]:
    age = max(0.0, time.time() - followed.saved)  # two machines' clocks
    yield "cambrian_serving_weights_step", "step of the weights that answer new requests", followed.step
    yield "cambrian_serving_newest_step", "newest step that the run has a checkpoint of", followed.newest
    yield "cambrian_serving_weights_age_seconds", "since the weights in use were saved", age


def _share(load: Load) -> float:
    return load.pages_used / max(load.pages, 1)


def _counters(load: Load) -> Iterator[tuple[str, str, int]]:
    yield "vllm:prompt_tokens", "tokens of prompts that were read", load.prompt_tokens
    yield "vllm:generation_tokens", "tokens that were written", load.written_tokens
    yield "vllm:prefix_cache_queries", "tokens looked for in the prefix cache", load.prefix_queries
    yield "vllm:prefix_cache_hits", "tokens found there", load.prefix_hits
    yield "vllm:num_preemptions", "requests put back into the queue: none ever is", 0
    yield "vllm:spec_decode_num_draft_tokens", "tokens that were read as guesses", load.guessed
    yield "vllm:spec_decode_num_accepted_tokens", "guesses that came true", load.accepted
    yield "cambrian_serving_decode_steps", "steps that wrote a token in each running slot", load.decode_steps
    yield "cambrian_serving_rescored_answers", "answers scored again for trainer_gap", load.rescored
    yield "cambrian_serving_prefill_chunks", "chunks of prompts that were read", load.prefill_chunks
