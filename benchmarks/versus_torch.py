"""The same training step in JAX and in PyTorch, side by side: same architecture, same weights, same tokens.

    make torch-env                                     # PyTorch in an environment of its own, once
    python -m benchmarks.versus_torch                  # an 11M Llama, 4096 tokens a step: for CPUs
    python -m benchmarks.versus_torch --shape 1.34b --variants jax:bfloat16,compile:bfloat16
    python -m benchmarks.versus_torch training.scan_layers=true    # any override of train.py

A worker process per variant compiles and warms up, then all are asked in turn for a few steps at a time and
lie idle in between, so that whatever slows the machine slows them all; ratios are taken round by round. Rows
are one document each (PyTorch's `is_causal`), so that both sides do the same work; neither reads data.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import measure
from benchmarks.measure import GIB, ROOT
from common.errors import RunFault

TORCH_PYTHON = "CAMBRIAN_TORCH_PYTHON"
COMMON = (
    "run.name=versus",
    "model=quickstart",
    "tokenizer=byte",  # which is smaller than any vocabulary; there is no text here
    "model.zero_init=false",
    "mesh=single",
    "optim=adamw",
    "schedule=cosine",
    "training.num_steps=10000",
    "run.compile_cache=null",
)


SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size")


def _llama(sizes: tuple[int, ...], length: int, rows: int) -> tuple[str, ...]:
    model = [f"model.{key}={value}" for key, value in zip(SIZES, sizes, strict=True)]
    return (
        *model,
        f"data.seq_len={length}",
        f"training.global_batch_size={rows}",
        "training.scan_layers=false",
    )


_GPU = ("training.attention=cudnn", "training.max_documents=1", "training.loss_chunk=8192")
SHAPES = {
    "cpu": _llama((6, 384, 6, 2, 64, 1024, 4096), 256, 16),
    "124m": (*_llama((12, 768, 12, 12, 64, 2048, 50304), 1024, 32), *_GPU),
    "1.34b": (*_llama((24, 2048, 16, 16, 128, 5632, 50304), 2048, 8), "training.remat=dots", *_GPU),
}
VARIANTS = tuple(
    f"{side}:{precision}" for precision in ("float32", "bfloat16") for side in ("jax", "eager", "compile")
)


class Peer:
    """A process that says when it is ready, and answers each line with a line of JSON."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]):
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self.introduction = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RunFault(f"the worker of {self.name} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise RunFault(f"the worker of {self.name} is gone, status {self.process.wait()}") from error
        return self._answer()

    def close(self) -> None:
        """Let it end: it does when nothing more can come."""
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Worker(Peer):
    """One side of the step, by its variant."""

    def __init__(self, variant: str, command: Sequence[str], environment: dict[str, str]):
        super().__init__(variant, command, environment)
        self.losses: list[float] = []
        self.bytes = 0

    def run(self, steps: int) -> float:
        """Mean seconds of so many further steps."""
        answer = self.ask(str(steps))
        self.losses += answer["losses"]
        self.bytes = answer["bytes"]
        return float(answer["seconds"])


def torch_python(asked: str | None = None) -> Path:
    """The Python that has PyTorch: `asked`, $CAMBRIAN_TORCH_PYTHON or .venv-torch's. ValueError if absent."""
    path = Path(asked or os.environ.get(TORCH_PYTHON) or ROOT / ".venv-torch" / "bin" / "python")
    if not path.exists():
        raise ValueError(
            f"no Python with PyTorch at {os.path.relpath(path)}; run `make torch-env`, or name one by "
            f"--torch-python or {TORCH_PYTHON}"
        )
    return path.absolute()


def torch_command(python: Path, job: Path, mode: str, precision: str, threads: int) -> list[str]:
    """The command that starts PyTorch's side. -P: our file names must not stand in the way of its imports."""
    return [
        str(python),
        "-P",
        str(ROOT / "benchmarks/torch_baseline.py"),
        str(job),
        mode,
        precision,
        str(threads),
    ]


def jax_command(*words: str) -> list[str]:
    """The command that starts our side."""
    return [sys.executable, "-m", "benchmarks.jax_worker", *words]


def environment(threads: int) -> dict[str, str]:
    """Variables of the workers: as many threads as asked; no GPU memory is taken before it is needed."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return os.environ | shared | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def start(variant: str, job: Path, overrides: Sequence[str], asked: argparse.Namespace) -> Worker:
    """A worker by its variant, `jax:PRECISION`, `eager:PRECISION` or `compile:PRECISION`."""
    side, _, precision = variant.partition(":")
    if side == "jax":
        words = ("serve", str(job), str(asked.threads), *overrides, f"training.precision={precision}")
        command = jax_command(*words)
    else:
        command = torch_command(torch_python(asked.torch_python), job, side, precision, asked.threads)
    print(f"starting {variant}", file=sys.stderr)
    return Worker(variant, command, environment(asked.threads))


def compare(overrides: Sequence[str], asked: argparse.Namespace) -> dict[str, Any]:
    """The result of all variants, asked in turn. Raises ValueError or RunFault where one cannot be run."""
    workers: dict[str, Worker] = {}
    with TemporaryDirectory() as directory:
        job = Path(directory)
        on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(jax_command("export", directory, *overrides), check=True, cwd=ROOT, env=on_cpu)
        try:
            for variant in asked.variants:
                workers[variant] = start(variant, job, overrides, asked)
                workers[variant].run(asked.warmup)  # compiles, and takes memory
            cases = {variant: partial(worker.run, asked.steps) for variant, worker in workers.items()}
            samples = measure.alternate(cases, asked.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    return result(workers, samples, asked, overrides)


def result(
    workers: dict[str, Worker],
    samples: dict[str, list[float]],
    asked: argparse.Namespace,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Everything that was learnt, as `measure.write_result` takes it."""
    introductions = {variant: worker.introduction for variant, worker in workers.items()}
    work = next(said for variant, said in introductions.items() if variant.startswith("jax:"))
    tokens = work["rows"] * work["seq_len"]
    machine = measure.describe_machine() | {"devices": work["device"]}
    versions = [said["version"] for said in introductions.values() if "version" in said]
    machine["versions"] |= {"torch": versions[0]} if versions else {}
    return {
        "title": f"JAX and PyTorch: {work['parameters'] / 1e6:.4g}M parameters, {tokens} tokens a step",
        "benchmark": "versus_torch",
        "machine": machine,
        "workload": {
            "shape": asked.shape,
            "overrides": list(overrides),
            "packed": False,
            "tokens_per_step": tokens,
        },
        "measurement": {"rounds": asked.rounds, "steps": asked.steps, "threads": asked.threads},
        "introductions": introductions,
        "step_seconds": {variant: measure.summary(values) for variant, values in samples.items()},
        "samples": samples,
        "losses": {variant: worker.losses for variant, worker in workers.items()},
        "ratios": ratios(samples),
        "table": [row(worker, samples, work, tokens) for worker in workers.values()],
    }


def ratios(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times faster ours is than PyTorch's in the same precision; fp8 and int8 than our bfloat16."""
    pairs = [(f"jax:{p}", v) for v in samples for side, _, p in (v.partition(":"),) if side != "jax"]
    pairs += [(f"jax:{precision}", "jax:bfloat16") for precision in ("fp8", "int8")]
    pairs = [pair for pair in pairs if samples.keys() >= set(pair)]
    return {f"{ours} / {theirs}": measure.ratio(samples[ours], samples[theirs]) for ours, theirs in pairs}


def row(worker: Worker, samples: dict[str, list[float]], work: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The table's row of a variant; ratios are ours over PyTorch's speed, so they stand in our rows."""
    seconds = measure.summary(samples[worker.name])
    found = ratios(samples)
    flops, precision = work["flops_per_token"], worker.name.partition(":")[2]
    rate = tokens / seconds["median"]

    def over(side: str) -> str | None:
        times = found.get(f"{worker.name} / {side}:{precision}")
        return measure.with_quartiles(times) if times else None

    names = {"eager": "torch eager", "compile": "torch.compile"}
    side = worker.name.partition(":")[0]
    return {
        "variant": f"{names.get(side, side)} {precision}",
        "step, ms": seconds["median"] * 1e3,
        "fastest, ms": seconds["min"] * 1e3,
        "quartiles, ms": measure.quartiles(seconds, 1e3),
        "tokens/s": rate,
        "TFLOP/s (full attention)": 3 * (flops["matmul"] + flops["attention_full"]) * rate / 1e12,
        "over torch eager": over("eager"),
        "over torch.compile": over("compile"),
        "memory, GiB": worker.bytes / GIB,
        "last loss": worker.losses[-1],
    }


def arguments() -> argparse.ArgumentParser:
    """The flags that stand beside overrides of train.py."""
    parser = measure.arguments(
        "versus_torch",
        __doc__,
        "versus_torch",
        variants=(",".join(VARIANTS), "SIDE:PRECISION, comma-separated"),
        rounds=(15, "times that each is asked"),
        steps=(3, "steps each time"),
        warmup=(3, "steps before the first round"),
        threads=(2, "of each side; 0: as many as there are"),
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="what is trained")
    parser.add_argument("--torch-python", default=None, help=f"or {TORCH_PYTHON}, or .venv-torch")
    return parser


def check_variants(text: str) -> list[str]:
    """The variants of a comma-separated list. Raises ValueError for what is none."""
    variants = text.split(",")
    for variant in variants:
        if variant.partition(":")[0] not in ("jax", "eager", "compile") or ":" not in variant:
            raise ValueError(
                f"--variants: {variant} is none; use SIDE:PRECISION such as {', '.join(VARIANTS)}"
            )
    if not any(variant.startswith("jax:") for variant in variants):
        raise ValueError(f"--variants={text} has nothing of ours; add jax:float32 or jax:bfloat16")
    return variants


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Compare, print and write; the exit status."""
    asked, overrides = arguments().parse_known_args(argv)
    asked.variants = check_variants(asked.variants)
    if any(not variant.startswith("jax:") for variant in asked.variants):
        torch_python(asked.torch_python)  # before anything is compiled
    measure.publish(compare((*COMMON, *SHAPES[asked.shape], *overrides), asked), asked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
