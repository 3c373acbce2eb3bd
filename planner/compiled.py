"""The real train step, compiled for devices that need not be here, and what the program says of itself.

`train.py` compiles the same: `build_program(config, layout).compile_train()`. Only the devices differ, which
are described (`planner.described_devices`), and for GPUs the options that take the place of kernels chosen by
timing.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import jax

from common.text import GIB
from kernels.grouped_experts import block_size
from parallel.hardware import Machine
from parallel.mesh import build_layout
from planner.described_devices import compiler_options, described_devices, quiet
from planner.hlo.kernel_names import kernels_of
from planner.hlo.program import Reading, read_hlo
from planner.hlo.text import Instruction, shapes
from planner.work import StepCost, Traffic
from training.config import Config
from training.flops import training_flops
from training.preflight import bytes_on_device, memory_of
from training.program import Program, build_program

AMOUNT = r"([\d.]+[KMGT]?)"


@dataclass(frozen=True)
class Compiled:
    """A step that was compiled for described devices, and what was read in it."""

    work: StepCost
    program: Program
    reading: Reading
    compile_seconds: float


class DoesNotFit(ValueError):
    """What a compiler says that refuses a program for its memory: TPUs' do, GPUs' only count.

    needed: bytes on one device in all; limit: that the compiler takes a device to have.
    """

    def __init__(self, needed: int, limit: int, name: str):
        self.needed, self.limit, self.name = needed, limit, name
        super().__init__(
            f"the compiler refuses the step: it needs {needed / GIB:.2f} GiB of the {limit / GIB:.2f} GiB of "
            f"a {name}; training.remat=full, more training.accumulation_steps or mesh.fsdp need less"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made anew from its words alone, and a search's processes send theirs home.
        return type(self), (self.needed, self.limit, self.name)


def compile_step(config: Config, machine: Machine, devices: Sequence[Any] | None = None) -> Compiled:
    """Compile for the machine's devices, or for these. config: with its vocabulary known.

    Raises ImportError, with the install command, where the compiler for these devices is missing, ValueError
    for a config that cannot run on them, and DoesNotFit, which is one, where the compiler itself refuses it.
    """
    if devices is None:
        devices = described_devices(machine.name, machine.topology)
    program = planned_program(config, devices)
    began = time.perf_counter()
    with quiet():
        try:
            step = program.compile_train()
        except jax.errors.JaxRuntimeError as error:
            raise refused(str(error), program, machine.name) or error from None
    seconds = time.perf_counter() - began
    mesh = dict(program.layout.mesh.shape)
    reading = read_hlo(step.as_text() or "", mesh, trips=even_load(config))
    work = work_of(program, reading, step.memory_analysis(), machine)
    return Compiled(work, program, reading, seconds)


def planned_program(config: Config, devices: Sequence[Any]) -> Program:
    """The program of `train.py` on these devices, and what compiling it takes where they are described."""
    program = build_program(config, build_layout(config.mesh, devices))
    options = {**program.compiler_options, **compiler_options(list(devices))}
    return replace(program, compiler_options=options)


def refused(message: str, program: Program, name: str) -> DoesNotFit | None:
    """A compiler's error as ours, where it is about the device's memory, and says how much of it is needed.

    XLA says `HLO temporaries (250.48G) exceeds available HBM (15.75G)`, to which comes what the step is
    given, or `Used 41.9G of 15.7G hbm`, which has both.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    if found := re.search(rf"temporaries \({AMOUNT}\) exceeds available HBM \({AMOUNT}\)", message):
        given = bytes_on_device((program.state, program.batch))
        return DoesNotFit(_bytes(found[1]) + given, _bytes(found[2]), name)
    found = re.search(rf"Used {AMOUNT} of {AMOUNT} hbm", message)
    return DoesNotFit(_bytes(found[1]), _bytes(found[2]), name) if found else None


def _bytes(text: str) -> int:
    """Of `15.75G`, as XLA writes it."""
    number, unit = (text[:-1], text[-1]) if text[-1] in "KMGT" else (text, "")
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def even_load(config: Config) -> Callable[[Instruction], int | None]:
    """How often the loop over blocks of experts runs, where every expert is chosen alike.

    What a router chooses is in the data, so the program's own text cannot tell. The loop's state can, how
    many choices [n*k] and experts [E here, ...] a device has to do with: an even share of an expert is a
    part n*k / E of them, in blocks that are computed whole.
    """
    moe = config.model.moe

    def trips(loop: Instruction) -> int | None:
        arrays = shapes(loop.type)
        choices = [sizes[0] for kind, sizes in arrays if kind == "s32" and len(sizes) == 1]
        weights = [sizes[0] for kind, sizes in arrays if kind in ("bf16", "f32") and len(sizes) >= 3]
        if moe is None or "/mlp/" not in loop.source or not choices or not weights:
            return None
        here, share = weights[-1], max(choices) / moe.num_experts
        return int(here * math.ceil(share / block_size(max(choices), here)))

    return trips


def work_of(program: Program, reading: Reading, analysis: Any, machine: Machine) -> StepCost:
    """What the compiler's program and its account of memory say."""
    return StepCost(
        how="compiled",
        memory=memory_of(program.state, program.batch, analysis.temp_size_in_bytes),
        flops=flops_of(reading, machine),
        moved_bytes=float(reading.moved_bytes),
        traffic=tuple(
            Traffic(kind, axes, times, size) for (kind, axes), (times, size) in reading.totals().items()
        ),
        kernels=kernels_of(reading.custom_calls, reading.kernels),
    )


def flops_of(reading: Reading, machine: Machine) -> dict[str, float]:
    """Of products and attention, by the units that do them.

    GPUs multiply float32 in TF32, at half the rate; TPUs round it to bfloat16; on a CPU everything is
    float32. A device without units for fp8 or int8 multiplies what these stand for.
    """
    counted: Counter[str] = Counter({"bfloat16": reading.attention})
    for kind, count in reading.products.items():
        counted[precision_of(kind, machine)] += count
    if machine.kind == "cpu":
        counted = Counter({"float32": counted.total()})
    return {name: float(count) for name, count in sorted(counted.items()) if count}


def precision_of(kind: str, machine: Machine) -> str:
    """A key of `machine.flops` for products of an element type of XLA's: bf16, f8e4m3fn, s8, f32."""
    if kind in ("f32", "f64"):
        return "bfloat16" if machine.kind == "tpu" else "float32"
    name = "fp8" if kind.startswith("f8") else "int8" if kind in ("s8", "u8") else "bfloat16"
    return name if name in machine.flops else "bfloat16"


def compiler_name(kind: str) -> str:
    """The package that compiles for devices of a kind, with its version."""
    package = "libtpu" if kind == "tpu" else "jaxlib"
    return f"{package} {version(package)}"


def model_flops(model: Any, seq_len: int) -> Mapping[str, float]:
    """`causal` and `full`, that the model needs for a token, forward and backward."""
    flops = training_flops(model.flops_per_token(seq_len), peak_per_device=1.0, num_devices=1)
    return {"causal": flops.causal, "full": flops.full}
