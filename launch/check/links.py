"""Measures what devices do together: collectives along each mesh axis, and every link of a ring of all.

Whole numbers go in, so the host knows to the bit what must come out. All processes call
`measure_collectives`; since its programs run on all devices at once, all repeat them equally often.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch.check import probe
from launch.check.probe import ProbeSizes, Say
from launch.check.verdict import LinkReading
from parallel import processes

PATIENCE = 0.005  # seconds of asking without a pause whether a result is there

Rates = dict[int, dict[str, float]]
Faults = dict[int, list[str]]


@dataclass(frozen=True)
class CollectiveProbe:
    """One collective on all devices: what goes in, and what must come out at each."""

    name: str
    run: Callable[[jax.Array], jax.Array]
    given: jax.Array
    wanted: Callable[[int], np.ndarray]  # by device number
    moved: float  # bytes that cross a device's links


def measure_collectives(mesh: Mesh, seconds: float, say: Say) -> tuple[Rates, Faults, list[LinkReading]]:
    """(figures and faults of this process's devices by number, links into them).

    All-reduce and all-gather along every axis of more than one device, then each link of the ring of all.
    """
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    words = ProbeSizes.on(mesh.devices.flat[0].platform).collective // 4
    rates: Rates = {i: {} for d, i in numbers.items() if d.process_index == jax.process_index()}
    faults: Faults = {i: [] for i in rates}
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    ring = Mesh(mesh.devices.reshape(-1), ("ring",), axis_types=(AxisType.Auto,))
    collectives = [p for axis in axes for p in (all_reduce(mesh, axis, words), all_gather(mesh, axis, words))]
    turns = ring_turns(mesh.size)
    each = seconds / max(1, len(collectives) + len(turns))
    for made in collectives:
        say(made.name)
        for number, took in run_collective(made, numbers, faults, each).items():
            rates[number][made.name] = made.moved / took / 1e9
    links = []
    for turn in turns:
        say(f"links {turn[0][0]} to {turn[0][1]} and every other")
        made = permute(ring, turn, words)
        took_by = run_collective(made, numbers, faults, each)
        links += [LinkReading(a, b, made.moved / took_by[b] / 1e9) for a, b in turn if b in took_by]
    return rates, faults, links


def run_collective(
    made: CollectiveProbe, numbers: Mapping[Any, int], faults: Faults, seconds: float
) -> dict[int, float]:
    """Seconds of the best repetition by device of this process; what came out wrong goes into `faults`."""
    took = timed_on_each(made, numbers)  # compiles
    took = timed_on_each(made, numbers)
    slowest = max(processes.exchange("how often to repeat", max(took.values())))
    for _ in range(max(2, min(50, int(seconds / max(slowest, 1e-6))))):
        again = timed_on_each(made, numbers)
        took = {number: min(took[number], again[number]) for number in took}
    for shard in made.run(made.given).addressable_shards:
        number = numbers[shard.device]
        out = probe.fetched(shard.device, made.name, shard.data).reshape(-1)
        bad = int((out != made.wanted(number)).sum())
        if bad:
            faults[number].append(f"{made.name.removesuffix(' GB/s')}: {bad} of {out.size} words are wrong")
    by_number = {number: device for device, number in numbers.items()}
    return {number: probe.elapsed(by_number[number], made.name, seconds) for number, seconds in took.items()}


def timed_on_each(made: CollectiveProbe, numbers: Mapping[Any, int]) -> dict[int, float]:
    """Seconds until each device of this process has its result."""
    took: dict[int, float] = {}
    start = time.perf_counter()
    waiting = list(made.run(made.given).addressable_shards)
    while waiting:
        # Asked in turn, without a thread for each: those would delay each other by more than a link does.
        for shard in [shard for shard in waiting if shard.data.is_ready()]:
            took[numbers[shard.device]] = time.perf_counter() - start
            waiting.remove(shard)
        if time.perf_counter() - start > PATIENCE:
            time.sleep(PATIENCE / 100)
    return took


def content(number: int, words: int) -> np.ndarray:
    """What device `number` puts in: int32 [words], different everywhere; sums do not overflow."""
    place = np.arange(words, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(number * 0x85EBCA6B % 2**32)
    return (place >> np.uint32(14)).astype(np.int32)  # 18 bits: 8192 devices


def spread(mesh: Mesh, words: int) -> jax.Array:
    """[devices, words] int32, device i of the mesh holding `content(i)`."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def rows(index: Any) -> np.ndarray:
        return content(index[0].indices(mesh.size)[0], words)[None]

    return jax.make_array_from_callback((mesh.size, words), sharding, rows)


def _on_each(mesh: Mesh, function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    spec = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _group(mesh: Mesh, axis: str, number: int) -> list[int]:
    """Numbers of the devices that share all but this axis's place with one, in the axis's order."""
    grid = np.arange(mesh.size).reshape(mesh.devices.shape)
    place: list[Any] = list(np.unravel_index(number, grid.shape))
    place[mesh.axis_names.index(axis)] = slice(None)
    return [int(i) for i in grid[tuple(place)]]


def all_reduce(mesh: Mesh, axis: str, words: int) -> CollectiveProbe:
    """The sum over an axis; 2 (n - 1) / n of the bytes cross each device's links, as nccl-tests counts."""
    n = mesh.shape[axis]

    def wanted(number: int) -> np.ndarray:
        total = sum(content(i, words).astype(np.int64) for i in _group(mesh, axis, number))
        return np.asarray(total).astype(np.int32)

    run = _on_each(mesh, lambda x: jax.lax.psum(x, axis))
    return CollectiveProbe(
        f"all-reduce {axis} GB/s", run, spread(mesh, words), wanted, 2 * (n - 1) / n * 4 * words
    )


def all_gather(mesh: Mesh, axis: str, words: int) -> CollectiveProbe:
    """Everybody's words along an axis, of `words` in all; (n - 1) / n of them cross each device's links."""
    n = mesh.shape[axis]
    part = max(1, words // n)

    def wanted(number: int) -> np.ndarray:
        return np.concatenate([content(i, part) for i in _group(mesh, axis, number)])

    run = _on_each(mesh, lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True))
    return CollectiveProbe(f"all-gather {axis} GB/s", run, spread(mesh, part), wanted, (n - 1) * part * 4)


def permute(ring: Mesh, pairs: Sequence[tuple[int, int]], words: int) -> CollectiveProbe:
    """Words of the first of each pair at its second; those that are sent nothing get zeros."""
    sources = {target: source for source, target in pairs}

    def wanted(number: int) -> np.ndarray:
        if number in sources:
            return content(sources[number], words)
        return np.zeros(words, np.int32)

    run = _on_each(ring, lambda x: jax.lax.ppermute(x, "ring", list(pairs)))
    return CollectiveProbe("link", run, spread(ring, words), wanted, 4 * words)


def ring_turns(n: int) -> list[list[tuple[int, int]]]:
    """Links i → i + 1 of a ring of `n` in turns in which no device has two."""
    if n == 1:
        return []
    links = [(i, (i + 1) % n) for i in range(n)]
    last = [links.pop()] if n % 2 else []
    return [turn for turn in (links[::2], links[1::2], last) if turn]
