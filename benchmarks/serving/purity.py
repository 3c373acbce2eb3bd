"""Whether an answer depends on the load: requests alone and in crowds, and how many differ in any bit.

    python -m benchmarks.serving.purity                     # the quickstart's model, 200 schedules of 30
    python -m benchmarks.serving.purity model=hybrid_debug  # any overrides of train.py

Each request is answered alone, by an engine without prefix cache. Then schedules drawn from a seed answer all
of them: shuffled, at once or one by one, beside neighbours that are cancelled, with the cache and without.
Compared are tokens, log-probabilities and alternatives, as they are.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.measure import arguments, publish
from benchmarks.workload import build, compose_config
from models.ops import Ops
from models.transformer import Model, Tree
from parallel.axes import Layout
from serving.engine import Engine
from serving.offline import complete
from serving.request import Draw, Event, Finished, Request, Written
from serving.settings import ServeConfig
from training.config import with_vocab

VOCABULARY, LENGTH = 4096, 256
DRAWS = (
    Draw(0),
    Draw(1.0),
    Draw(0.7, top_k=5),
    Draw(1.2, top_p=0.8),
    Draw(1.0, min_p=0.05, presence=0.5, frequency=0.3),
    Draw(0, bias={3: 2.0, 5: -float("inf")}),
)
Answers = list[list[Written]]
KINDS = ("crowd", "one by one", "neighbours cancelled")


def requests_of(rng: np.random.Generator, count: int, vocabulary: int, length: int) -> list[Request]:
    """Requests of all kinds; every second prompt has a beginning in common with others."""
    common, made = rng.integers(0, vocabulary, length // 2).tolist(), []
    for number in range(count):
        size = int(rng.integers(1, length * 3 // 4))
        prompt = rng.integers(0, vocabulary, size).tolist()
        if number % 2:
            prompt = [*common[:size], *prompt[len(common) :]]
        made.append(
            Request(
                tuple(prompt),
                int(rng.integers(1, length - size + 1)),
                DRAWS[number % len(DRAWS)],
                seed=number,
                stop_ids=frozenset(rng.integers(0, vocabulary, 3).tolist()),
                logprobs=number % 4,
                client=str(number % 3),
            )
        )
    return made


def play(engine: Engine, requests: Sequence[Request], kind: str, rng: np.random.Generator) -> Answers:
    """The answers of an engine to requests that come as `kind` says."""
    events: dict[int, list[Event]] = {}

    def sink(number: int, event: Event) -> None:
        events.setdefault(number, []).append(event)

    left, numbers = list(requests), list[int]()
    victims: list[int] = []
    while left or any(not _ended(events, number) for number in numbers):
        while left and (kind != "one by one" or rng.random() < 0.2):
            numbers.append(engine.submit(left.pop(0), sink))
            if kind == "neighbours cancelled":
                victims.append(engine.submit(requests[int(rng.integers(len(requests)))], sink))
        engine.step()
        if victims and rng.random() < 0.3:
            engine.cancel(victims.pop(int(rng.integers(len(victims)))))
    for number in victims:
        engine.cancel(number)
    while engine.step():
        pass
    return [[event for event in events[number] if isinstance(event, Written)] for number in numbers]


def _ended(events: dict[int, list[Event]], number: int) -> bool:
    return bool(events.get(number)) and isinstance(events[number][-1], Finished)


def differing(
    model: Model,
    params: Tree,
    ops: Ops,
    settings: ServeConfig,
    layout: Layout | None = None,
    *,
    schedules: int,
    count: int,
    seed: int = 0,
) -> dict[str, tuple[int, int]]:
    """Of each kind of schedule: (requests answered, those of which any bit differed). Raises RuntimeError
    where something was compiled on the way, or a page is held afterwards.
    """
    engines = []
    for cache in (False, True):
        patient = replace(settings, prefix_cache=cache, queue_seconds=1e9)
        engines.append(Engine(model, params, ops, patient, layout))
        engines[-1].warm()
    programs = [engine.compiled for engine in engines]
    rng = np.random.default_rng(seed)
    length = engines[0].max_len
    requests = requests_of(rng, count, engines[0].vocab_size, length)
    alone = [complete(engines[0], [request])[0][0] for request in requests]
    found = {kind: (0, 0) for kind in KINDS}
    for number in range(schedules):
        kind, order = KINDS[number % len(KINDS)], rng.permutation(count)
        answers = play(engines[number // len(KINDS) % 2], [requests[i] for i in order], kind, rng)
        wrong = sum(answer != alone[i] for answer, i in zip(answers, order, strict=True))
        found[kind] = found[kind][0] + count, found[kind][1] + wrong
    if [engine.compiled for engine in engines] != programs:
        raise RuntimeError("a program was compiled on the way")
    if any(engine.load().pages_used for engine in engines):
        raise RuntimeError("a page is held by nobody")
    return found


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Compare, print and write; the exit status is 1 where any bit differed."""
    asked, overrides = arguments(
        "purity",
        __doc__,
        "purity",
        schedules=(200, "in which all requests are answered again"),
        requests=(30, "of a schedule"),
    ).parse_known_args(argv)
    words = [*(overrides or ["+experiment=quickstart"]), "mesh=single", "model.zero_init=false"]
    words += [f"model.vocab_size={VOCABULARY}", f"data.seq_len={LENGTH}"]
    table: list[dict[str, Any]] = []
    for precision in ("float32", "bfloat16"):
        config = with_vocab(compose_config(*words, f"training.precision={precision}"))
        program = build(config, jax.devices()[:1])
        params = program.to_canonical(program.init_state(0).params)
        # Peaked enough that rounding decides little, and flat enough that what is drawn varies.
        params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
        settings = ServeConfig(max_len=LENGTH, page=32, chunk=64)
        found = differing(
            program.model,
            params,
            program.ops,
            settings,
            program.layout,
            schedules=asked.schedules,
            count=asked.requests,
        )
        table += [
            {"precision": precision, "schedule": kind, "requests": total, "differing": wrong}
            for kind, (total, wrong) in found.items()
        ]
    result = {
        "title": "Answers that depend on the load",
        "machine": measure.describe_machine(),
        "workload": {"overrides": words, "slots": ServeConfig().slots},
        "table": table,
        "differing": sum(row["differing"] for row in table),
    }
    publish(result, asked)
    return int(result["differing"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
