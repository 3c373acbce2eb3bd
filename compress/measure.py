"""What a smaller model is worth beside the one it was made of, on held-out text, and what it takes.

B rows, T positions, D model, V vocabulary.
"""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compress.calibrate import Batch, Tree
from models.ops import Ops
from models.transformer import Model
from models.weights import QTensor
from parallel.axes import Layout
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys

POSITIONS = 128  # whose logits, of both models, exist at once
NEW_TOKENS = 64  # decoded to say how fast
Weights = tuple[Model, Tree, Ops]


@dataclass
class Judge:
    """Held-out text and the dense model, to which others are compared; it is run over the text once."""

    dense: Weights
    batches: Sequence[Batch]
    num_bytes: int  # of the batches' targets
    streams: list[Array] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.streams = [_hidden(self.dense, batch) for batch in self.batches]

    def figures(self, other: Weights) -> dict[str, float]:
        """Bits per byte, and against the dense model: mean and 99th percentile of KL (nats), flips.

        A flip is a position whose likeliest token is another one.
        """
        parts = (self.dense[0], self.dense[2]), (other[0], other[2])
        found: list[list[np.ndarray]] = []
        for stream, batch in zip(self.streams, self.batches, strict=True):
            figures = _compared(
                parts, self.dense[1], other[1], stream, _hidden(other, batch), batch["targets"]
            )
            real = np.asarray(batch["loss_weights"]) > 0
            found.append([np.asarray(x)[real] for x in figures])
        nll, kl, flips = (np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True))
        return {
            "bits_per_byte": float(np.sum(nll)) / math.log(2) / self.num_bytes,
            "kl": float(np.mean(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "flips": float(np.mean(flips)),
        }


def _hidden(weights: Weights, batch: Batch) -> Float[Array, "B T D"]:
    model, params, ops = weights
    return _run(model, ops, params, batch)


# By model and operations, so that artifacts of one shape share the program.
@partial(jax.jit, static_argnums=(0, 1))
def _run(model: Model, ops: Ops, params: Tree, batch: Batch) -> Float[Array, "B T D"]:
    return model.hidden(params, batch, ops)


@partial(jax.jit, static_argnums=0)
def _compared(
    models: tuple[tuple[Model, Ops], tuple[Model, Ops]],
    dense_params: Tree,
    other_params: Tree,
    x: Float[Array, "B T D"],
    y: Float[Array, "B T E"],
    targets: Array,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """The other model's loss, the divergence of the dense one's distribution from its, and flips."""
    dense, other = models

    def some(parts: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, y, targets = (part[None] for part in parts)
        wanted = jax.nn.log_softmax(dense[0].logits(dense_params, x, dense[1]))
        got = jax.nn.log_softmax(other[0].logits(other_params, y, other[1]))
        kl = jnp.sum(jnp.exp(wanted) * (wanted - got), axis=-1)
        nll = -jnp.take_along_axis(got, targets[..., None], axis=-1)[..., 0]
        flips = (jnp.argmax(wanted, axis=-1) != jnp.argmax(got, axis=-1)).astype(jnp.float32)
        return nll[0], kl[0], flips[0]

    size = max(n for n in range(1, POSITIONS + 1) if targets.size % n == 0)
    parts = jax.tree.map(lambda z: z.reshape(-1, size, *z.shape[2:]), (x, y, targets))
    found = jax.lax.map(some, parts)
    return jax.tree.map(lambda z: z.reshape(targets.shape), found)


def decode_speed(weights: Weights, layout: Layout, prompt: Sequence[int]) -> float:
    """Tokens per second of one text, without the time to compile."""
    generator = Generator(*weights, layout)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        keys = sample_keys(0, [0])
        found = generator.complete([list(prompt)], Sampling(temperature=0.0), keys, max_new_tokens=NEW_TOKENS)
        times.append(time.perf_counter() - began)
    return len(found[0]) / times[-1]


def peak_memory() -> int:
    """Bytes at most held so far: of the device, or on a CPU of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sizes(params: Tree, dtype: Any) -> dict[str, float]:
    """Bits a weight with scales, zeros and tables: on the grids, as stored; and the share that is not zero.

    dtype: what arrays are stored in. Where a weight has none of its own it is that of its stored levels.
    """
    count = grid = stored = nonzero = 0.0
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor)):
        size = math.prod(leaf.shape)
        bits = 8 * jnp.dtype(dtype).itemsize
        packed = isinstance(leaf, QTensor)
        count += size
        grid += size * (leaf.bits_a_weight() if packed else bits)
        stored += size * (leaf.bits_a_weight(stored=True) if packed else bits)
        nonzero += float(jnp.count_nonzero(leaf.astype(jnp.float32)))
    return {
        "weights": int(count),
        "bits_a_weight": grid / count,
        "bits_stored": stored / count,
        "nonzero": nonzero / count,
    }


def megabytes(directory: Path) -> float:
    """Of the files with arrays in a directory, 10^6 bytes each."""
    files = [path for kind in ("safetensors", "gguf") for path in directory.glob(f"*.{kind}")]
    return sum(path.stat().st_size for path in files) / 1e6
