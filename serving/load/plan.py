"""When each request of a load test is due and what it asks: a function of the config and its seed alone."""

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from serving.load.config import LengthConfig, LoadConfig, LoadStage

WINDOWS = 12  # of a trace: its stages, for the figures
PROBE = -1  # the stage of requests that are not part of the load


@dataclass(frozen=True)
class PlannedRequest:
    """A prompt of token ids, the tokens to be written, and when: seconds from the beginning."""

    due: float
    stage: int
    prompt: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class LoadPlan:
    """All requests in order of time, and of each stage its seconds and its mean rate in requests/s."""

    requests: tuple[PlannedRequest, ...]
    stages: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> float:
        """Until the last stage is over."""
        return sum(seconds for seconds, _ in self.stages)


def arrivals(stage: LoadStage, seconds: float, rate: float, random: np.random.Generator) -> np.ndarray:
    """When requests come within a stage, ascending, in seconds from its beginning."""
    if rate == 0:
        return np.zeros(0)
    if stage.arrivals == "constant":
        return np.arange(0, seconds, 1 / rate)
    size = stage.burst if stage.arrivals == "burst" else 1
    # Twice as many as are likely and some more: none is missing at the end.
    gaps = random.exponential(size / rate, size=int(2 * seconds * rate / size) + 50)
    times = np.cumsum(gaps)
    return np.repeat(times[times < seconds], size)


def lengths(config: LengthConfig, count: int, random: np.random.Generator) -> np.ndarray:
    """Tokens of so many texts."""
    drawn = config.median * np.exp(config.spread * random.standard_normal(count))
    return np.clip(np.rint(drawn), config.least, config.most).astype(int)


def plan(config: LoadConfig, saturation: float) -> LoadPlan:
    """Everything that will be asked. Raises ValueError where that is more than the config allows."""
    made = _trace(config, saturation) if config.trace else _stages(config, saturation)
    for key, value in (("most_requests", len(made.requests)), ("most_seconds", made.seconds)):
        if value > (most := getattr(config, key)):
            what = key.removeprefix("most_")
            raise ValueError(f"{value:.0f} {what} are more than {key}={most}; lower duration or raise it")
    return made


def _stages(config: LoadConfig, saturation: float) -> LoadPlan:
    requests: list[PlannedRequest] = []
    begin, shape = 0.0, list[tuple[float, float]]()
    for number, stage in enumerate(config.stages):
        # A stream of its own for each stage: a change of one leaves the others as they were.
        random = np.random.default_rng((config.seed, number))
        seconds, rate = stage.seconds * config.duration, stage.load * saturation
        due = begin + arrivals(stage, seconds, rate, random)
        prompts = lengths(config.prompt, len(due), random)
        answers = lengths(config.answer, len(due), random)
        requests += _requests(config, due, [number] * len(due), prompts, answers, random)
        shape.append((seconds, rate))
        begin += seconds
    return LoadPlan(tuple(requests), tuple(shape))


def _trace(config: LoadConfig, saturation: float) -> LoadPlan:
    assert config.trace is not None
    times, prompts, answers = read_trace(Path(config.trace))
    rate = config.trace_load * saturation
    seconds = len(times) / rate
    due = times / times[-1] * seconds * (1 - 1e-9)
    window = (due / seconds * WINDOWS).astype(int)
    prompts = np.clip(prompts, config.prompt.least, config.prompt.most)
    answers = np.clip(answers, config.answer.least, config.answer.most)
    random = np.random.default_rng((config.seed, 0))
    requests = _requests(config, due, window.tolist(), prompts, answers, random)
    width = seconds / WINDOWS
    counts = np.bincount(window, minlength=WINDOWS)
    return LoadPlan(tuple(requests), tuple((width, float(count) / width) for count in counts))


def read_trace(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds since the first request, tokens of prompts and of answers. Raises ValueError, OSError."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        times = np.array([datetime.fromisoformat(row["TIMESTAMP"]).timestamp() for row in rows])
        prompts, answers = (
            np.array([int(row[key]) for row in rows]) for key in ("ContextTokens", "GeneratedTokens")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"trace={path} needs columns TIMESTAMP (ISO), ContextTokens and GeneratedTokens: {error}"
        ) from None
    if len(times) < 2 or np.any(np.diff(times) < 0) or times[-1] == times[0]:
        raise ValueError(f"trace={path} has {len(times)} requests; it needs two or more, in order of time")
    return times - times[0], prompts, answers


def _requests(
    config: LoadConfig,
    due: np.ndarray,
    stages: list[int],
    prompts: np.ndarray,
    answers: np.ndarray,
    random: np.random.Generator,
) -> list[PlannedRequest]:
    low, high = config.vocabulary
    count = config.prefix.groups
    shared = np.random.default_rng((config.seed, 1 << 20)).integers(low, high, (count, config.prefix.tokens))
    groups = random.integers(0, count, len(due)) if count else np.zeros(0, int)
    found = []
    for i, time in enumerate(due):
        own = random.integers(low, high, prompts[i]).tolist()
        begun = shared[groups[i]].tolist() if count else []
        tokens = [*begun, *own][: config.prompt.most]
        found.append(PlannedRequest(float(time), stages[i], tuple(tokens), int(answers[i])))
    return found


def probes(config: LoadConfig, seconds: float) -> list[PlannedRequest]:
    """Those beside a load of so many seconds."""
    random = np.random.default_rng((config.seed, 1 << 21))
    low, high = config.vocabulary
    count = int(seconds * config.probe.per_second)
    prompts = random.integers(low, high, (count, config.probe.tokens)).tolist()
    # In the middle between two beats: no burst of a constant process falls on them.
    return [
        PlannedRequest((i + 0.5) / config.probe.per_second, PROBE, tuple(prompts[i]), 1) for i in range(count)
    ]
