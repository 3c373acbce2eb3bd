"""What every benchmark shares: the machine in words, statistics, alternating runs, results as JSON.

Standard library only, so that a driver which starts workers holds no device and no thread of a framework.
"""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# What decides the speed of matrix products on a CPU.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "sve", "bf16", "i8mm")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "libtpu", "jax-cuda13-plugin")


def describe_machine() -> dict[str, Any]:
    """CPU, memory, system, versions and, where JAX was imported, its devices; no host name and no path."""
    cpu = _cpu_fields()
    words = cpu.get("flags", cpu.get("Features", "")).split()
    machine: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.machine()),
        "processor": processor(cpu),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in words],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        machine["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    return machine


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor(cpu: Mapping[str, str]) -> str:
    """The kind of processor, of the fields of /proc/cpuinfo: `AuthenticAMD 25-17`.

    Names are for people: virtual machines call very different generations `Intel Xeon Processor`.
    """
    x86, arm = ("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU architecture", "CPU part")
    for vendor, *kind in (x86, arm):
        if all(key in cpu for key in (vendor, *kind)):
            return f"{cpu[vendor]} {'-'.join(cpu[key] for key in kind)}"
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and number of the samples. Raises ValueError where there are none."""
    if not samples:
        raise ValueError("no samples to summarize; measure at least one")
    several = samples if len(samples) > 1 else [samples[0]] * 2  # quantiles asks for two
    q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(samples), "n": len(samples)}


def alternate(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each case measures, each asked once a round, in turn: what slows the machine slows them all.

    Every other round goes backwards, so that no case always follows the same one.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in order:
            samples[name].append(cases[name]())
    return samples


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Summary of how many times faster `ours` was, round by round: their seconds over our seconds."""
    return summary([b / a for a, b in zip(ours, theirs, strict=True)])


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, which has to wait for its own result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def use_cores(count: int) -> None:
    """Keep this process, and the threads it will start, to so many cores; 0 leaves it all of them."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def peak_memory() -> int:
    """Bytes of this process that were resident at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_seconds() -> float | None:
    """Seconds since this process began, imports and all; None where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return None


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows {column: number or text} as Markdown; numbers with four digits, columns those of the first row."""
    columns = list(rows[0])
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    head = [" | ".join(columns), " | ".join("---:" if right else "---" for right in numeric)]
    body = [" | ".join(_cell(row.get(column)) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in [*head, *body])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_result(name: str, payload: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write `payload`, with the machine if it names none, to DIRECTORY/NAME.json; the file.

    `payload["table"]`, a list of rows {column: number or text}, is what docs/performance.md shows of it under
    `payload["title"]`; `payload["ratios"]`, {name: summary}, is what `benchmarks/gate.py` compares.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    text = json.dumps({"machine": describe_machine(), **payload}, indent=1, default=float, allow_nan=False)
    path.write_text(rounded(text) + "\n", "utf-8")
    return path


def rounded(text: str) -> str:
    """JSON text with its numbers to six digits: more are noise."""

    def shorter(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: shorter(item) for key, item in value.items()}
        return [shorter(item) for item in value] if isinstance(value, list) else value

    return json.dumps(shorter(json.loads(text)), indent=1)


def read_result(path: Path) -> dict[str, Any]:
    """A result as written. Raises ValueError, naming the file, for what is none."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} holds no JSON: {error}; measure again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path.name} holds a {type(result).__name__}, not an object; measure again")
    return result
