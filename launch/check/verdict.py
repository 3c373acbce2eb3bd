"""What measured numbers say of a cluster's devices: which is slow, which is wrong; `launch.check.probe`
measures.

A device is slow where one of its figures is below `slow` times the median of the devices of its kind, and a
link below that of links that cross as much. What is wrong needs no threshold: a product, a copy, a memory
cell or a collective gave other bits than the only right ones. Nothing here touches a device.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.text import GIB, aligned

MATMUL = "matmul bf16 TFLOP/s"
PEAK_SHARE = 0.5  # of the datasheet's rate: a sound device's large products reach more
MEMORY_SHARE = 0.95  # of the median: less is a device that has lost memory, or shares it


@dataclass(frozen=True)
class DeviceReading:
    """One device: figures by name, of which more is better; `wrong` names what came out with other bits."""

    device: int  # its place among all
    name: str  # as JAX calls it on its host
    kind: str
    process: int
    host: str
    figures: Mapping[str, float]
    memory: int | None = None  # bytes
    tested: int = 0  # bytes of it that patterns were written to
    wrong: Sequence[str] = ()

    @property
    def where(self) -> str:
        """The name by which a person finds it."""
        return f"device {self.device} ({self.name} of process {self.process} on {self.host})"


@dataclass(frozen=True)
class LinkReading:
    """What went from one device to the next in the ring, GB/s, the other pairs of its turn beside it."""

    source: int
    target: int
    rate: float


@dataclass(frozen=True)
class Finding:
    """Something that a person has to look at. `devices`: all that it names."""

    kind: str  # wrong | slow | missing
    devices: tuple[int, ...]
    line: str


@dataclass(frozen=True)
class Report:
    """Everything that was measured and what it means, JSON-able by `dataclasses.asdict`."""

    readings: list[DeviceReading]
    links: list[LinkReading]
    medians: dict[str, float]
    findings: list[Finding]
    settings: dict[str, Any] = field(default_factory=dict)


def judge(
    readings: Sequence[DeviceReading],
    links: Sequence[LinkReading],
    *,
    slow: float,
    peak_tflops: float | None = None,
) -> list[Finding]:
    """Findings, the wrong first. `slow`: share of the median below which a figure is slow; 0 judges no speed.

    peak_tflops: the datasheet's bf16 rate of a device, where it is known.
    """
    found = [
        Finding("wrong", (r.device,), f"{r.where}: {what}") for r in readings for what in sorted(r.wrong)
    ]
    found += _missing(readings)
    if slow > 0:
        found += _slow_devices(readings, slow)
        found += _slow_links(readings, links, slow)
        if peak_tflops:
            found += _below_peak(readings, peak_tflops)
    return found


def medians(readings: Iterable[DeviceReading]) -> dict[str, float]:
    """Of each figure, over all devices that have it."""
    values: dict[str, list[float]] = {}
    for reading in readings:
        for name, value in reading.figures.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.median(of) for name, of in values.items()}


def _missing(readings: Sequence[DeviceReading]) -> list[Finding]:
    """Processes with fewer devices than most have, and devices with less memory."""
    counts = Counter(reading.process for reading in readings)
    usual = statistics.mode(counts.values())
    found = []
    for process, count in sorted(counts.items()):
        if count < usual:
            here = [r for r in readings if r.process == process]
            line = f"process {process} on {here[0].host} has {count} devices, others have {usual}"
            found.append(Finding("missing", tuple(r.device for r in here), line))
    sizes = {kind: [r.memory for r in readings if r.kind == kind and r.memory] for kind in _kinds(readings)}
    for reading in readings:
        of_kind = [size for size in sizes[reading.kind] if size]
        if reading.memory and reading.memory < MEMORY_SHARE * statistics.median(of_kind):
            usual_size = statistics.median(of_kind) / GIB
            line = f"{reading.where} has {reading.memory / GIB:.1f} GiB of memory, others {usual_size:.1f}"
            found.append(Finding("missing", (reading.device,), line))
    return found


def _kinds(readings: Iterable[DeviceReading]) -> list[str]:
    return sorted({reading.kind for reading in readings})


def _slow_devices(readings: Sequence[DeviceReading], slow: float) -> list[Finding]:
    found = []
    for kind in _kinds(readings):
        alike = [reading for reading in readings if reading.kind == kind]
        for name, middle in medians(alike).items():
            for reading in alike:
                value = reading.figures.get(name)
                if value is not None and value < slow * middle:
                    line = f"{reading.where} is slow: {_compared(name, value, middle)}"
                    found.append(Finding("slow", (reading.device,), line))
    return found


def _compared(name: str, value: float, middle: float) -> str:
    return f"{name} {value:.3g}, {value / middle:.0%} of the median {middle:.3g}"


def _slow_links(
    readings: Sequence[DeviceReading], links: Sequence[LinkReading], slow: float
) -> list[Finding]:
    """Links inside a process, between processes of a host, and between hosts are three kinds of wire."""
    by_number = {reading.device: reading for reading in readings}
    found = []

    def crosses(link: LinkReading) -> tuple[bool, bool]:
        a, b = by_number[link.source], by_number[link.target]
        return a.host != b.host, a.process != b.process

    for wire in sorted({crosses(link) for link in links}):
        alike = [link for link in links if crosses(link) == wire]
        middle = statistics.median(link.rate for link in alike)
        for link in alike:
            if link.rate < slow * middle:
                ends = f"{by_number[link.source].where} to {by_number[link.target].where}"
                line = f"the link from {ends} is slow: {_compared('GB/s', link.rate, middle)}"
                found.append(Finding("slow", (link.source, link.target), line))
    return found


def _below_peak(readings: Sequence[DeviceReading], peak: float) -> list[Finding]:
    """Against the datasheet, which also shows where all devices are equally slow."""
    found = []
    for reading in readings:
        value = reading.figures.get(MATMUL)
        if value is not None and value < PEAK_SHARE * peak:
            line = (
                f"{reading.where} is slow: {MATMUL} {value:.3g}, {value / peak:.0%} of hardware.peak_tflops"
            )
            found.append(Finding("slow", (reading.device,), f"{line}={peak:g}"))
    return found


def table(report: Report) -> str:
    """One row a device, one column a figure, the last the verdict; the median's row below."""
    names = list(report.medians)
    incoming = {link.target: f"{link.rate:.3g}" for link in report.links}
    heads = ["device", "host", "process", *names, "memory GiB", "tested GiB", "link in GB/s", "verdict"]
    rows: list[list[str]] = []
    for reading in report.readings:
        kinds = {finding.kind for finding in report.findings if reading.device in finding.devices}
        figures = [f"{reading.figures[name]:.3g}" if name in reading.figures else "-" for name in names]
        memory = f"{reading.memory / GIB:.1f}" if reading.memory else "-"
        place = [f"{reading.device} {reading.name}", reading.host, str(reading.process)]
        link = incoming.get(reading.device, "-")
        tested = f"{reading.tested / GIB:.3g}"
        rows.append([*place, *figures, memory, tested, link, ", ".join(sorted(kinds)) or "fine"])
    rows.append(["median", "", "", *(f"{report.medians[name]:.3g}" for name in names), "", "", "", ""])
    first, second = zip(*map(_two_lines, heads), strict=True)
    return "\n".join(aligned([first, second, *rows]))


def _two_lines(head: str) -> tuple[str, str]:
    first, _, second = head.rpartition(" ")
    return (first, second) if first else (head, "")
