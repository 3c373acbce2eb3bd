"""How fast text is written: `python -m benchmarks.generation`, with overrides of train.py after the flags.

By default the model of the quickstart and as many texts as it writes at its end: 23 short prompts, 256 tokens
each. Weights are those of step 0, which cost what others do. Ways to draw are asked in turn; greedy decoding
draws nothing, so a ratio to it is what drawing costs.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks import measure
from benchmarks.measure import arguments, publish
from benchmarks.workload import build, compose_config
from common.host import keep_freed_memory
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from training.config import with_vocab

PROMPT = 4  # tokens
VOCABULARY = 4096  # of the quickstart
DRAWS = {
    "greedy": Sampling(0),
    "temperature 0.6": Sampling(0.6),
    "top_k 20": Sampling(0.8, top_k=20),
    "top_p 0.9": Sampling(0.8, top_p=0.9),
}


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    asked, overrides = arguments(
        "generation",
        __doc__,
        "generation",
        rounds=(7, "times that each way to draw is asked"),
        rows=(23, "texts written at once"),
        tokens=(256, "written of each"),
    ).parse_known_args(argv)
    words = overrides or ["+experiment=quickstart", "mesh=single", f"model.vocab_size={VOCABULARY}"]
    config = with_vocab(compose_config(*words))
    program = build(config)
    params = program.to_canonical(program.init_state(0).params)
    generator = Generator(program.model, params, program.ops, program.layout)
    prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, (asked.rows, PROMPT)).tolist()
    keys = sample_keys(0, range(asked.rows))
    calls: dict[str, Callable[[], object]] = {
        name: partial(generator.complete, prompts, sampling, keys, max_new_tokens=asked.tokens)
        for name, sampling in DRAWS.items()
    }
    first = {name: measure.timed(call) for name, call in calls.items()}  # with its programs compiled
    seconds = measure.alternate({n: partial(measure.timed, c) for n, c in calls.items()}, asked.rounds)
    found = {name: measure.summary(samples) for name, samples in seconds.items()}
    written = asked.rows * asked.tokens
    table = [
        {
            "drawn": name,
            "tokens/s": written / figures["median"],
            "ms a token of each": 1e3 * figures["median"] / asked.tokens,
            "quartiles, ms": measure.quartiles(figures, 1e3 / asked.tokens),
            "first call, s": first[name],
        }
        for name, figures in found.items()
    ]
    size = program.model.num_params()["total"] / 1e6
    result = {
        "title": f"Generation: {asked.rows} texts of {asked.tokens} tokens, {size:.3g}M parameters",
        "workload": {"rows": asked.rows, "tokens": asked.tokens, "overrides": words},
        "table": table,
        "ratios": {
            f"{name} over greedy": measure.ratio(seconds[name], seconds["greedy"])
            for name in DRAWS
            if name != "greedy"
        },
    }
    publish(result, asked)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(sys.argv[1:]))
