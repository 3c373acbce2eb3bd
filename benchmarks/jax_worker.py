"""Our side of `benchmarks/versus_torch.py`: writes down a job that both sides can read, and serves its steps.

    python -m benchmarks.jax_worker export JOB OVERRIDES...    # job.json and arrays.npz into JOB
    python -m benchmarks.jax_worker serve JOB THREADS OVERRIDES...

Serving is as in `benchmarks/torch_baseline.py`: a line of JSON when ready; then, for each number of steps
that is read, a line with their mean seconds and their losses.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.workload import Workload, batch_of, build, token_stream, with_batches
from common.host import keep_freed_memory
from configs.cli import main
from models.config import ModelConfig
from models.rope import rope_frequencies
from models.spec import make_segments
from models.transformer import build_model
from optim.schedules import make_schedule
from training.config import Config, with_vocab
from training.flops import peak_flops

SHARED = (
    *("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size"),
    *("norm_eps", "tie_embeddings"),
)
# Further fields that may differ from Llama's: they act on the initial weights or the frequencies, which are
# exported, or on nothing that is computed here.
FREE = ("name", "max_seq_len", "zero_init", "init_std", "rope_theta", "rope_scaling")
BATCHES = 8


def check_comparable(config: Config) -> None:
    """Raise ValueError for what the PyTorch baseline does not have."""
    plain = ModelConfig()
    for field in fields(ModelConfig):
        value, default = getattr(config.model, field.name), getattr(plain, field.name)
        if field.name not in SHARED + FREE and value != default:
            raise ValueError(
                f"model.{field.name}={value} is not in the PyTorch baseline; use model.{field.name}={default}"
            )
    training, scaling = config.training, config.model.rope_scaling
    for key, value, needed in (
        ("model.rope_scaling.kind", scaling is not None and scaling.amplitude != 1.0, "linear or llama3"),
        ("optim.name", config.optim.name != "adamw", "adamw"),
        ("training.z_loss", training.z_loss != 0, "0"),
        ("training.ema_decay", training.ema_decay is not None, "null"),
        ("training.accumulation_steps", training.accumulation_steps != 1, "1"),
    ):
        if value:
            raise ValueError(f"{key} must be {needed}: the PyTorch baseline has nothing else")


def export(config: Config, directory: Path, *, batches: int = BATCHES) -> None:
    """Write job.json and arrays.npz: sizes, optimizer, learning rates; initial weights, tokens, frequencies.

    Tokens are [batches, B, T + 1], rows of one document each. Raises ValueError for what has no counterpart.
    """
    check_comparable(config)
    config = with_vocab(config)
    (segment,) = make_segments(config.model)
    frequencies, _ = rope_frequencies(config.model, segment.period[0])
    schedule = make_schedule(config.schedule, num_steps=config.training.num_steps)
    optim = asdict(config.optim)
    job = {
        "model": {key: getattr(config.model, key) for key in SHARED},
        "optim": {key: optim[key] for key in ("b1", "b2", "eps", "weight_decay", "grad_clip")},
        "learning_rates": [
            config.optim.learning_rate * float(schedule(count)) for count in range(config.training.num_steps)
        ],
    }
    (directory / "job.json").write_text(json.dumps(job), "utf-8")
    sizes = (config.training.global_batch_size, config.data.seq_len, config.model.vocab_size)
    arrays: dict[str, Any] = {
        "tokens": np.stack([token_stream(np.random.default_rng(seed), *sizes) for seed in range(batches)]),
        "frequencies": frequencies,
        **initial_weights(config),
    }
    np.savez(directory / "arrays.npz", **arrays)


def initial_weights(config: Config) -> dict[str, np.ndarray]:
    """Every parameter at step 0 by its path, `segments/0/0/attention/q` and so on."""
    params = jax.jit(build_model(config.model).init)(jax.random.key(config.seed))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def load(config: Config, tokens: np.ndarray, devices: Sequence[Any] | None = None) -> Workload:
    """The compiled step of a config on the tokens of a job."""
    return with_batches(build(config, devices), config.seed, [batch_of(rows) for rows in tokens])


def serve(config: Config, directory: Path) -> int:
    """Answer on stdout until stdin ends."""
    answer = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    with np.load(directory / "arrays.npz") as arrays:
        work = load(config, arrays["tokens"])
    print(json.dumps(introduction(config, work)), file=answer)
    for line in sys.stdin:
        start = time.perf_counter()
        losses = work.losses(int(line))
        seconds = (time.perf_counter() - start) / len(losses)
        used = work.device_bytes() or measure.peak_memory()
        print(json.dumps({"seconds": seconds, "losses": losses, "bytes": used}), file=answer)
    return 0


def introduction(config: Config, work: Workload) -> dict[str, Any]:
    """What the driver, which has no JAX, has to know of the job."""
    peak, source = peak_flops(config.hardware, work.device.platform, work.device.device_kind)
    return {
        "ready": True,
        "compile_seconds": work.compile_seconds,
        "device": f"{work.program.layout.mesh.size} x {work.device.device_kind}",
        "attention": config.training.attention,
        "parameters": work.program.model.num_params()["total"],
        "rows": config.training.global_batch_size,
        "seq_len": config.data.seq_len,
        "flops_per_token": work.program.model.flops_per_token(config.data.seq_len),
        "peak_flops": peak,
        "peak_source": source,
    }


def run(argv: Sequence[str]) -> int:
    """Export a job or serve its steps; the exit status."""
    what, directory, *rest = argv
    if what == "export":

        def task(config: Config) -> int:
            export(config, Path(directory))
            return 0

        return main(task, rest, script="python -m benchmarks.jax_worker export JOB")
    threads, *overrides = rest
    measure.use_cores(int(threads))
    return main(lambda config: serve(config, Path(directory)), overrides)


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(run(sys.argv[1:]))
