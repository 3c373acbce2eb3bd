"""Golden programs: what the compiler made of eight steps, so that a change that breaks scaling shows.

Collectives, kernels, FLOPs and bytes of eight experiments on hardware that is not here, in
tests/golden/*.json. Only the same versions of the compilers make the same program: after an upgrade look at
the differences, and rewrite. `tests/benchmarks/test_golden.py` is the test, in an environment with the locked
compilers: `make test-plan`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measure import ROOT, versions, write_json
from benchmarks.planner.cases import CASES
from benchmarks.workload import compose_config
from parallel.hardware import machine_of
from planner.compiled import Compiled, compile_step
from training.config import with_vocab
from training.legal.check import check as check_config

FOLDER = ROOT / "tests" / "golden"
TOLERANCE = 0.02  # of temporaries: how buffers are packed is not worth an alarm
REWRITE = "python -m benchmarks.planner golden --rewrite"


def compile_case(words: tuple[str, ...]) -> Compiled:
    """The compiled program of a case. ImportError, with the remedy, where its compiler is missing."""
    config = with_vocab(compose_config(*words))
    machine = machine_of(config.hardware)
    check_config(config, machine.devices)
    return compile_step(config, machine)


def summary(words: tuple[str, ...], compiled: Compiled) -> dict[str, Any]:
    """What is committed of a program. Bytes are one device's; of collectives, of all executions together."""
    work, mesh = compiled.work, compiled.program.layout.mesh
    tpu = mesh.devices.flat[0].platform == "tpu"
    return {
        "overrides": list(words),
        "made_by": versions(("jax", "jaxlib", "libtpu") if tpu else ("jax", "jaxlib")),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "attention": compiled.program.attention.name,
        "collectives": {
            " ".join((t.kind, "+".join(t.axes))): {"times": t.times, "bytes": t.bytes} for t in work.traffic
        },
        "kernels": dict(work.kernels),
        "flops": {kind: int(count) for kind, count in work.flops.items()},
        "memory": {
            name: getattr(work.memory, name)
            for name in ("parameters", "optimizer", "gradients", "batch", "temporaries")
        },
        "uncounted_loops": len(compiled.reading.uncounted_loops),
    }


def differences(golden: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A readable line for each thing that is not as it was; none where all is."""
    plain = ("overrides", "mesh", "attention", "uncounted_loops")
    lines = [f"{key}: {golden[key]} -> {now[key]}" for key in plain if golden[key] != now[key]]
    lines += _collectives(golden["collectives"], now["collectives"])
    for what in ("kernels", "flops"):
        for name in sorted({*golden[what], *now[what]}):
            was, is_now = golden[what].get(name, 0), now[what].get(name, 0)
            if was != is_now:
                lines.append(f"{what}: {name}: {was:,} -> {is_now:,}")
    for name, was in golden["memory"].items():
        is_now = now["memory"][name]
        allowed = TOLERANCE * was if name == "temporaries" else 0
        if abs(is_now - was) > allowed:
            lines.append(f"memory: {name}: {was / 2**20:,.1f} MiB -> {is_now / 2**20:,.1f} MiB")
    if lines and golden["made_by"] != now["made_by"]:
        lines.append(f"compilers: {golden['made_by']} -> {now['made_by']}: another program may be theirs")
    return lines


def _collectives(golden: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*golden, *now}):
        was, is_now = golden.get(name), now.get(name)
        if was is None:
            yield f"collectives: {name} APPEARED: {_amount(is_now)}"
        elif is_now is None:
            yield f"collectives: {name} is gone: was {_amount(was)}"
        elif was != is_now:
            yield f"collectives: {name}: {_amount(was)} -> {_amount(is_now)}"


def _amount(collective: Any) -> str:
    return f"{collective['times']:,} times, {collective['bytes'] / 2**20:,.1f} MiB"


def read(name: str) -> dict[str, Any]:
    """The committed summary of a case."""
    committed: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return committed


def check(argv: Sequence[str]) -> int:
    """Compile the cases that are named, or all; status 1 where something differs and is not rewritten."""
    rewrite, status = "--rewrite" in argv, 0
    chosen = [word for word in argv if word != "--rewrite"] or list(CASES)
    for name in chosen:
        compiled = compile_case(CASES[name])
        now, path = summary(CASES[name], compiled), FOLDER / f"{name}.json"
        lines = differences(read(name), now) if path.exists() else ["new"]
        print(f"{name}: {compiled.compile_seconds:.1f} s; {'; '.join(lines) or 'as committed'}", flush=True)
        if rewrite:
            write_json(path, now)
        elif lines:
            status = 1
    if status:
        print(f"if that is meant: {REWRITE}")
    return status
