"""What XLA makes of a real training step for a GPU that is not here: kernels, buffers, temporaries.

    JAX_PLATFORMS=cpu python -m benchmarks.described                      # writes results/described_gpu.json
    JAX_PLATFORMS=cpu python -m benchmarks.described training.remat=full  # other values; prints only

Needs NVIDIA's compiler (`pip install 'jax[cuda13]'`) and no GPU. Kernels are not timed on the way, so
cuBLASLt stands where a run on the device may choose Triton. Nothing here says how fast anything is.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from hydra import compose, initialize_config_dir

from configs import schema
from configs.groups import CONFIG_DIR
from configs.optional_groups import opened
from parallel.mesh import build_layout
from planner.described_devices import compiler_options, described_devices
from planner.hlo.program import Buffer, Reading, read_hlo
from planner.hlo.text import shapes
from training.config import Config
from training.program import Program, build_program

RESULTS = Path(__file__).parent / "results" / "described_gpu.json"
DEVICE = "h200"
SHAPES = (("bench_124m", 32, 1024), ("bench_1b", 8, 4096), ("bench_1b", 16, 2048))
FORCED = ("mesh=single", "training.attention=cudnn", "training.max_documents=1")
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@dataclass(frozen=True)
class GpuStep:
    """One compiled step. Counts are executions a step; buffers are results of instructions, in bytes."""

    experiment: str
    precision: str
    rows: int
    seq_len: int
    layers: int
    parameters: int
    attention_forward: int
    attention_backward: int
    cublaslt: int
    cublaslt_f8: int
    product_flops: int  # of all matrix products; attention's are not in it
    model_flops: int  # what the model needs of these: three times the forward, nothing made again
    again_flops: int  # of the products that the policy of rematerialization makes a second time
    other_products: int  # neither of both, such as cuBLAS or a product in a fusion
    kernels: int  # instructions that launch, each once however often its loop runs
    logits_bytes: int  # largest buffer with V in it that holds tokens
    scores_bytes: int | None  # largest buffer with two dims of T; None where T = D: the stream has two
    temporary_bytes: int
    argument_bytes: int
    compile_seconds: float


def compose_config(experiment: str, precision: str, rows: int, seq_len: int, *changes: str) -> Config:
    """The experiment at this size, for one GPU."""
    words = (
        f"+experiment={experiment}",
        f"training.precision={precision}",
        f"training.global_batch_size={rows}",
        f"data.seq_len={seq_len}",
        *FORCED,
        *changes,
    )
    schema.register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return schema.from_hydra(compose("config", overrides=opened(words, Config)))


def compile_for(config: Config, device: str = DEVICE) -> tuple[Program, Any]:
    """The step as a run on this device would have it, compiled. ImportError where the compiler is missing."""
    devices = described_devices(device, 1)
    program = build_program(config, build_layout(config.mesh, devices))
    options = {**program.compiler_options, **compiler_options(devices)}
    return program, replace(program, compiler_options=options).compile_train()


def describe(config: Config, experiment: str) -> tuple[GpuStep, Reading]:
    """Compile and read."""
    rows, seq_len = config.training.global_batch_size, config.data.seq_len
    start = time.perf_counter()
    program, compiled = compile_for(config)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    reading = read_hlo(text, program.layout.mesh.shape, buffers=100_000)
    assert not reading.uncounted_loops
    memory = compiled.memory_analysis()
    calls = reading.custom_calls
    return GpuStep(
        experiment=experiment,
        precision=config.training.precision,
        rows=rows,
        seq_len=seq_len,
        layers=config.model.num_layers,
        parameters=program.model.num_params()["total"],
        attention_forward=calls[FORWARD],
        attention_backward=calls[BACKWARD],
        cublaslt=calls["__cublas$lt$matmul"],
        cublaslt_f8=calls["__cublas$lt$matmul$f8"],
        product_flops=reading.flops,
        model_flops=round(3 * program.model.flops_per_token(seq_len)["matmul"] * rows * seq_len),
        again_flops=again_flops(config),
        other_products=calls["__cublas$gemm"] + len(re.findall(r"= \S+ dot\(", text)),
        kernels=len(re.findall(r" (?:fusion|custom-call)\(", entry_and_loops(text))),
        logits_bytes=largest(reading.buffers, lambda dims: is_logits(dims, config)),
        scores_bytes=scores_bytes(reading, config),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        compile_seconds=round(seconds, 1),
    ), reading


def again_flops(config: Config) -> int:
    """Under `training.remat=dots`: the projection behind attention, forward, in every layer."""
    model, tokens = config.model, config.training.global_batch_size * config.data.seq_len
    return 2 * tokens * model.num_layers * model.num_heads * model.head_dim * model.d_model


def is_logits(dims: tuple[int, ...], config: Config) -> bool:
    """Whether an array may hold a logit for each of several tokens: V, and no D."""
    sizes = (config.model.vocab_size, config.model.d_model)
    return sizes[0] in dims and sizes[1] not in dims


def scores_bytes(reading: Reading, config: Config) -> int | None:
    """Of the largest buffer that is quadratic in T; None where T is also the width of the stream."""
    if config.data.seq_len == config.model.d_model:
        return None
    return largest(reading.buffers, lambda dims: dims.count(config.data.seq_len) > 1)


def largest(buffers: list[Buffer], wanted: Any) -> int:
    """Bytes of the largest buffer that has such an array in it; 0 where there is none."""
    return max((b.bytes for b in buffers if any(wanted(dims) for _, dims in shapes(b.type))), default=0)


def entry_and_loops(text: str) -> str:
    """The module without the bodies of fusions: what is launched, not what is fused."""
    blocks = re.split(r"\n(?=(?:ENTRY )?%)", text)
    return "\n".join(b for b in blocks if not b.startswith("%fused_") and not b.startswith("%wrapped_"))


def table(rows: list[GpuStep]) -> str:
    """As Markdown."""
    heads = ("step", "precision", "attention", "cuBLASLt", "of these fp8", "kernels", "logits", "T x T")
    lines = [f"| {' | '.join(heads)} | temporaries |", "|---" * (len(heads) + 1) + "|"]
    for r in rows:
        scores = {None: "T = D", 0: "none"}.get(r.scores_bytes, r.scores_bytes)
        cells = (
            f"{r.experiment}, {r.rows} x {r.seq_len}",
            r.precision,
            f"{r.attention_forward} + {r.attention_backward} in {r.layers} layers",
            r.cublaslt + r.cublaslt_f8,
            r.cublaslt_f8,
            r.kernels,
            f"{r.logits_bytes / 1e9:.2f} GB",
            scores,
            f"{r.temporary_bytes / 1e9:.1f} GB",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Every shape in both precisions, one line each; without changes also the file."""
    changes = sys.argv[1:]
    rows = []
    for experiment, count, seq_len in SHAPES:
        for precision in ("bfloat16", "fp8"):
            config = compose_config(experiment, precision, count, seq_len, *changes)
            row, reading = describe(config, experiment)
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            print(f"  largest: {', '.join(b.type[:40] for b in reading.buffers[:3])}", flush=True)
    print(table(rows))
    if not changes:
        about = {"device": DEVICE, "jax": jax.__version__, "jaxlib": version("jaxlib")}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
