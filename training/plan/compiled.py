"""The real train step, compiled for devices that need not be here, and what the program says of itself.

`train.py` compiles the same: `build_program(config, layout).compile_train()`. Only the devices differ, which
are described (`parallel.described`), and for GPUs the options that take the place of kernels chosen by
timing.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from parallel.described import compiler_options, described_devices
from parallel.hardware import Machine
from parallel.hlo import Reading, read_hlo
from parallel.mesh import build_layout
from training.plan.work import Memory, Traffic, Work
from training.program import Program, build_program, padded_vocab
from training.state import TrainState


@dataclass(frozen=True)
class Compiled:
    """A step that was compiled for described devices, and what was read in it."""

    work: Work
    program: Program
    reading: Reading
    compile_seconds: float


def with_vocabulary(config: Any) -> Any:
    """The config with `model.vocab_size` known: the tokenizer's, as far as the config says it.

    Raises ValueError where it is only in the tokenizer's file.
    """
    if config.model.vocab_size != -1:
        return config
    size = {"bpe": config.tokenizer.vocab_size, "byte": 257}.get(config.tokenizer.kind)
    if size is None:
        raise ValueError(
            f"model.vocab_size=-1 is that of tokenizer.kind={config.tokenizer.kind}, which a plan does not "
            "open; give model.vocab_size"
        )
    return replace(config, model=replace(config.model, vocab_size=padded_vocab(size)))


def compile_step(config: Any, machine: Machine, devices: Sequence[Any] | None = None) -> Compiled:
    """Compile for the machine's devices, or for these. config: with its vocabulary known.

    Raises ImportError, with the install command, where the compiler for these devices is missing, and
    ValueError for a config that cannot run on them.
    """
    if devices is None:
        devices = described_devices(machine.name, machine.topology)
    program = build_program(config, build_layout(config.mesh, devices))
    options = {**program.compiler_options, **compiler_options(list(devices))}
    began = time.perf_counter()
    step = replace(program, compiler_options=options).compile_train()
    seconds = time.perf_counter() - began
    mesh = dict(program.layout.mesh.shape)
    reading = read_hlo(step.as_text() or "", mesh)
    return Compiled(work_of(config, program, reading, step.memory_analysis()), program, reading, seconds)


def work_of(config: Any, program: Program, reading: Reading, analysis: Any) -> Work:
    """What the compiler's program and its account of memory say."""
    memory = memory_of(program, analysis.temp_size_in_bytes)
    precision = config.training.precision if config.training.precision in ("fp8", "int8") else "bfloat16"
    traffic = tuple(
        Traffic(kind, axes, times, size) for (kind, axes), (times, size) in reading.totals().items()
    )
    return Work(
        how="compiled",
        memory=memory,
        flops={precision: float(reading.flops)},
        moved_bytes=0.0,
        traffic=traffic,
        kernels={**reading.custom_calls, **reading.kernels},
    )


def memory_of(program: Program, temporaries: int) -> Memory:
    """Classes of bytes on one device: what the step is given, and the compiler's temporaries.

    Gradients are a part of these: float32, placed like the parameters.
    """
    state: TrainState = program.state
    parameters = bytes_on_device(state.params)
    gradients = sum(4 * math.prod(shard_shape(leaf)) for leaf in jax.tree.leaves(state.params))
    return Memory(
        parameters=parameters,
        optimizer=bytes_on_device(state) - parameters,
        gradients=min(gradients, temporaries),
        batch=bytes_on_device(program.batch),
        temporaries=max(0, temporaries - gradients),
    )


def bytes_on_device(tree: Any) -> int:
    """Of an abstract tree with shardings, on any one device: all are alike."""
    return sum(np.dtype(x.dtype).itemsize * math.prod(shard_shape(x)) for x in jax.tree.leaves(tree))


def shard_shape(leaf: Any) -> Sequence[int]:
    """Of one device's part."""
    return leaf.sharding.shard_shape(leaf.shape)


def model_flops(model: Any, seq_len: int) -> Mapping[str, float]:
    """`causal` and `full`, that the model needs for a token, forward and backward."""
    per_token = model.flops_per_token(seq_len)
    return {
        "causal": 3 * (per_token["matmul"] + per_token["attention_causal"]),
        "full": 3 * (per_token["matmul"] + per_token["attention_full"]),
    }
