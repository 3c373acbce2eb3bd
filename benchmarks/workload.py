"""A step to be measured: the program of a config, and batches that look like text without any data set.

B rows, T positions of a row.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from jaxtyping import Bool, Int
from omegaconf.errors import OmegaConfBaseException

from configs import schema
from configs.explain import check_overrides, explain
from configs.groups import CONFIG_DIR
from configs.optional_groups import opened
from parallel.mesh import build_layout
from training.config import Config, with_vocab
from training.device_batches import placing, rows_here
from training.legal.check import check
from training.program import Program, build_program
from training.state import TrainState

MEAN_DOCUMENT = 0.4  # of a row, where rows are packed
ZIPF_SHIFT = 2.7  # Mandelbrot's: the commonest words are less common than Zipf's law alone would have them


@dataclass
class Workload:
    """A compiled step and its state, ready to run. `run` gives metrics that are still being computed."""

    program: Program
    compiled: Any
    compile_seconds: float
    state: TrainState
    batches: list[Any]  # on the devices
    steps: int = 0

    def run(self) -> Any:
        """One optimizer step on the next of the batches."""
        self.state, metrics = self.compiled(self.state, self.batches[self.steps % len(self.batches)])
        self.steps += 1
        return metrics

    def losses(self, steps: int) -> list[float]:
        """Losses of so many steps, in nats per token; waits for the last."""
        metrics = [self.run()["loss"] for _ in range(steps)]
        return [float(loss) for loss in metrics]

    @property
    def device(self) -> Any:
        """The first of the devices, which is like all others."""
        return self.program.layout.mesh.devices.flat[0]

    def device_bytes(self) -> int | None:
        """Bytes that were allocated at most on the first device; None where it does not count them."""
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")


def compose_config(*words: str) -> Config:
    """What `train.py` makes of these words, not yet checked as a whole. ValueError for bad words."""
    schema.register()
    check_overrides(list(words), CONFIG_DIR, strict=True)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return schema.from_hydra(compose("config", overrides=opened(words, Config)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error


def build(config: Config, devices: Sequence[Any] | None = None) -> Program:
    """The checked program of a config on these devices (all by default). ValueError for what cannot run."""
    config = with_vocab(config)
    check(config, len(devices) if devices is not None else jax.device_count())
    return build_program(config, build_layout(config.mesh, devices))


def prepare(
    config: Config, *, packed: bool, batches: int = 4, devices: Sequence[Any] | None = None
) -> Workload:
    """Compile the step of a config on these devices (all by default), and make its state and batches."""
    program = build(config, devices)
    rows, length = program.batch["tokens"].shape
    vocab = with_vocab(config).model.vocab_size
    made = [synthetic_batch(rows, length, vocab, seed=i, packed=packed) for i in range(batches)]
    return with_batches(program, config.seed, made)


def with_batches(program: Program, seed: int, batches: Sequence[Mapping[str, np.ndarray]]) -> Workload:
    """The same for a program and batches [B, T] that are there."""
    start = time.perf_counter()
    compiled = program.compile_train()
    seconds = time.perf_counter() - start
    rows = rows_here(program.batch)
    place = placing(program.batch, rows)
    placed = [place({name: array[rows] for name, array in batch.items()}) for batch in batches]
    return Workload(program, compiled, seconds, program.init_state(seed), placed)


def synthetic_batch(rows: int, length: int, vocab: int, *, seed: int, packed: bool) -> dict[str, np.ndarray]:
    """Tokens by Zipf's law; packed: documents of random lengths, so that masks have something to hide."""
    rng = np.random.default_rng(seed)
    stream = token_stream(rng, rows, length, vocab)
    begins = rng.random((rows, length)) < (1 / (MEAN_DOCUMENT * length) if packed else 0)
    return batch_of(stream, begins)


def token_stream(rng: np.random.Generator, rows: int, length: int, vocab: int) -> Int[np.ndarray, "B L"]:
    """Rows of L = T + 1 tokens by Zipf's law: inputs, and the last one's target."""
    shares = 1.0 / (np.arange(vocab) + ZIPF_SHIFT)
    return rng.choice(vocab, (rows, length + 1), p=shares / shares.sum()).astype(np.int32)


def batch_of(
    stream: Int[np.ndarray, "B L"], begins: Bool[np.ndarray, "B T"] | None = None
) -> dict[str, np.ndarray]:
    """The batch of rows of L = T + 1 tokens; begins: where documents do, besides the begin of each row."""
    begins = np.zeros_like(stream[:, 1:], bool) if begins is None else begins
    begins[:, 0] = True
    at = np.arange(begins.shape[1])
    weights = np.ones(begins.shape, np.float32)
    weights[:, :-1][begins[:, 1:]] = 0  # the last token of a document does not predict the next one's first
    return {
        "tokens": stream[:, :-1].astype(np.int32),
        "targets": stream[:, 1:].astype(np.int32),
        "positions": (at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)).astype(np.int32),
        "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32),
        "loss_weights": weights,
    }


def step_seconds(run: Callable[[], Any], steps: int) -> Iterator[float]:
    """Seconds from the end of a step to the end of the next, one step always on its way, as in training."""
    pending = run()
    jax.block_until_ready(pending)
    pending, last = run(), time.perf_counter()
    for _ in range(steps):
        following = run()
        jax.block_until_ready(pending)
        pending, now = following, time.perf_counter()
        yield now - last
        last = now
    jax.block_until_ready(pending)
