"""What the planner says against what a device does: memory and seconds of a step, side by side.

    python benchmarks/predicted.py                    # 124M, 350M and 1.34B on one H200
    python benchmarks/predicted.py --hardware h100
    python benchmarks/predicted.py --hardware cpu --shapes debug,quickstart    # the same, where no GPU is

Asked of a plan: memory within 10 %, time within 25 %. The plan is made without the device, in a process of
its own that sees only CPUs; it needs the compiler of the extra plan-gpu, which `jax[cuda13]` holds. Writes
benchmarks/results/predicted_HARDWARE.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # found from a clone that was never installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from common.text import GIB

HERE = Path(__file__).resolve().parent
GPU = ("training.attention=cudnn", "training.precision=bfloat16", "mesh=single")
SHAPES: dict[str, tuple[str, ...]] = {
    "124m": ("+experiment=bench_124m", *GPU),
    "350m": (
        *("+experiment=bench_124m", "run.name=bench_350m", "model.num_layers=24", "model.d_model=1024"),
        *("model.num_heads=16", "model.num_kv_heads=16", "model.d_ff=4096", *GPU),
    ),
    "1.34b": ("+experiment=bench_1b", *GPU),
    "debug": ("+experiment=debug",),
    "quickstart": ("+experiment=quickstart",),
}
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.25


def plan(words: tuple[str, ...], hardware: str, directory: Path) -> dict[str, Any]:
    """What scripts/plan.py says of one device. Raises CalledProcessError where it refuses."""
    path = directory / "plan.json"
    # Only CPUs are seen, so that the device is as free for the measurement as if nobody had planned.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    where = [f"hardware={hardware}", "hardware.nodes=1" if hardware == "cpu" else "hardware.topology=1x1"]
    command = [
        sys.executable,
        "scripts/plan.py",
        *words,
        *where,
        "plan.compile=always",
        f"plan.output={path}",
    ]
    subprocess.run(command, cwd=HERE.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text("utf-8"))


def measured(words: tuple[str, ...], hardware: str, steps: int, directory: Path) -> dict[str, Any]:
    """What benchmarks/step.py measures. Raises CalledProcessError where it fails."""
    command = [sys.executable, str(HERE / "step.py"), *words, f"hardware={hardware}", "--steps", str(steps)]
    command += ["--unpacked", "--output", str(directory), "--name", "step"]
    subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
    return json.loads((directory / "step.json").read_text("utf-8"))


def compare(shape: str, hardware: str, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row of the table, and the machine that the step was measured on."""
    with TemporaryDirectory() as scratch:
        said = plan(SHAPES[shape], hardware, Path(scratch))
        found = measured(SHAPES[shape], hardware, steps, Path(scratch))
    seconds, used = found["step_seconds"]["median"], found["device_bytes"]
    predicted, total = said["prediction"]["step_seconds"], said["total_bytes"]
    # A CPU counts no bytes of a device: what XLA was asked for there is all that can be compared.
    of_memory = total / (used or found["argument_bytes"] + found["temporary_bytes"])
    of_time = predicted / seconds
    return {
        "shape": shape,
        "parameters, M": said["parameters"] / 1e6,
        "planned, GiB": total / GIB,
        "used, GiB": used / GIB if used else "not counted",
        "planned / used": of_memory,
        "memory within 10 %": _verdict(abs(of_memory - 1) <= MEMORY_WITHIN, known=bool(used)),
        "predicted, ms": predicted * 1e3,
        "measured, ms": seconds * 1e3,
        "predicted / measured": of_time,
        "time within 25 %": _verdict(abs(of_time - 1) <= TIME_WITHIN),
    }, found["machine"]


def _verdict(within: bool, *, known: bool = True) -> str:
    return ("yes" if within else "no") if known else "not known"


def main(argv: list[str]) -> int:
    """Every shape, a row each; 0, or 2 where the arguments or the plan are refused."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/predicted.py", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--shapes", default="124m,350m,1.34b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="directory")
    asked = parser.parse_args(argv)
    shapes = asked.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        print(f"error: --shapes={unknown[0]} is none of {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for shape in shapes:
        try:
            row, machine = compare(shape, asked.hardware, asked.steps)
        except subprocess.CalledProcessError as error:
            return error.returncode  # the process has said why
        rows.append(row)
        print(measure.as_table([row]), flush=True)
    result = {
        "benchmark": "predicted",
        "title": f"A plan against {asked.hardware}, one device",
        "machine": machine,
        "table": rows,
    }
    print(f"written: {measure.write_result(f'predicted_{asked.hardware}', result, asked.output).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
