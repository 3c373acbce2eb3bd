"""What the planner's figures are worth: against compilers, meshes written by hand, and a device.

Plans are made by scripts/plan.py in a process of its own that sees only CPUs, so that a device is as free for
the measurement as if nobody had planned.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import GIB, ROOT, arguments, as_table, publish
from benchmarks.planner.cases import CASES
from benchmarks.workload import compose_config
from configs.cli import options
from parallel.hardware import Machine, machine_of
from planner.candidates import POLICIES, Candidate
from planner.search import Evaluated, compiled_work, evaluate, search
from training.config import with_vocab
from training.legal.nearest import legal

PLANNED: dict[str, tuple[str, ...]] = {
    "llama3_8b, 8 x H200": CASES["llama3_8b_on_8_h200"],
    "llama3_70b, 64 x H100": (
        *("+experiment=llama3_70b", "hardware=h100", "hardware.nodes=8", "mesh=fsdp"),
        "training.global_batch_size=64",
    ),
    "llama3_8b, v5p 4x4x4": (
        *("+experiment=llama3_8b", "hardware=v5p", "hardware.topology=4x4x4"),
        "training.global_batch_size=64",
    ),
    "llama3_8b, v6e 16x16": (
        *("+experiment=llama3_8b", "hardware=v6e", "hardware.topology=16x16"),
        "training.global_batch_size=256",
    ),
    "qwen3_30b_a3b, 256 x H100": CASES["qwen3_30b_a3b_on_256_h100"],
    "llama3_8b at 128k, 64 x H100": CASES["llama3_8b_128k_on_64_h100"],
    "llama3_70b, pipeline x fsdp x tensor, 512 x H100": CASES["llama3_70b_in_stages_on_512_h100"],
}
SEARCHED = {
    "llama3_8b on 16 x H100": (
        *("+experiment=llama3_8b", "hardware=h100", "hardware.nodes=2", "training.global_batch_size=64"),
    ),
    "llama3_70b on 128 x H100": (
        *("+experiment=llama3_70b", "hardware=h100", "hardware.nodes=16", "training.global_batch_size=256"),
    ),
}
ON_GPU = ("training.attention=cudnn", "training.precision=bfloat16", "mesh=single")
PREDICTED: dict[str, tuple[str, ...]] = {
    "124m": ("+experiment=bench_124m", *ON_GPU),
    "350m": (
        *("+experiment=bench_124m", "run.name=bench_350m", "model.num_layers=24", "model.d_model=1024"),
        *("model.num_heads=16", "model.num_kv_heads=16", "model.d_ff=4096", *ON_GPU),
    ),
    "1.34b": ("+experiment=bench_1b", *ON_GPU),
    "debug": ("+experiment=debug",),
    "quickstart": ("+experiment=quickstart",),
}
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.25


def plan(words: Sequence[str]) -> tuple[dict[str, Any], float, float]:
    """What scripts/plan.py writes, its seconds from start to end, and its largest resident memory in GiB."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "plan.json"
        command = [sys.executable, "scripts/plan.py", *words, "plan.compile=always", f"plan.output={path}"]
        began = time.perf_counter()
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command)
        return json.loads(path.read_text("utf-8")), seconds, usage.ru_maxrss / 2**20


# -- against the compiler ----------------------------------------------------------------------------------


def planned(argv: Sequence[str]) -> int:
    """Plan every case, a row each: the analytic model against the compiler, and what planning takes."""
    rows = [planned_row(name, words) for name, words in PLANNED.items()]
    result = {
        "benchmark": "planned",
        "title": "Plans for clusters that are not here",
        "note": "Nothing ran. Each plan was made in a process of its own.",
        "table": rows,
    }
    publish(result, arguments("planner planned", None, "planned").parse_args(argv))
    return 0


def planned_row(name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The table's row of a case; printed, since the next takes a while."""
    found, seconds, resident = plan(words)
    analytic, compiled = sum(found["beside"]["memory"].values()), found["total_bytes"]
    flops = sum(found["beside"]["flops"].values()) / (1 - found["beside"]["bubble"])
    row = {
        "plan": name,
        "compiled, GiB": compiled / GIB,
        "analytic, GiB": analytic / GIB,
        "analytic / compiled": analytic / compiled,
        "FLOPs, analytic / compiled": flops / sum(found["work"]["flops"].values()),
        "step, s (predicted)": found["prediction"]["step_seconds"],
        "planning, s": seconds,
        "of these compiling": found["compile_seconds"],
        "resident, GiB": resident,
    }
    print(as_table([row]), flush=True)
    return row


# -- against meshes written by hand ------------------------------------------------------------------------


def searched(argv: Sequence[str]) -> int:
    """Search for both cases, and try every mesh of configs/mesh; seconds are predictions: nothing runs."""
    rows, details = [], {}
    for name, words in SEARCHED.items():
        config = with_vocab(compose_config(*words))
        machine = machine_of(config.hardware)
        began = time.perf_counter()
        found = search(config, machine)
        seconds = time.perf_counter() - began
        hand = by_hand(words, machine)
        assert found.best is not None and hand
        rows.append(
            {
                "case": name,
                "legal candidates": found.legal,
                "of these fit, by the model": found.fitting,
                "search, s": round(seconds),
                "found": " ".join(found.best.candidate.words),
                "step, s": found.best.seconds,
                "GiB": found.best.work.memory.total / GIB,
                "best by hand": " ".join(hand[0].candidate.words),
                "its step, s": hand[0].seconds,
                "by hand / found": hand[0].seconds / found.best.seconds,
            }
        )
        details[name] = {"found": found.best.json(), "by hand": [e.json() for e in hand]}
        print(as_table(rows[-1:]), flush=True)
    result = {
        "benchmark": "searched",
        "title": "A search against meshes written by hand: predicted, compiled, not run",
        "table": rows,
        "details": details,
    }
    publish(result, arguments("planner searched", None, "searched").parse_args(argv))
    return 0


def by_hand(words: Sequence[str], machine: Machine) -> list[Evaluated]:
    """Every mesh of configs/mesh with every policy that is legal and, compiled, fits; fastest first."""
    found = []
    for mesh in options("mesh"):
        base = with_vocab(compose_config(*words, f"mesh={mesh}"))
        if legal(base, machine.devices) is not None:
            continue
        for remat in POLICIES:
            config = replace(base, training=replace(base.training, remat=remat))
            candidate = Candidate(config, (f"mesh={mesh}", f"training.remat={remat}"))
            try:
                evaluated = evaluate(candidate, machine, compiled_work(config, machine))
            except ValueError:  # the compiler refuses it
                continue
            if evaluated.work.memory.total <= machine.memory_bytes:
                found.append(evaluated)
    return sorted(found, key=lambda e: e.seconds)


# -- against a device --------------------------------------------------------------------------------------


def predicted(argv: Sequence[str]) -> int:
    """Plan and measure every shape, a row each; asked of a plan: memory within 10 %, time within 25 %."""
    parser = arguments(
        "planner predicted",
        predicted.__doc__,
        None,
        hardware=("h200", "that is here"),
        shapes=("124m,350m,1.34b", f"comma-separated, of {', '.join(PREDICTED)}"),
        steps=(30, "that are timed"),
    )
    asked = parser.parse_args(argv)
    shapes = asked.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in PREDICTED]:
        raise ValueError(f"--shapes={unknown[0]} is none of {', '.join(PREDICTED)}")
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for shape in shapes:
        row, machine = predicted_row(shape, asked.hardware, asked.steps)
        rows.append(row)
        print(as_table([row]), flush=True)
    result = {
        "benchmark": "predicted",
        "title": f"A plan against {asked.hardware}, one device",
        "machine": machine,
        "table": rows,
    }
    asked.name = asked.name or f"predicted_{asked.hardware}"
    publish(result, asked)
    return 0


def predicted_row(shape: str, hardware: str, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table's row of a shape, and the machine that its step was measured on."""
    where = "hardware.nodes=1" if hardware == "cpu" else "hardware.topology=1x1"
    planned, _, _ = plan([*PREDICTED[shape], f"hardware={hardware}", where])
    found = measured(PREDICTED[shape], hardware, steps)
    seconds, used = found["step_seconds"]["median"], found["device_bytes"]
    predicted, total = planned["prediction"]["step_seconds"], planned["total_bytes"]
    # A CPU counts no bytes of a device: what XLA was asked for there is all that can be compared.
    of_memory = total / (used or found["argument_bytes"] + found["temporary_bytes"])
    of_time = predicted / seconds
    words = {True: "yes", False: "no"}
    return {
        "shape": shape,
        "parameters, M": planned["parameters"] / 1e6,
        "planned, GiB": total / GIB,
        "used, GiB": used / GIB if used else "not counted",
        "planned / used": of_memory,
        "memory within 10 %": words[abs(of_memory - 1) <= MEMORY_WITHIN] if used else "not known",
        "predicted, ms": predicted * 1e3,
        "measured, ms": seconds * 1e3,
        "predicted / measured": of_time,
        "time within 25 %": words[abs(of_time - 1) <= TIME_WITHIN],
    }, found["machine"]


def measured(words: Sequence[str], hardware: str, steps: int) -> dict[str, Any]:
    """What benchmarks/step.py measures. Raises CalledProcessError where it fails."""
    with TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.step", *words, f"hardware={hardware}"]
        command += ["--steps", str(steps), "--unpacked", "--output", scratch, "--name", "step"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(scratch) / "step.json").read_text("utf-8"))
