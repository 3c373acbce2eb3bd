"""The harness of every benchmark: the machine in words, alternating rounds, statistics, flags, results.

Standard library only, so that a driver which starts workers holds no device and no thread of a framework.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from common.errors import RunFault
from common.files import write_text
from common.host import cpu_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
# What decides the speed of matrix products on a CPU.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "sve", "bf16", "i8mm")
Returned = TypeVar("Returned")
Case = TypeVar("Case")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "libtpu", "jax-cuda13-plugin")


def describe_machine() -> dict[str, Any]:
    """CPU, memory, system, versions and, where JAX was imported, its devices; no host name and no path."""
    cpu = _cpu_fields()
    words = cpu.get("flags", cpu.get("Features", "")).split()
    machine: dict[str, Any] = {
        "cpu": cpu_model() or platform.machine(),
        "processor": processor(cpu),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in words],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        machine["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    return machine


def _cpu_fields() -> dict[str, str]:
    try:  # the first processor's
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor(cpu: Mapping[str, str]) -> str:
    """The kind of processor, from the fields of /proc/cpuinfo: `AuthenticAMD 25-17`.

    Names are for people: virtual machines call very different generations `Intel Xeon Processor`.
    """
    x86, arm = ("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU architecture", "CPU part")
    for vendor, *kind in (x86, arm):
        if all(key in cpu for key in (vendor, *kind)):
            return f"{cpu[vendor]} {'-'.join(cpu[key] for key in kind)}"
    return platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    installed = {name: list(metadata.distributions(name=name)) for name in packages}
    return {name: found[0].version for name, found in installed.items() if found}


# -- samples -----------------------------------------------------------------------------------------------


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and number of the samples. Raises ValueError where there are none."""
    if not samples:
        raise ValueError("no samples to summarize; measure at least one")
    several = samples if len(samples) > 1 else [samples[0]] * 2  # quantiles asks for two
    q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(samples), "n": len(samples)}


def alternate(cases: Mapping[Case, Callable[[], float]], rounds: int) -> dict[Case, list[float]]:
    """What each case measures, each asked once a round, in turn: what slows the machine slows them all.

    Every other round goes backwards, so that no case always follows the same one.
    """
    samples: dict[Case, list[float]] = {name: [] for name in cases}
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


def in_new_process(call: Callable[..., Returned], *arguments: Any, **environment: str) -> Returned:
    """What `call` returns in a process of its own, which begins with these variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(call, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- commands ----------------------------------------------------------------------------------------------


def arguments(
    command: str, text: str | None, name: str | None, *, add_help: bool = True, **flags: tuple[Any, str]
) -> argparse.ArgumentParser:
    """A parser with `flags` {name: (default, help)}, and with --output and --name: where the result goes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=add_help,
        allow_abbrev=False,  # what is not named in full may be an override of train.py
    )
    for flag, (default, words) in flags.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", type=type(default), default=default, help=words)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the result")
    parser.add_argument("--name", default=name, help="of the file in it")
    return parser


def guarded(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command that answers bad input by one line and status 2, and a fault by 1 or the process's own."""

    @wraps(command)
    def run(argv: Sequence[str]) -> int:
        try:
            return command(argv)
        except subprocess.CalledProcessError as error:
            return error.returncode  # the process has said why
        except (ValueError, OSError, RunFault) as error:
            if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
                raise  # as train.py does
            print(f"error: {error}", file=sys.stderr)
            return getattr(error, "status", 2)

    return run


def publish(result: Mapping[str, Any], asked: argparse.Namespace) -> None:
    """Print the table of a result, and write it where --output and --name say."""
    print(as_table(result["table"]))
    print(f"written: {write_result(asked.name, result, asked.output).name}")


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows {column: number or text} as Markdown; numbers with four digits, columns those of the first row."""
    columns = list(rows[0])
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    head = [" | ".join(columns), " | ".join("---:" if right else "---" for right in numeric)]
    body = [" | ".join(_cell(row.get(column)) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in [*head, *body])


def quartiles(found: Mapping[str, float], scale: float = 1.0) -> str:
    """The quartiles of a summary in words: `1.2 to 1.4`."""
    return f"{found['q1'] * scale:.4g} to {found['q3'] * scale:.4g}"


def with_quartiles(found: Mapping[str, float]) -> str:
    """A summary in words: `1.3 (1.2 to 1.4)`."""
    return f"{found['median']:.4g} ({quartiles(found)})"


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
    machine = payload.get("machine") or describe_machine()
    text = json.dumps({"machine": machine, **payload}, default=float, allow_nan=False)
    six_digits = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))  # more are noise
    return write_json(directory / f"{name}.json", six_digits)


def write_json(path: Path, value: Any) -> Path:
    """Write a value as our JSON files lie: indented by one, a line's end behind; the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")
    return path


def read_result(path: Path) -> dict[str, Any]:
    """A result as written. Raises ValueError, naming the file, for what is none."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} holds no JSON: {error}; measure again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path.name} holds a {type(result).__name__}, not an object; measure again")
    return result
