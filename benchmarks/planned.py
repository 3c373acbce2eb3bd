"""Seven plans for clusters that are not here: analytic against compiled, and what planning takes.

    python -m benchmarks.planned          # writes results/planned.json

Needs the compilers (`pip install -e '.[plan-gpu,plan-tpu]'`) and no device. Each plan is made by
scripts/plan.py in a process of its own, whose whole time and largest resident memory are what the table has.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import measure
from common.text import GIB

HERE = Path(__file__).resolve().parent
CASES: dict[str, tuple[str, ...]] = {
    "llama3_8b, 8 x H200": ("+experiment=llama3_8b", "hardware=h200", "training.global_batch_size=16"),
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
    "qwen3_30b_a3b, 256 x H100": ("+experiment=qwen3_30b_a3b", "hardware=h100", "hardware.nodes=32"),
    "llama3_8b at 128k, 64 x H100": (
        *("+experiment=llama3_8b", "hardware=h100", "hardware.nodes=8", "mesh=long_context"),
        *("data.seq_len=131072", "training.global_batch_size=8"),
    ),
    "llama3_70b, pipeline x fsdp x tensor, 512 x H100": (
        *("+experiment=llama3_70b", "hardware=h100", "hardware.nodes=64", "mesh=3d", "mesh.pipeline=4"),
        *("mesh.tensor=8", "training.global_batch_size=512", "pipeline.microbatches=16"),
    ),
}


def plan(words: tuple[str, ...]) -> tuple[dict[str, Any], float, float]:
    """What scripts/plan.py writes, its seconds from start to end, and its largest resident memory in GiB."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "plan.json"
        command = [sys.executable, "scripts/plan.py", *words, "plan.compile=always", f"plan.output={path}"]
        began = time.perf_counter()
        child = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in (0, 2) or not path.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
        return json.loads(path.read_text("utf-8")), seconds, usage.ru_maxrss / 2**20


def row(name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """One line of the table."""
    said, seconds, resident = plan(words)
    analytic, compiled = sum(said["beside"]["memory"].values()), said["total_bytes"]
    flops = sum(said["beside"]["flops"].values()) / (1 - said["beside"]["bubble"])
    return {
        "plan": name,
        "compiled, GiB": compiled / GIB,
        "analytic, GiB": analytic / GIB,
        "analytic / compiled": analytic / compiled,
        "FLOPs, analytic / compiled": flops / sum(said["work"]["flops"].values()),
        "step, s (predicted)": said["prediction"]["step_seconds"],
        "planning, s": seconds,
        "of these compiling": said["compile_seconds"],
        "resident, GiB": resident,
    }


def main() -> None:
    """Every case, a row each, and the file."""
    rows = []
    for name, words in CASES.items():
        rows.append(row(name, words))
        print(measure.as_table(rows[-1:]), flush=True)
    result = {
        "benchmark": "planned",
        "title": "Plans for clusters that are not here",
        "note": "Nothing ran. Each plan was made in a process of its own.",
        "table": rows,
    }
    print(f"written: {measure.write_result('planned', result).name}")


if __name__ == "__main__":
    main()
