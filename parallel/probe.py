"""Measures every device of a job: products, memory, copies and collectives, and whether their bits are right.

All numbers that go in are whole and small, so each result is exact in any order of summation and any
precision, and the host knows it to the bit: another result is the device's fault. A rate is that of the best
repetition, so that a moment's disturbance does not count against a device.

Every process calls `measure_devices` and `measure_collectives`, in this order; the latter run on all devices
at once, so all processes repeat them equally often.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parallel import cluster
from parallel.health import MATMUL, Link, Reading

PATTERNS = (0x00000000, 0xFFFFFFFF, 0xAAAAAAAA, 0x55555555)
LARGEST = 31  # of whole numbers in a product: sums of 8192 squares stay exact in float32
MIB = 2**20
PATIENCE = 0.005  # seconds of asking without a pause whether a result is there

# A function that is told what is going on, so that a hang can be named.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Of what is measured: rows of a square product, bytes of the others."""

    product: int
    stream: int
    copy: int
    collective: int
    block: int  # of a memory test

    @classmethod
    def on(cls, platform: str) -> "Sizes":
        """Large enough to be limited by what is measured."""
        if platform == "cpu":
            return cls(product=512, stream=16 * MIB, copy=8 * MIB, collective=MIB, block=8 * MIB)
        return cls(product=8192, stream=1024 * MIB, copy=256 * MIB, collective=64 * MIB, block=256 * MIB)


def fetched(device: Any, what: str, value: jax.Array) -> np.ndarray:
    """A result on the host. Tests stand in here to plant a wrong one."""
    return np.asarray(value)


def elapsed(device: Any, what: str, seconds: float) -> float:
    """A time as it was measured. Tests stand in here to plant a slow device."""
    return seconds


def best_of(device: Any, what: str, run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest call of `run` within a budget, at least three calls after a first one."""
    jax.block_until_ready(run())  # compiles
    best, end, calls = math.inf, time.perf_counter() + seconds, 0
    while calls < 3 or (time.perf_counter() < end and calls < 100):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return elapsed(device, what, best)


# -- one device ----------------------------------------------------------------------------------------------


def measure_devices(devices: Sequence[Any], seconds: float, memory: float, say: Say) -> list[Reading]:
    """The devices of this process, one after another; `memory`: share of a device's free memory to test."""
    numbers = {device: i for i, device in enumerate(devices)}
    here = [device for device in devices if device.process_index == jax.process_index()]
    sizes = Sizes.on(here[0].platform)
    factors = _factors(sizes.product)
    each = seconds / (5 * len(here))
    return [measure(device, numbers[device], sizes, factors, each, memory, say) for device in here]


def measure(
    device: Any,
    number: int,
    sizes: Sizes,
    factors: tuple[np.ndarray, np.ndarray],
    seconds: float,
    memory: float,
    say: Say,
) -> Reading:
    """Everything that one device does alone, about `seconds` for each of five probes."""
    figures: dict[str, float] = {}
    wrong: list[str] = []
    for name, dtype in ((MATMUL, jnp.bfloat16), ("matmul f32 TFLOP/s", jnp.float32)):
        say(f"{name} on device {number}")
        figures[name], fault = product(device, name, dtype, factors, seconds)
        wrong += fault
    say(f"memory bandwidth of device {number}")
    figures["memory GB/s"] = stream(device, sizes.stream, seconds)
    say(f"copies to device {number}")
    rate, fault = copy(device, sizes.copy, seconds)
    wrong += fault
    if device.platform != "cpu":  # there a copy may be none
        figures["host copy GB/s"] = rate
    say(f"memory patterns on device {number}")
    tested, fault = patterns(device, sizes.block, memory, seconds)
    wrong += fault
    stats = device.memory_stats() or {}
    return Reading(
        number,
        f"{device.platform}:{device.local_hardware_id if device.platform != 'cpu' else device.id}",
        device.device_kind,
        device.process_index,
        socket.gethostname(),
        figures,
        stats.get("bytes_limit"),
        tested,
        wrong,
    )


def _factors(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-LARGEST, LARGEST + 1, (n, n)).astype(np.float32) for _ in range(2))
    return a, b


def product(
    device: Any, name: str, dtype: Any, factors: tuple[np.ndarray, np.ndarray], seconds: float
) -> tuple[float, list[str]]:
    """(TFLOP/s, what is wrong) of a square product [n, n]."""
    n = len(factors[0])
    a, b = (jax.device_put(x.astype(dtype), device) for x in factors)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    took = best_of(device, name, lambda: multiply(a, b), seconds)
    rows = wrong_rows(fetched(device, name, multiply(a, b)), *factors)
    fault = (
        [f"the {name.split(' TFLOP')[0]} product is wrong in {len(rows)} of {n} rows"] if len(rows) else []
    )
    return 2 * n**3 / took / 1e12, fault


def wrong_rows(result: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows [R] of `result` that are not those of a @ b, for whole a and b [n, n] (Freivalds 1977).

    Both sides are applied to one vector of odd numbers, so that a row with one wrong element always shows.
    """
    v = (2 * np.random.default_rng(1).integers(0, 128, len(b)) + 1).astype(np.float64)
    wanted = a.astype(np.float64) @ (b.astype(np.float64) @ v)
    return np.flatnonzero(~(result.astype(np.float64) @ v == wanted))


def stream(device: Any, size: int, seconds: float) -> float:
    """GB/s of reading and writing an array."""
    x = jax.device_put(np.zeros(size // 4, np.uint32), device)
    step = jax.jit(lambda x: x + jnp.uint32(1))
    took = best_of(device, "memory GB/s", lambda: step(x), seconds)
    return 2 * size / took / 1e9


def copy(device: Any, size: int, seconds: float) -> tuple[float, list[str]]:
    """(GB/s, what is wrong) of copies from this host."""
    x = np.arange(size // 4, dtype=np.uint32) * np.uint32(0x9E3779B9)
    put = partial(jax.device_put, x, device, may_alias=False)
    took = best_of(device, "host copy GB/s", put, seconds)
    bad = int((fetched(device, "host copy", put()) != x).sum())
    return size / took / 1e9, [f"a copy came back with {bad} of {len(x)} words changed"] if bad else []


def patterns(device: Any, block: int, share: float, seconds: float) -> tuple[int, list[str]]:
    """(bytes tested, what is wrong): writes patterns into free memory, block by block, and reads them back.

    All blocks are held at once, so each is another place; it takes no more of them when the time is over, and
    then writes and reads what it has with as many of the patterns as go into as much time again.
    """
    stats = device.memory_stats() or {}
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else 8 * block
    count, held, bad = max(1, int(free * share) // block), [], 0
    write = jax.jit(partial(_pattern, block // 4))
    check = jax.jit(lambda x, pattern, salt: jnp.sum(x != _pattern(x.size, pattern, salt), dtype=jnp.uint32))
    with jax.default_device(device):
        first = np.uint32(PATTERNS[0]), np.uint32(0)
        held.append(write(*first))
        check(held[0], *first).block_until_ready()  # compiled
        start = time.perf_counter()
        for salt in range(1, count):
            held.append(jax.block_until_ready(write(np.uint32(PATTERNS[salt % 4]), np.uint32(salt))))
            if time.perf_counter() > start + seconds:
                break
        for turn in range(len(PATTERNS)):
            for salt in range(len(held)):
                this = np.uint32(PATTERNS[(salt + turn) % 4]), np.uint32(salt)
                if turn:  # the first is written already
                    held[salt] = write(*this)
                bad += int(fetched(device, "memory", check(held[salt], *this)))
            if time.perf_counter() > start + 2 * seconds:
                break
    fault = [f"memory: {bad} words read back other than they were written"] if bad else []
    return len(held) * block, fault


def _pattern(size: int, pattern: Any, salt: Any) -> jax.Array:
    """Words [size]: the pattern, inverted at random places, so that a wrong address shows as well."""
    place = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B9) ^ salt * jnp.uint32(0x85EBCA6B)
    return pattern ^ jnp.where((place >> 16) & 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))


# -- all devices together ------------------------------------------------------------------------------------

Rates = dict[int, dict[str, float]]
Faults = dict[int, list[str]]


@dataclass(frozen=True)
class Probe:
    """One collective on all devices: words that device i puts in, and that must come out at each.

    run: jitted; rate(seconds) → GB/s.
    """

    name: str
    run: Callable[[jax.Array], jax.Array]
    given: jax.Array
    wanted: Callable[[int], np.ndarray]  # by device number
    moved: float  # bytes that cross a device's links


def measure_collectives(mesh: Mesh, seconds: float, say: Say) -> tuple[Rates, Faults, list[Link]]:
    """(figures and faults of this process's devices by number, links into them).

    All-reduce and all-gather along every axis of more than one device, then each link of the ring of all.
    """
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    words = Sizes.on(mesh.devices.flat[0].platform).collective // 4
    rates: Rates = {i: {} for d, i in numbers.items() if d.process_index == jax.process_index()}
    faults: Faults = {i: [] for i in rates}
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    ring = Mesh(mesh.devices.reshape(-1), ("ring",), axis_types=(AxisType.Auto,))
    probes = [p for axis in axes for p in (all_reduce(mesh, axis, words), all_gather(mesh, axis, words))]
    turns = ring_turns(mesh.size)
    each = seconds / max(1, len(probes) + len(turns))
    for probe in probes:
        say(probe.name)
        for number, took in run_probe(probe, numbers, faults, each).items():
            rates[number][probe.name] = probe.moved / took / 1e9
    links = []
    for turn in turns:
        say(f"links {turn[0][0]} to {turn[0][1]} and every other")
        probe = permute(ring, turn, words)
        took_by = run_probe(probe, numbers, faults, each)
        links += [Link(a, b, probe.moved / took_by[b] / 1e9) for a, b in turn if b in took_by]
    return rates, faults, links


def run_probe(probe: Probe, numbers: Mapping[Any, int], faults: Faults, seconds: float) -> dict[int, float]:
    """Seconds of the best repetition by device of this process; what came out wrong goes into `faults`."""
    took = timed_on_each(probe, numbers)  # compiles
    took = timed_on_each(probe, numbers)
    slowest = max(cluster.exchange("how often to repeat", max(took.values())))
    for _ in range(max(2, min(50, int(seconds / max(slowest, 1e-6))))):
        again = timed_on_each(probe, numbers)
        took = {number: min(took[number], again[number]) for number in took}
    for shard in probe.run(probe.given).addressable_shards:
        number = numbers[shard.device]
        out = fetched(shard.device, probe.name, shard.data).reshape(-1)
        bad = int((out != probe.wanted(number)).sum())
        if bad:
            faults[number].append(f"{probe.name.removesuffix(' GB/s')}: {bad} of {out.size} words are wrong")
    by_number = {number: device for device, number in numbers.items()}
    return {number: elapsed(by_number[number], probe.name, seconds) for number, seconds in took.items()}


def timed_on_each(probe: Probe, numbers: Mapping[Any, int]) -> dict[int, float]:
    """Seconds until each device of this process has its result."""
    took: dict[int, float] = {}
    start = time.perf_counter()
    waiting = list(probe.run(probe.given).addressable_shards)
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


def all_reduce(mesh: Mesh, axis: str, words: int) -> Probe:
    """The sum over an axis; 2 (n - 1) / n of the bytes cross each device's links, as nccl-tests counts."""
    n = mesh.shape[axis]

    def wanted(number: int) -> np.ndarray:
        total = sum(content(i, words).astype(np.int64) for i in _group(mesh, axis, number))
        return np.asarray(total).astype(np.int32)

    run = _on_each(mesh, lambda x: jax.lax.psum(x, axis))
    return Probe(f"all-reduce {axis} GB/s", run, spread(mesh, words), wanted, 2 * (n - 1) / n * 4 * words)


def all_gather(mesh: Mesh, axis: str, words: int) -> Probe:
    """Everybody's words along an axis, of `words` in all; (n - 1) / n of them cross each device's links."""
    n = mesh.shape[axis]
    part = max(1, words // n)

    def wanted(number: int) -> np.ndarray:
        return np.concatenate([content(i, part) for i in _group(mesh, axis, number)])

    run = _on_each(mesh, lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True))
    return Probe(f"all-gather {axis} GB/s", run, spread(mesh, part), wanted, (n - 1) * part * 4)


def permute(ring: Mesh, pairs: Sequence[tuple[int, int]], words: int) -> Probe:
    """Words of the first of each pair at its second; those that are sent nothing get zeros."""
    sources = {target: source for source, target in pairs}

    def wanted(number: int) -> np.ndarray:
        if number in sources:
            return content(sources[number], words)
        return np.zeros(words, np.int32)

    run = _on_each(ring, lambda x: jax.lax.ppermute(x, "ring", list(pairs)))
    return Probe("link", run, spread(ring, words), wanted, 4 * words)


def ring_turns(n: int) -> list[list[tuple[int, int]]]:
    """Links i → i + 1 of a ring of `n` in turns in which no device has two."""
    if n == 1:
        return []
    links = [(i, (i + 1) % n) for i in range(n)]
    last = [links.pop()] if n % 2 else []
    return [turn for turn in (links[::2], links[1::2], last) if turn]
