"""Tokens per second of our generator and of transformers' `generate`, on the same weights, greedily.

    make torch-env                              # PyTorch and transformers in an environment of their own
    python -m benchmarks.versus_generate        # the quickstart's model; or any overrides of train.py

The weights of step 0 are exported and opened by both, ours on one device; prompts are equal and of one
length. Both are asked in turn and lie idle in between. Of float32 the share of tokens that both wrote alike
is shown: random weights have near-ties, which the last bit decides.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.measure import ROOT, arguments, publish
from benchmarks.versus_torch import TORCH_PYTHON, Peer, environment, torch_python
from benchmarks.workload import build, compose_config
from common.host import keep_freed_memory
from interop.write import export, reader
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from training.config import with_vocab

PROMPT, VOCABULARY = 16, 4096
PRECISIONS = ("float32", "bfloat16")


def transformers(python: Path, directory: Path, precision: str, threads: int) -> Peer:
    """Transformers in a process of its own, with an exported model."""
    script = str(ROOT / "benchmarks/torch_generation.py")
    command = [str(python), "-P", script, str(directory), precision, str(threads)]
    return Peer(f"transformers {precision}", command, environment(threads) | {"HF_HUB_OFFLINE": "1"})


def complete(peer: Peer, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Seconds and ids of one call of transformers' `generate`."""
    return peer.ask(json.dumps({"prompts": prompts, "tokens": tokens}))


def ours(words: Sequence[str], precision: str) -> Generator:
    """Our generator with the weights of step 0."""
    config = with_vocab(compose_config(*words, f"training.precision={precision}"))
    program = build(config, jax.devices()[:1])
    params = program.to_canonical(program.init_state(0).params)
    return Generator(program.model, params, program.ops, program.layout)


def export_start(words: Sequence[str], output: Path) -> None:
    """The same weights as a directory of Hugging Face's layout."""
    program = build(with_vocab(compose_config(*words)), jax.devices()[:1])
    params = program.to_canonical(program.init_state(0).params)
    export(output, program.model.config, program.model, reader(params), dtype=jnp.float32)


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    asked, overrides = arguments(
        "versus_generate",
        __doc__,
        "versus_generate",
        rounds=(7, "times that each is asked"),
        rows=(23, "texts written at once, beside one alone"),
        tokens=(256, "written of each"),
        threads=(os.cpu_count() or 1, "of transformers"),
    ).parse_known_args(argv)
    python = torch_python(os.environ.get(TORCH_PYTHON))
    words = overrides or [
        *("+experiment=quickstart", "mesh=single"),
        *(f"model.vocab_size={VOCABULARY}", "model.zero_init=false"),
    ]
    random = np.random.default_rng(0)
    prompts = random.integers(0, VOCABULARY, (asked.rows, PROMPT)).tolist()
    calls: dict[str, Any] = {}
    said: dict[str, Any] = {}
    theirs: list[Peer] = []
    with TemporaryDirectory() as directory:
        export_start(words, Path(directory, "model"))
        try:
            for precision in PRECISIONS:
                generator = ours(words, precision)
                theirs.append(transformers(python, Path(directory, "model"), precision, asked.threads))
                for rows in (asked.rows, 1):
                    some, keys = prompts[:rows], sample_keys(0, range(rows))
                    call = partial(generator.complete, some, Sampling(0), keys, max_new_tokens=asked.tokens)
                    written, answer = call(), complete(theirs[-1], some, asked.tokens)
                    said[f"{precision}, {rows}"] = float(
                        np.mean(np.array(written) == np.array(answer["ids"]))
                    )
                    calls[f"ours {precision}, {rows}"] = partial(measure.timed, call)
                    calls[f"transformers {precision}, {rows}"] = partial(
                        lambda peer, some: complete(peer, some, asked.tokens)["seconds"], theirs[-1], some
                    )
            samples = measure.alternate(calls, asked.rounds)
        finally:
            for worker in theirs:
                worker.close()
    ratios = {
        case: measure.ratio(samples[f"ours {case}"], samples[f"transformers {case}"])
        for case in (name.removeprefix("ours ") for name in calls if name.startswith("ours "))
    }
    table = []
    for case, over in ratios.items():
        written = int(case.rpartition(" ")[2]) * asked.tokens
        mine, other = (measure.summary(samples[f"{side} {case}"]) for side in ("ours", "transformers"))
        table.append(
            {
                "precision, rows": case,
                "ours, tokens/s": written / mine["median"],
                "transformers, tokens/s": written / other["median"],
                "over transformers": measure.with_quartiles(over),
                "equal tokens, %": 100 * said[case] if case.startswith("float32") else None,
            }
        )
    machine = measure.describe_machine()
    machine["versions"] |= theirs[0].introduction["versions"]
    result = {
        "title": f"Generation, greedy: {asked.tokens} tokens a text",
        "machine": machine,
        "workload": {"rows": asked.rows, "tokens": asked.tokens, "overrides": list(words)},
        "table": table,
        "ratios": ratios,
    }
    publish(result, asked)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(sys.argv[1:]))
