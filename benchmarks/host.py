"""What a step costs the host: `python -m benchmarks.host`.

The state is that of a real program, of about 500 leaves, and the step does next to nothing on the device, so
that what is measured is Python and dispatch alone.
"""

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from artifacts.metrics import MetricsLog
from artifacts.tensorboard import TensorBoard
from benchmarks.measure import summary, write_result
from common.host import keep_freed_memory
from data.loading.loader import Prefetcher
from models.config import ModelConfig
from optim.config import AdamWConfig, ConstantConfig
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from training.config import Config, TrainingConfig
from training.device_batches import placing, rows_here
from training.flops import training_flops
from training.program import Program, build_program
from training.progress import Progress
from training.recorder import Recorder
from training.state import TrainState, shardings
from training.step import BATCH_DTYPES, FlatStep, compile_train_step

PLACES = 24  # layers of one period: their parameters are not stacked, so that there are many leaves
PAUSE = 0.005  # seconds, of a short step
WARM = 20  # iterations that are not counted


class Repeated:
    """A loader whose batches cost nothing."""

    def __init__(self, rows: int, length: int):
        self.one = {name: np.ones((rows, length), dtype) for name, dtype in BATCH_DTYPES.items()}

    def batch(self, step: int, rows: Any = None) -> dict[str, np.ndarray]:
        """The same again."""
        return self.one

    def state(self) -> dict[str, Any]:
        """Where it stands: nowhere."""
        return {}


def many_leaves() -> Program:
    """A tiny model of many parameters, AdamW, on one device."""
    model = ModelConfig(
        vocab_size=128,
        num_layers=2 * PLACES,  # twice, or the period would be cut into runs
        d_model=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        d_ff=8,
        window=8,
        window_pattern=["local"] * (PLACES - 1) + ["global"],
    )
    config = Config(
        model=model,
        mesh=MeshConfig(),
        optim=AdamWConfig(),
        schedule=ConstantConfig(),
        training=TrainingConfig(global_batch_size=8),
    )
    config.data.seq_len = 256
    return build_program(config, build_layout(config.mesh, jax.devices()[:1]))


def next_to_nothing(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
    """A step that counts, and reports as steps do."""
    one = jnp.ones((), jnp.float32)
    metrics = {"loss": one, "grad_norm": one, "learning_rate": one, "tokens": jnp.sum(batch["loss_weights"])}
    return state.replace(step=state.step + 1), metrics


def zeros(program: Program) -> TrainState:
    """A state in the memory of the device, every leaf its own."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), program.state
    )


def nested(program: Program) -> Any:
    """The step compiled over the state's tree, as it would be without `FlatStep`."""
    placed = shardings(program.state)
    jitted = jax.jit(
        next_to_nothing,
        in_shardings=(placed, shardings(program.batch)),
        out_shardings=(placed, program.layout.replicated()),
        donate_argnums=0,
    )
    return jitted.lower(program.state, program.batch).compile()


def time_each(call: Callable[[], Any], count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a call until it returns, the device done and idle before each.

    Back to back the caches of the core are warm, as in no real run; after a pause others have used them.
    """
    found = {}
    for name, pause in (("back to back", 0.0), ("after a pause", PAUSE)):
        samples = []
        for _ in range(count + WARM):
            start = time.perf_counter()
            pending = call()
            samples.append(1e3 * (time.perf_counter() - start))
            jax.block_until_ready(pending)
            time.sleep(pause)
        found[name] = summary(samples[WARM:])
    return found


def dispatch(step: Callable[..., Any], carried: Any, batch: Any, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds until the call of a step returns."""

    def call() -> Any:
        nonlocal carried
        carried, metrics = step(carried, batch)
        return metrics

    return time_each(call, count)


def iteration(program: Program, step: FlatStep, count: int, stack: ExitStack) -> dict[str, Any]:
    """Milliseconds of the loop's body: the batch, the call, and the row of the step before, written."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    log = MetricsLog.open(directory / "metrics.jsonl")
    stack.callback(log.close)
    board = TensorBoard(directory / "tensorboard")
    stack.callback(board.close)
    progress = Progress(10**6, console=Console(file=io.StringIO()))
    flops = training_flops(program.model.flops_per_token(256), peak_per_device=1e12, num_devices=1)
    recorder = Recorder(log, flops, progress, board, tokens=0, every=20)
    rows = rows_here(program.batch)
    loader: Any = Repeated(len(rows), 256)
    feed = Prefetcher(loader, start=0, depth=2, rows=rows, place=placing(program.batch, rows))
    stack.callback(feed.close)
    leaves, number = step.leaves_of(zeros(program)), 0

    def call() -> Any:
        nonlocal leaves, number
        number += 1
        batch, wait, _ = feed.next()
        leaves, metrics = step.on_leaves(leaves, batch)
        recorder.push(number, metrics, wait)
        return metrics

    return time_each(call, count)


def measure(count: int = 300) -> tuple[int, dict[str, Any]]:
    """The number of leaves, and summaries in milliseconds of each part."""
    program = many_leaves()
    replicated = program.layout.replicated()
    step = compile_train_step(next_to_nothing, program.state, program.batch, replicated, {})
    placed = placing(program.batch, rows_here(program.batch))(Repeated(8, 256).one)
    with ExitStack() as stack:
        return len(jax.tree.leaves(program.state)), {
            "the call of a step over flat leaves": dispatch(
                step.on_leaves, step.leaves_of(zeros(program)), placed, count
            ),
            "the same over the state's tree": dispatch(nested(program), zeros(program), placed, count),
            "one iteration of the loop, all of it": iteration(program, step, count, stack),
        }


def main() -> None:
    """Measure, print and keep."""
    leaves, found = measure()
    table = [
        {"milliseconds of": name, "caches": when, "leaves": leaves, **figures}
        for name, kinds in found.items()
        for when, figures in kinds.items()
    ]
    path = write_result("host", {"title": "Host time of a step", "table": table})
    for name, kinds in found.items():
        for when, ms in kinds.items():
            print(f"{name:36} {when:14} {ms['median']:.3f} ms ({ms['q1']:.3f} to {ms['q3']:.3f})")
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    main()
