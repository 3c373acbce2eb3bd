"""How many guesses of a run's engine come true, and what they are worth in tokens per second.

    python train.py +experiment=quickstart run.name=further "model.mtp={depth: 1, weight: 0.3}"
    python -m benchmarks.serving.guesses further

Prompts are the beginnings of rows of the run's held-out text. One engine of each kind answers them in turn,
round by round.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from operator import eq
from statistics import median
from typing import Any

from benchmarks import measure
from benchmarks.measure import arguments, publish
from serving.engine import Engine
from serving.offline import complete
from serving.request import Draw, Request
from serving.settings import ServeConfig

KINDS = (("nobody", 0), ("ngram", 2), ("mtp", 1), ("mtp", 2), ("mtp", 3))
TEMPERATURES = (0.0, 0.8)


def prompts_of(opened: Any, rows: int, size: int) -> list[tuple[int, ...]]:
    """The first tokens of so many rows of held-out text."""
    from data.loading.held_out import held_out_batches
    from data.pipeline import prepare

    config = opened.config
    prepared = prepare(config.data, config.tokenizer, progress=False)
    batches = held_out_batches(prepared, config.data, batch_size=1)
    found = (batch["tokens"][0, :size] for part in batches.values() for batch in part)
    return [tuple(map(int, row)) for row in islice(found, rows)]


def rows_of(opened: Any, users: int, asked: Any) -> Iterator[dict[str, Any]]:
    """What so many texts at once take by each kind of guess, at each temperature."""
    prompts = prompts_of(opened, users, asked.prompt)
    model, params, ops, layout = opened.trained
    engines = {}
    for kind in KINDS:
        settings = ServeConfig(
            slots=users,
            max_len=asked.prompt + asked.tokens,
            prefix_cache=False,
            guesses=kind[1],
            speculate=kind[0] if kind[1] else "ngram",
        )
        engines[kind] = Engine(model, params, ops, settings, layout)
        engines[kind].warm()
    for temperature in TEMPERATURES:
        requests = [Request(p, asked.tokens, Draw(temperature), seed=n) for n, p in enumerate(prompts)]
        said: dict[tuple[str, int], list[list[int]]] = {}

        def answer(kind: tuple[str, int], requests: Any = requests, said: Any = said) -> float:
            begin = time.perf_counter()
            found = complete(engines[kind], requests)
            seconds = time.perf_counter() - begin
            said[kind] = [[one.token for one in written] for written, _ in found]
            return seconds

        begun = {kind: engine.load() for kind, engine in engines.items()}
        took = measure.alternate({kind: partial(answer, kind) for kind in KINDS}, asked.rounds)
        for kind, engine in engines.items():
            before, after = begun[kind], engine.load()
            guessed = after.guessed - before.guessed
            steps = after.decode_steps - before.decode_steps
            yield {
                "users": users,
                "temperature": temperature,
                "guessed by": kind[0],
                "guesses": kind[1],
                "came true": f"{(after.accepted - before.accepted) / guessed:.1%}" if guessed else "",
                "tokens of a text a step": (after.written_tokens - before.written_tokens) / steps / users,
                "tokens/s": users * asked.tokens / median(took[kind]),
                "times faster": measure.with_quartiles(measure.ratio(took[kind], took[KINDS[0]])),
                "same answers": sum(map(eq, said[kind], said[KINDS[0]])) / users,
            }


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    parser = arguments(
        "serving.guesses",
        __doc__,
        "guesses",
        users=("1,8", "at once, comma-separated"),
        rounds=(5, "in which every engine answers all"),
        prompt=(64, "tokens of each prompt"),
        tokens=(128, "of each answer"),
    )
    parser.add_argument("run", help="with model.mtp")
    asked = parser.parse_args(argv)
    from training.opening.opened import open_run

    opened = open_run(asked.run)
    table = [row for users in asked.users.split(",") for row in rows_of(opened, int(users), asked)]
    result = {
        "title": f"Guesses in an engine: a quickstart with model.mtp, {asked.prompt} + {asked.tokens} tokens",
        "note": "`times faster` than without guesses: median and quartiles of the rounds. A step that reads "
        "more places has other sums, by which a near tie may end otherwise: `same answers`, of all texts.",
        "table": table,
        "machine": measure.describe_machine(),
    }
    publish(result, asked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
