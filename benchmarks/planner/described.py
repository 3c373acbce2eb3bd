"""What compilers make of a real training step for devices that are not here: kernels, buffers, temporaries.

Kernels for GPUs are not timed on the way, so cuBLASLt stands where a run on the device may choose Triton.
Nothing here says how fast anything is. B rows, T positions of a row, D width of the stream, V vocabulary.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import GIB, RESULTS, as_table, versions, write_json
from benchmarks.workload import compose_config
from planner.compiled import planned_program
from planner.described_devices import described_devices
from planner.hlo.program import Buffer, Reading, read_hlo
from planner.hlo.text import shapes
from training.config import Config
from training.legal.check import check
from training.program import Program

GPU_RESULT, TPU_RESULT = RESULTS / "described_gpu.json", RESULTS / "described_tpu.json"
GPU = "h200"
SHAPES = (("bench_124m", 32, 1024), ("bench_1b", 8, 4096), ("bench_1b", 16, 2048))
FORCED = ("mesh=single", "training.attention=cudnn", "training.max_documents=1")
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
TPUS = (("v5p", "2x2x2"), ("v6e", "4x4"))
LLAMA = (
    *("+experiment=llama_1b", "model.vocab_size=128256", "data.seq_len=4096"),
    *("training.remat=dots", "training.global_batch_size=16"),
)


@dataclass(frozen=True)
class ReadStep:
    """A compiled step and what was read in it, with all its buffers."""

    program: Program
    compiled: Any
    text: str
    reading: Reading
    compile_seconds: float


def compile_and_read(config: Config, devices: list[Any]) -> ReadStep:
    """The step as a run on these devices would have it. ImportError where the compiler is missing."""
    program = planned_program(config, devices)
    began = time.perf_counter()
    compiled = program.compile_train()
    seconds = round(time.perf_counter() - began, 1)
    text = compiled.as_text() or ""
    reading = read_hlo(text, program.layout.mesh.shape, buffers=10**6)
    return ReadStep(program, compiled, text, reading, seconds)


def holding(reading: Reading, wanted: Callable[[tuple[int, ...]], bool]) -> list[Buffer]:
    """The buffers, largest first, of which some array has sizes that are wanted."""
    return [b for b in reading.buffers if any(wanted(sizes) for _, sizes in shapes(b.type))]


# -- one GPU -----------------------------------------------------------------------------------------------


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

    def row(self) -> dict[str, Any]:
        """Its row of the table in docs/precision.md."""
        scores = {None: "T = D", 0: "none"}.get(self.scores_bytes, self.scores_bytes)
        return {
            "step": f"{self.experiment}, {self.rows} x {self.seq_len}",
            "precision": self.precision,
            "attention": f"{self.attention_forward} + {self.attention_backward} in {self.layers} layers",
            "cuBLASLt": self.cublaslt + self.cublaslt_f8,
            "of these fp8": self.cublaslt_f8,
            "kernels": self.kernels,
            "logits": f"{self.logits_bytes / 1e9:.2f} GB",
            "T x T": scores,
            "temporaries": f"{self.temporary_bytes / 1e9:.1f} GB",
        }


def gpu_config(experiment: str, precision: str, rows: int, seq_len: int, *changes: str) -> Config:
    """The experiment at this size, for one GPU."""
    size = (f"training.global_batch_size={rows}", f"data.seq_len={seq_len}")
    return compose_config(
        f"+experiment={experiment}", f"training.precision={precision}", *size, *FORCED, *changes
    )


def describe_gpu(config: Config, experiment: str) -> tuple[GpuStep, Reading]:
    """What the compiler makes of a config's step for one GPU, in figures and in full."""
    step = compile_and_read(config, described_devices(GPU, 1))
    reading, calls, memory = step.reading, step.reading.custom_calls, step.compiled.memory_analysis()
    assert not reading.uncounted_loops
    model, rows, length = config.model, config.training.global_batch_size, config.data.seq_len
    # Under `training.remat=dots`: the projection behind attention, forward, in every layer.
    again = 2 * rows * length * model.num_layers * model.num_heads * model.head_dim * model.d_model
    logits = holding(reading, lambda sizes: model.vocab_size in sizes and model.d_model not in sizes)
    scores = holding(reading, lambda sizes: sizes.count(length) > 1)
    return GpuStep(
        experiment=experiment,
        precision=config.training.precision,
        rows=rows,
        seq_len=length,
        layers=model.num_layers,
        parameters=step.program.model.num_params()["total"],
        attention_forward=calls[FORWARD],
        attention_backward=calls[BACKWARD],
        cublaslt=calls["__cublas$lt$matmul"],
        cublaslt_f8=calls["__cublas$lt$matmul$f8"],
        product_flops=reading.flops,
        model_flops=round(3 * step.program.model.flops_per_token(length)["matmul"] * rows * length),
        again_flops=again,
        other_products=calls["__cublas$gemm"] + len(re.findall(r"= \S+ dot\(", step.text)),
        kernels=len(re.findall(r" (?:fusion|custom-call)\(", launched(step.text))),
        logits_bytes=max((b.bytes for b in logits), default=0),
        scores_bytes=None if length == model.d_model else max((b.bytes for b in scores), default=0),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        compile_seconds=step.compile_seconds,
    ), reading


def launched(text: str) -> str:
    """The module without the bodies of fusions: what is launched, not what is fused."""
    blocks = re.split(r"\n(?=(?:ENTRY )?%)", text)
    return "\n".join(b for b in blocks if not b.startswith(("%fused_", "%wrapped_")))


def gpu(changes: Sequence[str]) -> int:
    """Describe every shape in both precisions, a row each; without changes also the file."""
    steps = []
    for experiment, rows, seq_len in SHAPES:
        for precision in ("bfloat16", "fp8"):
            config = gpu_config(experiment, precision, rows, seq_len, *changes)
            step, reading = describe_gpu(config, experiment)
            steps.append(step)
            print(as_table([step.row()]))
            print(f"largest: {', '.join(b.type[:40] for b in reading.buffers[:3])}", flush=True)
    if not changes:
        rows_of_file = [asdict(step) for step in steps]
        write_json(GPU_RESULT, {"device": GPU, **versions(("jax", "jaxlib")), "rows": rows_of_file})
    return 0


# -- slices of TPUs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TpuStep:
    """What the compiler says of one step on one device; sizes in bytes, times in seconds.

    kernels: executions of Pallas kernels by name. quadratic: buffers with two dims of a row's length; logits:
    those that hold the vocabulary for every token of a device's rows. predicted_seconds: the compiler's own,
    None where it gives none.
    """

    hardware: str
    topology: str
    overrides: tuple[str, ...]
    devices: int
    attention: str
    why: str
    layers: int
    kernels: dict[str, int]
    quadratic: list[str]
    logits: list[str]
    largest_buffer: str
    argument_bytes: int
    temporary_bytes: int
    predicted_seconds: float | None
    compile_seconds: float

    def row(self) -> dict[str, Any]:
        """The row that is printed of it."""
        kernels = ", ".join(f"{name} {count}" for name, count in sorted(self.kernels.items()))
        return {
            "TPU": f"{self.hardware} {self.topology}",
            "attention": self.attention,
            f"kernels in {self.layers} layers": kernels,
            "T x T": len(self.quadratic),
            "B*T x V": len(self.logits),
            "temporaries, GiB": self.temporary_bytes / GIB,
            "arguments, GiB": self.argument_bytes / GIB,
            "predicted, s": self.predicted_seconds,
            "compiled in, s": self.compile_seconds,
        }


def describe_tpu(
    config: Config, devices: list[Any], hardware: str, topology: str, overrides: Sequence[str] = ()
) -> TpuStep:
    """What the compiler makes of a config, its vocabulary known, for TPUs that are not here.

    Raises ImportError, with the install command, where libtpu is missing.
    """
    step = compile_and_read(config, devices)
    memory, costs = step.compiled.memory_analysis(), step.compiled.cost_analysis() or {}
    predicted = float(costs.get("optimal_seconds", -1.0))
    model, length = config.model, config.data.seq_len
    # A position of a row, or of all query heads that share a key head.
    positions = {length, length * model.num_heads // model.num_kv_heads}
    quadratic = holding(step.reading, lambda sizes: sum(size in positions for size in sizes) > 1)
    rows = config.training.global_batch_size // step.program.layout.ways("batch")
    least = rows * length * model.vocab_size
    logits = holding(step.reading, lambda sizes: model.vocab_size in sizes and math.prod(sizes) >= least)
    return TpuStep(
        hardware=hardware,
        topology=topology,
        overrides=tuple(overrides),
        devices=len(devices),
        attention=step.program.attention.name,
        why=step.program.attention.why,
        layers=model.num_layers,
        kernels=dict(step.reading.kernels),
        quadratic=sorted({b.type for b in quadratic}),
        logits=sorted({b.type for b in logits}),
        largest_buffer=step.reading.buffers[0].type,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        predicted_seconds=predicted if predicted > 0 else None,
        compile_seconds=step.compile_seconds,
    )


def tpu(changes: Sequence[str]) -> int:
    """Describe Llama's step on every slice, a row each; without changes also the file."""
    steps = []
    for hardware, topology in TPUS:
        devices = described_devices(hardware, topology)
        config = compose_config(*LLAMA, *changes)
        check(config, len(devices))
        steps.append(describe_tpu(config, devices, hardware, topology, LLAMA))
        print(as_table([steps[-1].row()]), flush=True)
    if not changes:
        made_by = versions(("jax", "jaxlib", "libtpu"))
        write_json(TPU_RESULT, {"made_by": made_by, "rows": [asdict(step) for step in steps]})
    return 0
