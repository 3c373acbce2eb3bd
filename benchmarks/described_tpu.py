"""What XLA's TPU compiler says of a train step, without a TPU: attention, buffers, predicted time.

    JAX_PLATFORMS=cpu python -m benchmarks.described_tpu

Needs libtpu (`pip install 'jax[tpu]'`). Prints one row a case and writes them to results/described_tpu.json.
Nothing here ran on a TPU.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from configs import schema
from configs.groups import CONFIG_DIR
from configs.optional_groups import opened
from parallel.mesh import build_layout
from planner.described_devices import described_devices
from planner.hlo.program import Reading, read_hlo
from planner.hlo.text import shapes
from training.config import Config
from training.legal.check import check

RESULTS = Path(__file__).resolve().parent / "results" / "described_tpu.json"
LLAMA = (
    "+experiment=llama_1b",
    "model.vocab_size=128256",
    "data.seq_len=4096",
    "training.remat=dots",
    "training.global_batch_size=16",
)
CASES = (("v5p", "2x2x2"), ("v6e", "4x4"))


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

    def line(self) -> str:
        """One row of the table."""
        predicted = "none" if self.predicted_seconds is None else f"{self.predicted_seconds:.3f} s"
        kernels = ", ".join(f"{name} {count}" for name, count in sorted(self.kernels.items()))
        temporaries, arguments = self.temporary_bytes / 2**30, self.argument_bytes / 2**30
        parts = (
            f"{self.hardware} {self.topology}: {self.attention} in {self.layers} layers ({kernels})",
            f"temporaries {temporaries:.2f} GiB, arguments {arguments:.2f} GiB, predicted {predicted}",
            f"buffers of T x T {len(self.quadratic)}, of B*T x V {len(self.logits)}",
            f"compiled in {self.compile_seconds:.0f} s",
        )
        return "; ".join(parts)


def describe_step(overrides: Sequence[str], hardware: str, topology: str) -> TpuStep:
    """Compile the train step of these overrides for TPUs that are not here, and read the result.

    Raises ImportError, with the install command, where libtpu is missing, and ValueError for a config that
    cannot run there.
    """
    devices = described_devices(hardware, topology)
    schema.register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        words = opened(["run.name=described", *overrides], Config)
        config = schema.from_hydra(compose("config", overrides=words))
    check(config, len(devices))
    return describe_config(config, devices, hardware, topology, overrides)


def describe_config(
    config: Config, devices: list[Any], hardware: str, topology: str, overrides: Sequence[str] = ()
) -> TpuStep:
    """The same for a config that is composed already, its vocabulary known."""
    from training.program import build_program

    layout = build_layout(config.mesh, devices)
    program = build_program(config, layout)
    began = time.perf_counter()
    compiled = program.compile_train()
    seconds = time.perf_counter() - began
    reading = read_hlo(compiled.as_text() or "", layout.mesh.shape, buffers=10**6)
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    predicted = float(costs.get("optimal_seconds", -1.0))
    vocabulary = config.model.vocab_size
    tokens = config.training.global_batch_size // layout.ways("batch") * config.data.seq_len
    return TpuStep(
        hardware=hardware,
        topology=topology,
        overrides=tuple(overrides),
        devices=len(devices),
        attention=program.attention.name,
        why=program.attention.why,
        layers=config.model.num_layers,
        kernels=dict(reading.kernels),
        quadratic=types(reading, lambda sizes: is_quadratic(sizes, config)),
        logits=types(reading, lambda sizes: vocabulary in sizes and math.prod(sizes) >= tokens * vocabulary),
        largest_buffer=reading.buffers[0].type,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        predicted_seconds=predicted if predicted > 0 else None,
        compile_seconds=round(seconds, 1),
    )


def is_quadratic(sizes: tuple[int, ...], config: Config) -> bool:
    """Whether two dims are positions of a row, or those of all query heads that share a key head."""
    length, model = config.data.seq_len, config.model
    positions = {length, length * model.num_heads // model.num_kv_heads}
    return sum(size in positions for size in sizes) > 1


def types(reading: Reading, which: Callable[[tuple[int, ...]], bool]) -> list[str]:
    """The buffers, by their types, of which some array is such."""
    return sorted({b.type for b in reading.buffers if any(which(sizes) for _, sizes in shapes(b.type))})


def main() -> None:
    """Every case, a row each, and all of them as JSON, which grows case by case."""
    made_by = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    rows: list[TpuStep] = []
    for hardware, topology in CASES:
        rows.append(describe_step(LLAMA, hardware, topology))
        print(rows[-1].line(), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        text = json.dumps({"made_by": made_by, "rows": [asdict(row) for row in rows]}, indent=1)
        RESULTS.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
