"""Held-out loss in nats per token and in bits per byte, the figure that tokenizers cannot flatter."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax


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
