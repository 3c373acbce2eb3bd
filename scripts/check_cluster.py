"""Look at every device before a long run: is one slow, or wrong? `python scripts/check_cluster.py`

    [OVERRIDES]     train.py's words, of which mesh.* and hardware= count: mesh.tensor=2 hardware=h100
    --slow 0.8      share of the median below which a figure is slow; 0 judges only what is wrong
    --seconds 60    for the measurements, about: half for each device alone, half for collectives
    --memory 0.5    share of each device's free memory that is written and read back
    --output FILE   everything as JSON

Alone, under `srun`, or on this machine as several processes:
`python scripts/launch_local.py --processes 2 --script scripts/check_cluster.py`. One table, then a line for
what is slow or wrong, with device and host. Exit status: 0 all fine, 1 something is slow, wrong, missing or
hangs, 2 bad input. docs/check-cluster.md says what is measured.
"""

import argparse
import json
import os
import socket
import sys
import threading
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command  # noqa: F401  # by which the rooms are found in a clone

from common.terminal import steady_streams, write_at_once
from parallel import processes
from scripts.command import refuse

if TYPE_CHECKING:
    from launch.check.verdict import Report
    from training.config import Config

HANGS = 120  # seconds beyond twice the budget, for compiling; then something hangs


class Watch:
    """Ends a check that hangs while it is entered, which a broken link may cause, and says in what."""

    def __init__(self, seconds: float):
        self.doing, self.seconds, self.done = "nothing yet", seconds, threading.Event()

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.done.set()

    def say(self, what: str) -> None:
        """What is being done now."""
        self.doing = what

    def _watch(self) -> None:
        if self.done.wait(self.seconds):
            return
        where = f"process {processes.process_index()} on {socket.gethostname()}"
        write_at_once(2, f"error: {where} hangs in: {self.doing}\n")
        os._exit(1)


def main(argv: list[str]) -> int:
    """Measure, print, and say whether all is fine: the exit status."""
    try:
        processes.initialize()
        with processes.all_or_none("the command line"):
            options, config = parse(argv)
        report = check(options, config)
        if processes.is_primary():
            show(report, options.output)
        return 1 if report.findings else 0
    except processes.ClusterFault as error:
        return _say(str(error), 1)
    except (ValueError, OSError) as error:
        return _say(str(error), 2)


def _say(line: str, status: int) -> int:
    if processes.prints_error(line):
        refuse(line)
    return status


def parse(argv: list[str]) -> tuple[argparse.Namespace, "Config"]:
    """Options, and the config that the other words compose. ValueError for what makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python scripts/check_cluster.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    for name, default in (("slow", 0.8), ("seconds", 60.0), ("memory", 0.5)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--output", type=Path, default=None)
    try:
        options, words = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    for name, least, most in (("slow", 0, 1), ("seconds", 0.1, 3600), ("memory", 0, 0.9)):
        if not least <= getattr(options, name) <= most:
            raise ValueError(f"--{name}={getattr(options, name)} must be from {least} to {most}")
    return options, compose(words)


def compose(words: list[str]) -> "Config":
    """What train.py would be given, without its checks: a model need not fit."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from configs.explain import check_overrides, explain
    from configs.groups import CONFIG_DIR
    from configs.optional_groups import opened
    from configs.schema import from_hydra, register
    from training.config import Config

    register()
    check_overrides(words, CONFIG_DIR, strict=True)
    named = any(word.partition("=")[0].lstrip("+") in ("run.name", "experiment") for word in words)
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return from_hydra(
                hydra.compose("config", opened([*words, *([] if named else ["run.name=check"])], Config))
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error


def check(options: argparse.Namespace, config: "Config") -> "Report":
    """What all processes together have measured, the same on each."""
    import jax

    from launch.check.links import measure_collectives
    from launch.check.probe import measure_devices
    from launch.check.verdict import DeviceReading, LinkReading, Report, judge, medians
    from parallel.mesh import build_layout
    from training.flops import datasheet

    with processes.all_or_none("the devices"):
        mesh = build_layout(config.mesh).mesh
    devices = list(mesh.devices.flat)
    with Watch(2 * options.seconds + HANGS) as watch:
        mine = measure_devices(devices, options.seconds / 2, options.memory, watch.say)
        processes.barrier("all have measured their devices", options.seconds + HANGS)
        rates, faults, links = measure_collectives(mesh, options.seconds / 2, watch.say)
        watch.say("what the others have measured")
        mine = [
            replace(r, figures={**r.figures, **rates[r.device]}, wrong=[*r.wrong, *faults[r.device]])
            for r in mine
        ]
        said = processes.exchange(
            "the figures", [[asdict(r) for r in mine], [asdict(link) for link in links]]
        )
    readings = sorted((DeviceReading(**r) for of, _ in said for r in of), key=lambda r: r.device)
    links = sorted((LinkReading(**link) for _, of in said for link in of), key=lambda link: link.source)
    peak = config.hardware.peak_tflops or datasheet(devices[0].device_kind)
    findings = judge(readings, links, slow=options.slow, peak_tflops=peak)
    settings: dict[str, Any] = {
        "slow": options.slow,
        "seconds": options.seconds,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "peak_tflops": peak,
    }
    return Report(readings, links, medians(readings), findings, settings)


def show(report: "Report", output: Path | None) -> None:
    """The table and the findings; raises OSError where the file cannot be written."""
    from common.text import counted
    from launch.check.verdict import table

    print(table(report))
    for finding in report.findings:
        print(f"{finding.kind}: {finding.line}")
    hosts = len({reading.host for reading in report.readings})
    verdict = f"{len(report.findings)} to look at" if report.findings else "all fine"
    print(f"{counted(len(report.readings), 'device')} on {counted(hosts, 'host')}: {verdict}")
    if output is not None:
        output.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    steady_streams()
    try:
        status = main(sys.argv[1:])
    except Exception:  # a defect: the traceback, and no waiting for processes that will not come
        traceback.print_exc()
        status = 1
    processes.leave(status)
