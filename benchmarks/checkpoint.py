"""What a checkpoint costs: `python -m benchmarks.checkpoint`.

For each size of state, in a process of its own: how long `save` holds up the loop and how long until the
checkpoint is committed, and until its files are hashed; then restores with a cold page cache, each beside a
sequential read of the very same files, cold as well. Asked: restore at 0.7 of the sequential read or more.

The files lie in --directory (a temporary one by default): put it on the disk that is to be measured.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from artifacts.checkpoints.manager import Checkpoints
from artifacts.config import CheckpointConfig
from benchmarks import measure
from benchmarks.measure import alternate, ratio, summary, timed
from training.state import TrainState

SIZES = (50, 500, 2000)  # MB of state: parameters and two moments
ASKED = 0.7  # of the sequential read
BUFFER = 8 << 20  # bytes of one read call
LEAVES = 12  # arrays of each of the three trees


def state_of(megabytes: int, seed: int) -> Any:
    """A state like a decoder's: stacked matrices in float32, random, so that they do not compress."""
    width = 128
    rows = max(1, megabytes * 10**6 // (3 * LEAVES * width * 4 * width))
    keys = jax.random.split(jax.random.key(seed), 3 * LEAVES)

    def tree(first: int) -> dict[str, Any]:
        return {f"w{i}": jax.random.normal(keys[first + i], (rows, width, width)) for i in range(LEAVES)}

    moments = {"mu": tree(LEAVES), "nu": tree(2 * LEAVES), "count": jnp.asarray(seed, jnp.int32)}
    return TrainState(jnp.asarray(seed, jnp.int32), tree(0), moments, None)


def files_in(directory: Path) -> Iterator[Path]:
    """The files of a checkpoint, sorted by name."""
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def forget(directory: Path) -> None:
    """Have the system drop what it holds of these files in memory."""
    for path in files_in(directory):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_through(directory: Path) -> None:
    """Every file from its first byte to its last, one after the other."""
    buffer = bytearray(BUFFER)
    for path in files_in(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure_size(directory: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """One size: seconds of each part of a save, and of restores beside reads."""
    checkpoints = Checkpoints(directory, CheckpointConfig(keep=1))
    seconds: dict[str, list[float]] = {"blocked": [], "committed": [], "hashed": []}
    state = state_of(megabytes, 0)
    for step in range(1, rounds + 2):
        state = jax.block_until_ready(state.replace(params=jax.tree.map(lambda x: x + 1, state.params)))
        blocked = timed(partial(checkpoints.save, step, state, {"tokens": 0, "data": {}}))
        committed = timed(checkpoints.wait)
        hashed = timed(lambda: checkpoints.wait(sent=True))
        if step > 1:  # the first one compiles the digests
            for name, value in zip(seconds, (blocked, blocked + committed, hashed), strict=True):
                seconds[name].append(value)
    checkpoints.close()

    step = rounds + 1
    place = directory / str(step)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    moved = sum(x.nbytes for x in jax.tree.leaves(state))
    del state
    reader = Checkpoints(directory, CheckpointConfig(), read_only=True)

    def restore() -> float:
        forget(place)
        return timed(lambda: jax.block_until_ready(reader.restore(step, like)[0]))

    def read() -> float:
        forget(place)
        return timed(lambda: read_through(place))

    restore()  # compiles
    seconds |= alternate({"restored": restore, "read": read}, rounds)
    stored = sum(path.stat().st_size for path in files_in(place))
    return {"bytes": moved, "stored": stored, "seconds": seconds, "machine": measure.describe_machine()}


def row(megabytes: int, found: dict[str, Any]) -> dict[str, Any]:
    """The table's row of one size, by medians."""
    seconds = {name: summary(values)["median"] for name, values in found["seconds"].items()}
    gigabytes = found["bytes"] / 1e9
    share = ratio(found["seconds"]["restored"], found["seconds"]["read"])
    return {
        "state (MB)": megabytes,
        "loop blocked (s)": seconds["blocked"],
        "GB/s of that": gigabytes / seconds["blocked"],
        "committed after (s)": seconds["committed"],
        "then hashed (s)": seconds["hashed"],
        "restore (GB/s)": gigabytes / seconds["restored"],
        "sequential read (GB/s)": found["stored"] / 1e9 / seconds["read"],
        "restore / read": share["median"] * gigabytes * 1e9 / found["stored"],
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print and write the result; exit status 1 where a restore is slower than asked."""
    parser = measure.arguments(
        "checkpoint", __doc__, "checkpoint", rounds=(5, "saves, and restores, of each size")
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="MB of state")
    parser.add_argument("--directory", type=Path, help="where the files go; by default they are removed")
    asked = parser.parse_args(argv)
    rows, machine = [], None
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(dir=asked.directory) as scratch:
            found = measure.in_new_process(measure_size, Path(scratch), size, asked.rounds)
        machine = found["machine"]
        rows.append(row(size, found))
        print(measure.as_table(rows[-1:]), flush=True)
    result = {
        "title": "Checkpoints: what a save holds up, and restores beside the disk's sequential read",
        "table": rows,
        "machine": machine,
        "restore_over_read": {str(r["state (MB)"]): r["restore / read"] for r in rows},
        "note": f"`benchmarks/checkpoint.py`: medians of {asked.rounds}, each size in a process of its "
        "own; the page cache is dropped before each restore and each read (posix_fadvise), in turn. Asked: "
        f"restore at {ASKED} of the read or more.",
    }
    measure.publish(result, asked)
    return int(min(r["restore / read"] for r in rows) < ASKED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
