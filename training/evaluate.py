"""What is measured of weights while they train; first of all the loss on held-out text.

Whatever an evaluation measures are figures by name: rows of `metrics.jsonl`, curves, lines, a scrape's series
and the summary take them without knowing them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from data.tokens.tokenizer import Tokenizer
from evaluation.olmo import cached_wheel
from evaluation.results import evaluate as evaluate_tasks
from evaluation.results import plans
from evaluation.suites import load_suite
from serving.generator import Generator
from training.config import Config
from training.program import Program


@dataclass(frozen=True)
class Evaluation:
    """Something measured every so many steps, and at the last one."""

    every: int  # steps
    measure: Callable[[Any], Mapping[str, float]]  # figures by name, of parameters as they lie in memory


def evaluate(
    eval_step: Callable[..., Any], params: Any, batches: Iterable[Any], num_bytes: int
) -> dict[str, float]:
    """`eval/loss` (nats per token) and `eval/bits_per_byte` over batches that cover `num_bytes` of text.

    Sums stay on the devices until the last batch, so that batches overlap; they are added in float64.
    """
    sums = [eval_step(params, batch) for batch in batches]
    sums = jax.device_get(sums)
    nll = math.fsum(float(s["nll"]) for s in sums)
    weight = math.fsum(float(s["weight"]) for s in sums)
    return {"eval/loss": nll / weight, "eval/bits_per_byte": nll / math.log(2) / num_bytes}


def weighed(
    figures: Mapping[str, Mapping[str, float]],
    shares: Mapping[str, float],
    bytes_per_token: Mapping[str, float],
) -> dict[str, float]:
    """The figures of text that has these shares of its tokens from each component, and each component's own.

    figures: by component, what `evaluate` returns; shares: they sum to 1. Bits per byte are the mixed text's
    bits over its bytes, not the mean of the components' figures.
    """
    loss = math.fsum(share * figures[name]["eval/loss"] for name, share in shares.items())
    size = math.fsum(share * bytes_per_token[name] for name, share in shares.items())
    own = {
        f"eval/{name}/{key.removeprefix('eval/')}": value
        for name, values in figures.items()
        for key, value in values.items()
    }
    return {"eval/loss": loss, "eval/bits_per_byte": loss / math.log(2) / size, **own}


def row_losses(
    evaluate_batch: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """(nll in nats, weight) of each row of the batches: what a difference of means is bootstrapped from.

    evaluate_batch: `(params, batch of any number of rows) -> {"nll", "weight"}`, such as a strategy's.
    """

    def one(row: Any) -> tuple[Any, Any]:
        sums = evaluate_batch(params, {key: value[None] for key, value in row.items()})
        return sums["nll"], sums["weight"]

    rows = jax.jit(lambda batch: jax.lax.map(one, batch))
    nll, weight = zip(*(jax.device_get(rows(batch)) for batch in batches), strict=True)
    return np.concatenate(nll).astype(float), np.concatenate(weight).astype(float)


class SuiteFigures:
    """The documents of a suite as tokens, read once, and what scores them, compiled once."""

    def __init__(self, name: str, length: int, program: Program, tokenizer: Tokenizer) -> None:
        """length: tokens read at once. Raises ValueError where a task's documents are not there."""
        self._program, self._tokenizer = program, tokenizer
        self._plans = plans(load_suite(name), tokenizer, cached_wheel(), length=length, bos=True)
        self._generator: Generator | None = None

    def measure(self, params: Any) -> dict[str, float]:
        """`suite/TASK/METRIC` of each task, of parameters as they lie in memory. All processes call it."""
        program = self._program
        whole = program.to_canonical(params)
        if self._generator is None:
            self._generator = Generator(program.model, whole, program.ops, program.layout)
        else:
            self._generator.update(whole)
        try:
            return {
                f"suite/{result.task.name}/{result.task.metric}": result.figures[result.task.metric].value
                for result in evaluate_tasks(self._generator, self._tokenizer, self._plans)
            }
        finally:
            self._generator.forget()  # the next step wants their memory


def suite_figures(config: Config, program: Program, tokenizer: Tokenizer) -> SuiteFigures | None:
    """What `eval.suite` asks for."""
    if config.eval.suite is None:
        return None
    return SuiteFigures(config.eval.suite, config.data.seq_len, program, tokenizer)
