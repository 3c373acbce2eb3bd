"""What reading published weights takes: `python -m benchmarks.import_memory`.

A Llama of --gigabytes in float32, made in a temporary directory and removed afterwards, is read onto eight
simulated devices by a process of its own (fsdp=4, tensor=2), from a cold page cache. Asked: memory beside the
arrays of no more than the largest layer of a parameter and 200 MB, and no byte of the disk read twice (1.05).
"""

import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.checkpoint import forget
from interop.config_out import write_config
from interop.read import Published
from interop.rules import slots, their_shape
from interop.safetensors import write_tensors
from models.config import ModelConfig
from models.transformer import build_model

BESIDE, READ = 200e6, 1.05  # bytes beside arrays and a layer, and times the files' size, that are asked
TILE = 1 << 24  # random numbers that the files are made of, over and over
AXES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "vocab": "tensor"}


def config_of(gigabytes: float) -> ModelConfig:
    """A Llama of so many gigabytes in float32, but for the last layer."""
    sizes: dict[str, Any] = {
        "vocab_size": 32000,
        "d_model": 2048,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
    }
    layer = 4 * (2048 * 128 * (2 * 16 + 2 * 8) + 3 * 2048 * 5632)
    tables = 4 * 2 * 32000 * 2048
    count = max(1, round((gigabytes * 1e9 - tables) / layer))
    return ModelConfig(name="llama", num_layers=count, d_ff=5632, tie_embeddings=False, **sizes)


def make(directory: Path, gigabytes: float) -> None:
    """Write the model as `scripts/export.py` would, of numbers that are random in stretches."""
    config = config_of(gigabytes)
    family, values = write_config(config, "llama")
    found = slots(build_model(config), family.rules(config))
    shapes = {source.name: their_shape(source, slot.shape) for slot in found for source in slot.sources}
    tile = np.random.default_rng(0).normal(size=TILE).astype(np.float32)
    arrays = ((name, np.resize(tile, shape)) for name, shape in shapes.items())
    write_tensors(directory, shapes, arrays, np.float32)
    (directory / "config.json").write_text(json.dumps(values), "utf-8")
    forget(directory)


def facts(path: str) -> Iterator[tuple[str, int]]:
    """Numbers of a file in /proc/self, by name."""
    for line in Path("/proc/self", path).read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if (number := value.split()[:1]) and number[0].isdecimal():
            yield name, int(number[0])


class Peak:
    """The most memory that a process has while this is open, without mapped files; bytes."""

    def __enter__(self) -> "Peak":
        self.before, self.most, self._done = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    @staticmethod
    def _now() -> int:
        return dict(facts("status"))["RssAnon"] * 1024

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, self._now())


def load(directory: Path) -> dict[str, Any]:
    """Read it onto all devices; bytes of arrays, of the largest layer, of its own, and of the disk."""
    there = Published(directory)
    model = build_model(there.config)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))

    def split(info: Any) -> jax.ShapeDtypeStruct:
        spec = jax.sharding.PartitionSpec(*(AXES.get(axis or "") for axis in info.axes))
        return jax.ShapeDtypeStruct(info.shape, np.float32, sharding=jax.sharding.NamedSharding(mesh, spec))

    abstract = jax.tree.map(split, model.info)
    params: list[Any] = []
    read = dict(facts("io"))["read_bytes"]
    with Peak() as peak:
        seconds = measure.timed(lambda: params.append(jax.block_until_ready(there.weights(abstract, model))))
    return {
        "arrays": sum(x.nbytes for x in jax.tree.leaves(params)),
        "layer": max(4 * int(np.prod(slot.shape)) for slot in there.slots(model)),
        "own": peak.most - peak.before,
        "read": dict(facts("io"))["read_bytes"] - read,
        "files": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "seconds": seconds,
        "machine": measure.describe_machine(),
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print and write the result; exit status 1 where more is taken than asked."""
    parser = measure.arguments(
        "import_memory", __doc__, "import_memory", gigabytes=(4.0, "of weights in float32")
    )
    parser.add_argument("--directory", type=Path, help="where the files go; they are removed")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=asked.directory) as scratch:
        make(Path(scratch), asked.gigabytes)
        flags = "--xla_force_host_platform_device_count=8"
        found = measure.in_new_process(load, Path(scratch), JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    beside, read = found["own"] - found["arrays"] - found["layer"], found["read"] / found["files"]
    row = {
        "files (GB)": found["files"] / 1e9,
        "arrays (GB)": found["arrays"] / 1e9,
        "largest layer of a parameter (MB)": found["layer"] / 1e6,
        "memory beside both (MB)": beside / 1e6,
        "read from the disk / files": read,
        "seconds": found["seconds"],
    }
    result = {
        "title": "Published weights onto eight simulated devices: memory beside the arrays, bytes read",
        "table": [row],
        "machine": found["machine"],
        "note": "`benchmarks/import_memory.py`: anonymous memory at its largest, less what the process had "
        f"before; asked: {BESIDE / 1e6:.0f} MB beside both, and {READ} times the files, or less.",
    }
    measure.publish(result, asked)
    return int(beside > BESIDE or read > READ)


if __name__ == "__main__":
    sys.exit(measure.guarded(main)(sys.argv[1:]))
