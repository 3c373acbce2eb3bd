"""What the optimizer costs: Muon beside AdamW, and gradient accumulation beside one large batch.

    python -m benchmarks.optimizer                 all three tables, and benchmarks/results/optimizer.json
    python -m benchmarks.optimizer --parts count   operations only: nothing runs, any machine will do

count: operations of matrix products a device of the whole compiled train step, loops counted as often as
they run, on forced CPU devices. optimizers, accumulation: seconds of a step on this machine, the cases
alternating.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from benchmarks.measure import alternate, arguments, guarded, in_new_process, publish, ratio, summary, timed
from benchmarks.versus_torch import COMMON, SHAPES
from benchmarks.workload import build, compose_config, prepare
from common.host import keep_freed_memory
from planner.hlo.program import read_hlo

PARTS = ("count", "optimizers", "accumulation")
QUICKSTART = ("+experiment=quickstart", "model.vocab_size=4096")
ELEVEN = (*COMMON, *SHAPES["cpu"], "+experiment=quickstart")  # 11M parameters, as beside PyTorch
LLAMA = ("+experiment=llama_1b", "mesh=fsdp", "training.global_batch_size=128", "data.seq_len=4096")
OPTIMIZERS = ("adamw", "muon")
Figures = dict[str, Any]


@guarded
def main(argv: Sequence[str]) -> int:
    """Measure the parts that are asked for, print their table and write the result; the exit status."""
    parser = arguments(
        "optimizer",
        __doc__,
        "optimizer",
        devices=(64, "forced ones to count for"),
        rounds=(7, "measurements of each case"),
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--count", nargs="+", default=list(LLAMA), help="config words of the counted step")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="batches of the measured step")
    asked = parser.parse_args(argv)
    table = []
    for part in asked.parts:
        for row in {"count": count, "optimizers": optimizers, "accumulation": accumulation}[part](asked):
            words = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, (int, float))]
            print(f"{part}: {row['case']}: {', '.join(words)}", flush=True)
            table.append(row)
    ratios = {row["case"]: row.pop("speed") for row in table if "speed" in row}
    result = {"title": "The optimizer's cost", "command": command(asked), "table": table, "ratios": ratios}
    publish(result, asked)
    return 0


def command(asked: argparse.Namespace) -> str:
    """The words that measure the same again."""
    parts, rows, words = (" ".join(map(str, some)) for some in (asked.parts, asked.rows, asked.count))
    flags = f"--parts {parts} --devices {asked.devices} --rounds {asked.rounds} --rows {rows}"
    return f"python -m benchmarks.optimizer {flags} --count {words}"


# -- counted -----------------------------------------------------------------------------------------------


def count(asked: argparse.Namespace) -> Iterator[Figures]:
    """Operations a device with either optimizer, each compiled in a process with so many CPU devices."""
    forced = f"--xla_force_host_platform_device_count={asked.devices}"
    found = {
        name: in_new_process(counted, [*asked.count, f"optim={name}"], JAX_PLATFORMS="cpu", XLA_FLAGS=forced)
        for name in OPTIMIZERS
    }
    case = f"TFLOP a device, {asked.devices} devices, {' '.join(asked.count)}"
    for name, flops in found.items():
        yield {"case": f"{case}, {name}", "value": flops / 1e12, "of the first": flops / found["adamw"]}


def counted(words: Sequence[str]) -> int:
    """Operations of one device in the compiled step, on as many devices as there are."""
    program = build(compose_config(*words))
    reading = read_hlo(program.compile_train().as_text() or "", program.layout.mesh.shape)
    if reading.uncounted_loops:
        raise ValueError(f"loops of unknown length: {', '.join(reading.uncounted_loops)}; the count is wrong")
    return reading.flops


# -- measured ----------------------------------------------------------------------------------------------


def optimizers(asked: argparse.Namespace) -> Iterator[Figures]:
    """Seconds of quickstart's step with each optimizer, for each number of rows."""
    for rows in asked.rows:
        cases = {name: [*QUICKSTART, batch(rows), f"optim={name}"] for name in OPTIMIZERS}
        yield from compare(f"seconds a step, quickstart, {rows} x 256 tokens", cases, asked.rounds)


def accumulation(asked: argparse.Namespace) -> Iterator[Figures]:
    """Seconds of a step in one batch and in four parts."""
    sizes: dict[str, tuple[str, ...]] = {
        f"quickstart, {rows} x 256 tokens": (*QUICKSTART, batch(rows)) for rows in asked.rows
    }
    sizes["11M parameters, 64 x 256 tokens"] = (*ELEVEN, batch(64))
    for name, words in sizes.items():
        steps = [f"accumulation_steps={n}" for n in (1, 4)]
        cases = {step: [*words, "optim=adamw", f"training.{step}"] for step in steps}
        yield from compare(f"seconds a step, {name}", cases, asked.rounds)


def batch(rows: int) -> str:
    """The word for a batch of so many rows."""
    return f"training.global_batch_size={rows}"


def compare(what: str, cases: dict[str, list[str]], rounds: int) -> Iterator[Figures]:
    """A row a case: seconds of a step, and their ratio to the first case's, round by round.

    `speed` is the inverse, which `benchmarks/gate.py` watches. `cpu`: seconds that its threads worked, which
    tell more where others use the machine.
    """
    busy: dict[str, list[float]] = {name: [] for name in cases}
    steps = {name: stepper(words, busy[name]) for name, words in cases.items()}
    samples = alternate(steps, rounds)
    first = next(iter(cases))
    for name, seconds in samples.items():
        found, cost = summary(seconds), ratio(samples[first], seconds)
        yield {
            "case": f"{what}, {name}",
            "value": found["median"],
            "of the first": cost["median"],
            **{"q1": found["q1"], "q3": found["q3"], "least": found["min"], "rounds": rounds},
            **{"cost q1": cost["q1"], "cost q3": cost["q3"], "speed": ratio(seconds, samples[first])},
            "cpu": summary(busy[name])["median"],
            "cpu of the first": ratio(busy[first], busy[name])["median"],
        }


def stepper(words: Sequence[str], busy: list[float]) -> Callable[[], float]:
    """A function that makes one more step and returns its seconds; compiled and run once already.

    What its threads worked is added to `busy`, in seconds.
    """
    work = prepare(compose_config(*words), packed=False, batches=1)

    def step() -> None:
        jax.block_until_ready((work.run(), work.state))

    def measured() -> float:
        began = time.process_time()
        seconds = timed(step)
        busy.append(time.process_time() - began)
        return seconds

    step()
    return measured


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(sys.argv[1:]))
