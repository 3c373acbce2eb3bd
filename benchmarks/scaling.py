"""What splitting a step over devices costs: the same work on 1, 2, 4, 8 of them, by mesh axis.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --axes data,tensor --sizes 2,4 model.num_layers=4
    python -m benchmarks.scaling --axes expert --add         # beside what was measured of the others

Devices are forced onto this machine's cores: more of them are never faster here, and wall time says little.
What is compared is processor time: of all threads, in one step, over that of one device doing the same work.
1 would be a split for nothing; above it stands what the partitioned program does in addition (copies,
repeated work, smaller matrix products, threads that wait for others by spinning). What the links would carry
is read from the compiled program, in bytes that one device holds of what is exchanged in a step.
*total*: the batch is the same on any number of devices; *per device*: it grows with them.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import measure
from common.host import enough_threads, keep_freed_memory

AXES = ("data", "fsdp", "tensor", "context", "pipeline", "expert")
MODES = ("total", "per device")
BASE = (
    *("run.name=scaling", "mesh=single", "optim=adamw", "training.precision=float32"),
    *("training.num_steps=1000", "data.seq_len=128"),
)
DENSE = (
    *("+experiment=debug", *BASE, "model.num_layers=8", "model.d_model=128", "model.num_kv_heads=8"),
    *("model.head_dim=16", "model.d_ff=384"),
)
EXPERTS = ("+experiment=debug_moe", *BASE)  # mesh.expert splits experts, so there have to be some
ROWS = 16


def overrides(axis: str, size: int, mode: str, further: Sequence[str]) -> list[str]:
    """The command line of one case; the microbatches of a pipeline are 8 on any number of stages."""
    rows = ROWS * (size if mode == "per device" else 1)
    base = EXPERTS if axis == "expert" else DENSE
    words = [*base, f"training.global_batch_size={rows}", f"mesh.{axis}={size}"]
    return [*words, *(["pipeline.microbatches=8"] if axis == "pipeline" else []), *further]


def measure_case(words: Sequence[str], size: int, steps: int) -> dict[str, Any]:
    """Processor and wall seconds of a step, and what its collectives exchange. ValueError for a bad mesh."""
    import jax

    from benchmarks.workload import compose_config, prepare
    from planner.hlo.program import read_hlo

    work = prepare(compose_config(*words), packed=True, devices=jax.devices()[:size])
    work.losses(1)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):  # each waited for: eight devices on two cores cannot be in two steps at once
        work.losses(1)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    reading = read_hlo(work.compiled.as_text(), dict(work.program.layout.mesh.shape))
    totals = reading.totals()
    return {
        "cpu_seconds": cpu / steps,
        "wall_seconds": wall / steps,
        "collective_bytes": sum(count for _, count in totals.values()),
        "collectives": {f"{kind} {'+'.join(axes)}": count for (kind, axes), (_, count) in totals.items()},
    }


def cases(asked: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """(axis, devices, mode) of all cases; one device has one mode."""
    for axis in asked.axes.split(","):
        yield axis, 1, "total"
        for size in map(int, asked.sizes.split(",")):
            for mode in MODES:
                yield axis, size, mode


def measure_scaling(asked: argparse.Namespace, further: Sequence[str]) -> dict[str, Any]:
    """The result: every case, over one device that does the same work."""
    found = kept_cases(asked, further) if asked.add else []
    one: dict[str, float] = {}
    for axis, size, mode in cases(asked):
        figures = measure_case(overrides(axis, size, mode, further), size, asked.steps)
        if size == 1:
            one[axis] = figures["cpu_seconds"]
        work = size if mode == "per device" else 1
        times = figures["cpu_seconds"] / (one[axis] * work)
        found.append({"axis": axis, "devices": size, "mode": mode, "over_one_device": times, **figures})
        print(f"{axis} {size} {mode}: {times:.2f}", file=sys.stderr)
    return {
        "title": "The cost of splitting a step, on devices forced onto one machine's cores",
        "benchmark": "scaling",
        "workload": workload(further),
        "measurement": {"steps": asked.steps},
        "cases": found,
        "table": [row(case) for case in found],
    }


def kept_cases(asked: argparse.Namespace, further: Sequence[str]) -> list[dict[str, Any]]:
    """What a run before found of other axes; ValueError where it measured something else."""
    before = measure.read_result(asked.output / f"{asked.name}.json")
    if (before["workload"], before["measurement"]) != (workload(further), {"steps": asked.steps}):
        raise ValueError(f"--add: {asked.name}.json has other overrides or --steps; measure all axes again")
    return [case for case in before["cases"] if case["axis"] not in asked.axes.split(",")]


def workload(further: Sequence[str]) -> dict[str, Any]:
    """What was measured, for whoever compares results."""
    return {"overrides": list(further), "rows": ROWS}


def row(case: dict[str, Any]) -> dict[str, Any]:
    """The table's row of one case."""
    return {
        "mesh": f"{case['axis']}={case['devices']}",
        "fixed work": case["mode"] if case["devices"] > 1 else "–",
        "processor time, ms": case["cpu_seconds"] * 1e3,
        "over one device's": case["over_one_device"],
        "exchanged, MiB a device": case["collective_bytes"] / 2**20,
        "by": ", ".join(f"{name} {size / 2**20:.3g}" for name, size in case["collectives"].items()) or None,
    }


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    parser = measure.arguments(
        "scaling",
        __doc__,
        "scaling",
        axes=(",".join(AXES), "of the mesh, comma-separated"),
        sizes=("2,4,8", "devices along the axis"),
        steps=(3, "steps of each case"),
    )
    parser.add_argument("--add", action="store_true", help="keep what the file says of other axes")
    asked, further = parser.parse_known_args(argv)
    most = max(map(int, asked.sizes.split(",")))
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={most}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    enough_threads()
    measure.publish(measure_scaling(asked, further), asked)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(sys.argv[1:]))
