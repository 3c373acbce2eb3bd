"""Measures each device by itself: products, memory, copies from the host, and whether their bits are right.

All numbers that go in are whole and small, so each result is exact in any order of summation and any
precision, and the host knows it to the bit: another result is the device's fault. A rate is that of the best
repetition, so that a moment's disturbance does not count against a device. What devices do together is in
`launch.check.links`.
"""

import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.text import MIB
from launch.check.verdict import MATMUL, DeviceReading

PATTERNS = (0x00000000, 0xFFFFFFFF, 0xAAAAAAAA, 0x55555555)
LARGEST = 31  # of whole numbers in a product: sums of 8192 squares stay exact in float32

# A function that is told what is going on, so that a hang can be named.
Say = Callable[[str], None]


@dataclass(frozen=True)
class ProbeSizes:
    """Of what is measured: rows of a square product, bytes of the others."""

    product: int
    stream: int
    copy: int
    collective: int
    block: int  # of a memory test

    @classmethod
    def on(cls, platform: str) -> "ProbeSizes":
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


def measure_devices(devices: Sequence[Any], seconds: float, memory: float, say: Say) -> list[DeviceReading]:
    """The devices of this process, one after another; `memory`: share of a device's free memory to test."""
    numbers = {device: i for i, device in enumerate(devices)}
    here = [device for device in devices if device.process_index == jax.process_index()]
    sizes = ProbeSizes.on(here[0].platform)
    factors = _factors(sizes.product)
    each = seconds / (5 * len(here))
    return [measure(device, numbers[device], sizes, factors, each, memory, say) for device in here]


def measure(
    device: Any,
    number: int,
    sizes: ProbeSizes,
    factors: tuple[np.ndarray, np.ndarray],
    seconds: float,
    memory: float,
    say: Say,
) -> DeviceReading:
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
    return DeviceReading(
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
