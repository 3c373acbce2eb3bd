"""How fast is a training step here: any experiment, on whatever devices there are, without its data.

    python -m benchmarks.step +experiment=quickstart
    python -m benchmarks.step +experiment=llama_1b mesh=fsdp --steps 30 --name llama_1b

Takes every override of `train.py`. Rows are packed documents of random tokens. Time is from the end of a step
to the end of the next with one step on its way; compile time is without a cache unless --cache is given.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import measure
from benchmarks.measure import GIB
from benchmarks.peak import matmul_peak
from benchmarks.workload import Workload, prepare, step_seconds
from common.host import enough_threads, keep_freed_memory, process_began
from configs.cli import main
from training.compile_cache import start_compile_cache
from training.config import Config
from training.flops import peak_flops, training_flops


def arguments() -> argparse.ArgumentParser:
    """The flags that stand beside overrides of train.py."""
    parser = measure.arguments("step", None, None, add_help=False, steps=(20, "that are timed"))
    parser.add_argument("--unpacked", action="store_true", help="one document a row")
    parser.add_argument("--cache", action="store_true", help="compile through run.compile_cache")
    return parser


def measure_step(config: Config, asked: argparse.Namespace) -> dict[str, Any]:
    """Figures of one config: seconds a step, tokens/s, shares of both peaks, memory, compile time."""
    watch = start_compile_cache(config.run.compile_cache if asked.cache else None)
    work = prepare(config, packed=not asked.unpacked)
    jax.block_until_ready(work.run())
    first_step = time.time() - process_began()
    samples = list(step_seconds(work.run, asked.steps))
    analysis = work.compiled.memory_analysis()
    memory = {  # before the products of the peak add theirs
        "process_bytes": measure.peak_memory(),
        "device_bytes": work.device_bytes(),
        "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
        "argument_bytes": getattr(analysis, "argument_size_in_bytes", None),
    }
    dtype = work.program.ops.compute_dtype
    peak, how = matmul_peak(dtype, work.device.platform)
    result = {
        "benchmark": "step",
        "devices": work.program.layout.mesh.size,
        "parameters": work.program.model.num_params()["total"],
        "precision": str(dtype) if config.training.precision == "auto" else config.training.precision,
        "tokens_per_step": config.training.global_batch_size * config.data.seq_len,
        "step_seconds": measure.summary(samples),
        "compile_seconds": work.compile_seconds,
        "first_step_seconds": first_step,
        "cache": watch.outcome(),
        **memory,
    }
    return result | speeds(config, work, result, peak, how)


def speeds(config: Config, work: Workload, result: dict[str, Any], peak: float, how: str) -> dict[str, Any]:
    """Tokens/s and MFU: of the known peak, and of the matrix product that was timed in this process."""
    device, devices = work.device, result["devices"]
    # Forced CPU devices share the cores that the product was timed on.
    each = peak / (devices if device.platform == "cpu" else 1)
    known, source = peak_flops(config.hardware, device.platform, device.device_kind)
    per_token = work.program.model.flops_per_token(config.data.seq_len)
    rate = result["tokens_per_step"] / result["step_seconds"]["median"]
    of = {
        name: training_flops(per_token, peak_per_device=value, num_devices=devices).mfu(rate)
        for name, value in (("known", known), ("measured", each))
    }
    return {
        "tokens_per_second": rate,
        "peak": {"flops": known, "source": source, **of["known"]},
        "measured_peak": {"flops": peak, "source": how, **of["measured"]},
    }


def row(config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """The table's row of a result: speed, both shares of peak, memory, time to the first step."""
    seconds, known, measured = result["step_seconds"], result["peak"], result["measured_peak"]
    used = result["device_bytes"] or result["process_bytes"]
    return {
        "experiment": config.run.name,
        "devices": result["devices"],
        "parameters, M": result["parameters"] / 1e6,
        "precision": result["precision"],
        "tokens a step": result["tokens_per_step"],
        "step, ms": seconds["median"] * 1e3,
        "quartiles, ms": measure.quartiles(seconds, 1e3),
        "tokens/s": result["tokens_per_second"],
        "MFU causal, %": known["mfu_causal"] * 100,
        "MFU full, %": known["mfu_full"] * 100,
        "of measured matmul peak (causal), %": measured["mfu_causal"] * 100,
        "memory, GiB": used / GIB,
        "temporaries, GiB": (result["temporary_bytes"] or 0) / GIB,
        "compile, s": result["compile_seconds"],
        "first step, s": result["first_step_seconds"],
    }


def run(argv: Sequence[str]) -> int:
    """Measure and print; the exit status."""
    asked, overrides = arguments().parse_known_args(argv)

    def task(config: Config) -> int:
        result = measure_step(config, asked)
        result |= {"title": f"One step: {config.run.name}", "overrides": overrides}
        result["table"] = [row(config, result)]
        if asked.name:
            measure.publish(result, asked)
        else:
            print(measure.as_table(result["table"]))
        return 0

    return main(task, overrides, script="python -m benchmarks.step", purpose=str(__doc__))


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    enough_threads()
    sys.exit(run(sys.argv[1:]))
