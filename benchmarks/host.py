"""What a step costs the host: `python -m benchmarks.host`.

The state is that of a real program, of about 500 leaves, and the step does next to nothing on the device, so
that what is measured is Python and dispatch alone.
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from benchmarks.measure import arguments, publish, summary
from benchmarks.workload import build, compose_config
from common.host import keep_freed_memory
from data.batch import TEXT
from data.loading.prefetch import Prefetcher
from training.device_batches import placing, rows_here
from training.flops import training_flops
from training.program import Program
from training.progress import Progress
from training.recorder import Recorder
from training.state import TrainState, shardings
from training.step import FlatStep, compile_train_step

LAYERS = 24  # of one period: their parameters are not stacked, so that there are many leaves
ROWS, SEQ_LEN = 8, 256
MODEL = (
    *("+experiment=debug", "mesh=single", "optim=adamw", f"data.seq_len={SEQ_LEN}"),
    *(f"training.global_batch_size={ROWS}", "model.vocab_size=384", f"model.num_layers={LAYERS}"),
    *("model.d_model=8", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=8", "model.d_ff=8"),
    *("model.window=8", f"model.window_pattern=[{'local,' * (LAYERS - 1)}global]"),
)
PAUSE = 0.005  # seconds, of a short step
WARM = 20  # iterations that are not counted


class Repeated:
    """A loader whose batches cost nothing."""

    one = {name: np.ones((ROWS, SEQ_LEN), dtype) for name, (dtype, _) in TEXT.items()}

    def batch(self, step: int, rows: Any = None) -> dict[str, np.ndarray]:
        """The same batch at every step."""
        return self.one

    def state(self) -> dict[str, Any]:
        """Where it stands, which is nowhere."""
        return {}


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


def iteration(program: Program, step: FlatStep, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the loop's body: the batch, the call, and the row of the step before, written."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = MetricsLog.open(directory / "metrics.jsonl")
        stack.callback(log.close)
        board = TensorBoard(directory / "tensorboard")
        stack.callback(board.close)
        progress = Progress(10**6, console=Console(file=io.StringIO()))
        flops = training_flops(program.model.flops_per_token(SEQ_LEN), peak_per_device=1e12, num_devices=1)
        recorder = Recorder(log, flops, progress, board, tokens=0, every=20)
        rows, loader = rows_here(program.batch), Repeated()
        place = placing(program.batch, rows)
        feed = Prefetcher(loader, start=0, depth=2, rows=rows, place=place)  # type: ignore[arg-type]
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


def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    asked = arguments("host", __doc__, "host", calls=(300, "that are timed of each kind")).parse_args(argv)
    program = build(compose_config(*MODEL), jax.devices()[:1])
    replicated = program.layout.replicated()
    step = compile_train_step(next_to_nothing, program.state, program.batch, replicated, {})
    batch, count = placing(program.batch, rows_here(program.batch))(Repeated.one), asked.calls
    found = {
        "the call of a step over flat leaves": dispatch(
            step.on_leaves, step.leaves_of(zeros(program)), batch, count
        ),
        "the same over the state's tree": dispatch(nested(program), zeros(program), batch, count),
        "one iteration of the loop, all of it": iteration(program, step, count),
    }
    leaves = len(jax.tree.leaves(program.state))
    table = [
        {"milliseconds of": name, "caches": when, "leaves": leaves, **figures}
        for name, kinds in found.items()
        for when, figures in kinds.items()
    ]
    publish({"title": "Host time of a step", "table": table}, asked)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(sys.argv[1:]))
