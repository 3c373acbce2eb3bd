"""What the optimizer costs: Muon beside AdamW, and gradient accumulation beside one large batch.

    python -m benchmarks.optimizer                 all three tables, and benchmarks/results/optimizer.json
    python -m benchmarks.optimizer --parts count   operations only: nothing runs, any machine will do

count: operations of matrix products a device of the whole compiled train step, loops counted as often as
they run, on forced CPU devices. optimizers, accumulation: seconds of a step on this machine, the cases
alternating.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import alternate, ratio, summary, timed, write_result
from benchmarks.versus_torch import COMMON, SHAPES
from common.host import keep_freed_memory

PARTS = ("count", "optimizers", "accumulation")
QUICKSTART = ("+experiment=quickstart", "model.vocab_size=4096")
ELEVEN = (*COMMON, *SHAPES["cpu"], "+experiment=quickstart")  # 11M parameters, as beside PyTorch
LLAMA = ("+experiment=llama_1b", "mesh=fsdp", "training.global_batch_size=128", "data.seq_len=4096")
Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts that are asked for, print their tables, write the JSON; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--devices", type=int, default=64, help="forced devices to count for")
    parser.add_argument("--count", nargs="+", default=list(LLAMA), help="config words of the counted step")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each case")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="batches of the measured step")
    parser.add_argument("--counted", help=argparse.SUPPRESS)  # in a process of its own: prints operations
    asked = parser.parse_args(argv)
    if asked.counted:
        print(counted([*asked.count, f"optim={asked.counted}"]))
        return 0
    results: dict[str, list[Figures]] = {}
    if "count" in asked.parts:
        results["count"] = count_both(asked.devices, asked.count)
        show("count", results)
    if "optimizers" in asked.parts:
        results["optimizers"] = [row for rows in asked.rows for row in optimizers(rows, asked.rounds)]
        show("optimizers", results)
    if "accumulation" in asked.parts:
        sizes: dict[str, tuple[str, ...]] = {
            f"quickstart, {rows} x 256 tokens": (*QUICKSTART, batch(rows)) for rows in asked.rows
        }
        sizes["11M parameters, 64 x 256 tokens"] = (*ELEVEN, batch(64))
        results["accumulation"] = [
            row for name, words in sizes.items() for row in accumulation(name, words, asked.rounds)
        ]
        show("accumulation", results)
    table = [row for rows in results.values() for row in rows]
    ratios = {row["case"]: row.pop("speed") for row in table if "speed" in row}
    payload = {"title": "The optimizer's cost", "command": command(asked), "table": table, "ratios": ratios}
    print(write_result("optimizer", payload))
    return 0


def command(asked: argparse.Namespace) -> str:
    """The words that measure the same again."""
    parts = " ".join(asked.parts)
    rows = " ".join(map(str, asked.rows))
    words = f"--parts {parts} --devices {asked.devices} --rounds {asked.rounds} --rows {rows}"
    return f"python -m benchmarks.optimizer {words} --count {' '.join(asked.count)}"


def show(part: str, results: dict[str, list[Figures]]) -> None:
    """A part's rows, a line each."""
    for row in results[part]:
        words = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, (int, float))]
        print(f"{part}: {row['case']}: {', '.join(words)}", flush=True)


# -- counted -----------------------------------------------------------------------------------------------


def count_both(devices: int, words: Sequence[str]) -> list[Figures]:
    """Operations a device with Muon and with AdamW, each compiled in a process with so many CPU devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    found = {}
    for optim in ("adamw", "muon"):
        line = [sys.executable, "-m", "benchmarks.optimizer", "--counted", optim, "--count", *words]
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[optim] = json.loads(done.stdout)
    case = f"TFLOP a device, {devices} devices, {' '.join(words)}"
    return [
        {"case": f"{case}, {name}", "value": flops / 1e12, "of the first": flops / found["adamw"]}
        for name, flops in found.items()
    ]


def counted(words: Sequence[str]) -> int:
    """Operations of one device in the compiled step, on as many devices as there are."""
    from planner.hlo.program import read_hlo

    program = build(words)
    reading = read_hlo(program.compile_train().as_text(), program.layout.mesh.shape)
    if reading.uncounted_loops:
        raise ValueError(f"loops of unknown length: {', '.join(reading.uncounted_loops)}; the count is wrong")
    return reading.flops


# -- measured ----------------------------------------------------------------------------------------------


def optimizers(rows: int, rounds: int) -> list[Figures]:
    """Seconds of quickstart's step with each optimizer."""
    cases = {name: [*QUICKSTART, batch(rows), f"optim={name}"] for name in ("adamw", "muon")}
    return compare(f"seconds a step, quickstart, {rows} x 256 tokens", cases, rounds)


def accumulation(name: str, words: Sequence[str], rounds: int) -> list[Figures]:
    """Seconds of a step in one batch and in four parts."""
    cases = {
        f"accumulation_steps={n}": [*words, "optim=adamw", f"training.accumulation_steps={n}"] for n in (1, 4)
    }
    return compare(f"seconds a step, {name}", cases, rounds)


def batch(rows: int) -> str:
    """The word for a batch of so many rows."""
    return f"training.global_batch_size={rows}"


def compare(what: str, cases: dict[str, list[str]], rounds: int) -> list[Figures]:
    """A row a case: seconds of a step, and their ratio to the first case's, round by round.

    `speed` is the inverse, which `benchmarks/gate.py` watches. `cpu`: seconds that its threads worked, which
    tell more where others use the machine.
    """
    busy: dict[str, list[float]] = {name: [] for name in cases}
    steps = {name: stepper(words, busy[name]) for name, words in cases.items()}
    samples = alternate(steps, rounds)
    first = next(iter(cases))
    table = []
    for name, seconds in samples.items():
        found, cost = summary(seconds), ratio(samples[first], seconds)
        row: Figures = {"case": f"{what}, {name}", "value": found["median"], "of the first": cost["median"]}
        row |= {"q1": found["q1"], "q3": found["q3"], "least": found["min"], "rounds": rounds}
        row |= {"cost q1": cost["q1"], "cost q3": cost["q3"], "speed": ratio(seconds, samples[first])}
        row |= {
            "cpu": summary(busy[name])["median"],
            "cpu of the first": ratio(busy[first], busy[name])["median"],
        }
        table.append(row)
    return table


def stepper(words: Sequence[str], busy: list[float]) -> Callable[[], float]:
    """A function that makes one more step and returns its seconds; compiled and run once already.

    What its threads worked is added to `busy`, in seconds.
    """
    import jax
    import numpy as np

    from training.state import shardings

    program = build(words)
    step = program.compile_train()
    shape = program.batch["tokens"].shape
    tokens = np.random.default_rng(0).integers(0, 4096, shape, np.int32)
    host = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "loss_weights": np.ones(shape, np.float32),
    }
    batch = jax.device_put(host, shardings(program.batch))
    kept = [program.init_state(0)]

    def once() -> None:
        kept[0], _ = step(kept[0], batch)
        jax.block_until_ready(kept[0])

    def measured() -> float:
        began = time.process_time()
        seconds = timed(once)
        busy.append(time.process_time() - began)
        return seconds

    once()
    return measured


def build(words: Sequence[str]) -> Any:
    """The program of these config words on all devices that there are."""
    import jax
    from hydra import compose, initialize_config_dir

    from configs import schema
    from configs.groups import CONFIG_DIR
    from configs.optional_groups import opened
    from parallel.mesh import build_layout
    from training.config import Config
    from training.legal.check import check
    from training.program import build_program

    schema.register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = schema.from_hydra(compose("config", overrides=opened(words, Config)))
    check(config, jax.device_count())
    return build_program(config, build_layout(config.mesh))


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main())
