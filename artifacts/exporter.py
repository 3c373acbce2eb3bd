"""A Prometheus endpoint over a run: the series of `metrics.jsonl` and `ledger.jsonl`, as last written.

`logging.prometheus_port` opens it in the primary of a job. A scrape reads what the recorder has read from the
devices already and never asks them for a result: no step waits for it. It listens on all interfaces, because
Prometheus runs elsewhere; CAMBRIAN_PROMETHEUS_ADDRESS names one, such as 127.0.0.1.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from artifacts.ledger import Ledger
from common.host import resident_bytes

ADDRESS = "CAMBRIAN_PROMETHEUS_ADDRESS"
PREFIX = "cambrian_"


@dataclass(frozen=True)
class Series:
    """One name that a scrape answers with; label: by what it is told apart, beside the run's name."""

    name: str
    says: str
    label: str | None = None


# Of a training row, by its key; a key with a label in brackets is one of several of that series.
OF_A_ROW = {
    "step": Series("step", "the last training step that has a row"),
    "loss": Series("loss", "nats per token"),
    "grad_norm": Series("grad_norm", "norm of the gradient before clipping"),
    "learning_rate": Series("learning_rate", "of the last step"),
    "tokens": Series("tokens", "trained on so far"),
    "tokens_per_second": Series("tokens_per_second", "of the last step, over all devices"),
    "step_seconds": Series("step_seconds", "of the last step"),
    "input_wait_seconds": Series("input_wait_seconds", "that the last step waited for its batch"),
    "mfu_causal": Series("mfu", "model flop/s as a share of the devices' peak", "convention"),
    "mfu_full": Series("mfu", "model flop/s as a share of the devices' peak", "convention"),
}
OF_AN_EVALUATION = {
    "eval/loss": Series("eval_loss", "held out, nats per token"),
    "eval/bits_per_byte": Series("eval_bits_per_byte", "held out"),
}
FIGURE = Series("figure", "whatever else the newest rows hold, by its name there", "name")
GOODPUT = Series(
    "goodput_seconds", "of the run's life, over all of its starts; they add up to it", "category"
)
PLANNED = Series("planned_steps", "training.num_steps")
RESTARTS = Series("restarts", "starts behind the first")
REDONE = Series("redone_steps", "done again after a restart or a rollback")
SKIPPED = Series("skipped_steps", "whose update was left out, over all starts")
ROW_TIME = Series(
    "last_row_timestamp_seconds", "when the last training row was written; the start's begin before"
)
SAVED = Series("checkpoint_step", "of the last save that this start began, or started from")
SAVED_TIME = Series("checkpoint_timestamp_seconds", "when that save began, or this start")
AGE = Series("checkpoint_age_seconds", "since that moment")
HOST = Series("host_resident_bytes", "memory of the primary's process")
IN_USE = Series("device_bytes_in_use", "of a device of the primary, where the backend tells", "device")
PEAK = Series("device_peak_bytes", "the most so far", "device")
OF_A_RUN = (
    *(GOODPUT, PLANNED, RESTARTS, REDONE, SKIPPED, ROW_TIME, SAVED, SAVED_TIME, AGE, HOST, IN_USE, PEAK),
)
ALL = (*OF_A_ROW.values(), *OF_AN_EVALUATION.values(), FIGURE, *OF_A_RUN)

Point = tuple[Series, str | None, float | None]  # series, value of its label, value; None: nobody tells


def memory() -> dict[str, Any]:
    """Bytes of this process and of its devices: `ledger.jsonl` has it in every row.

    A device's are those of its allocator, known on the host; a CPU tells none.
    """
    import jax

    stats = {str(device.id): device.memory_stats() for device in jax.local_devices()}
    told = {name: found for name, found in stats.items() if found}
    return {
        HOST.name: resident_bytes(),
        IN_USE.name: {name: found.get("bytes_in_use") for name, found in told.items()},
        PEAK.name: {name: found.get("peak_bytes_in_use") for name, found in told.items()},
    }


class Recorded(Protocol):
    """What a scrape reads of a run: its newest row, the newest value of every other name, its ledger."""

    last: dict[str, Any]
    last_event: dict[str, Any]
    ledger: Ledger


def samples(recorder: Recorded, num_steps: int) -> Iterator[Point]:
    """What a scrape answers with."""
    yield from _of_row(OF_A_ROW, recorder.last)
    yield from _of_row(OF_AN_EVALUATION, recorder.last_event)
    known = {*OF_A_ROW, *OF_AN_EVALUATION, "skipped"}
    # Of a copy: the loop writes new rows while a scrape reads.
    for key, value in {**recorder.last_event, **recorder.last}.items():
        if key not in known and isinstance(value, int | float):
            yield FIGURE, key, float(value)
    ledger = recorder.ledger
    for category, seconds in ledger.totals().items():
        yield GOODPUT, category, seconds
    yield PLANNED, None, num_steps
    yield RESTARTS, None, ledger.before.starts
    yield REDONE, None, ledger.before.redone + ledger.redone
    yield SKIPPED, None, ledger.before.skipped + ledger.skipped
    yield ROW_TIME, None, ledger.row_at
    step, moment = ledger.saved or (ledger.first, ledger.began)
    yield SAVED, None, step
    yield SAVED_TIME, None, moment
    yield AGE, None, time.time() - moment
    found = memory()
    yield HOST, None, found.pop(HOST.name)
    for series in (IN_USE, PEAK):
        for device, number in found[series.name].items():
            yield series, device, number


def _of_row(table: Mapping[str, Series], row: Mapping[str, Any]) -> Iterator[Point]:
    for key, series in table.items():
        if key in row:
            yield series, key.removeprefix(f"{series.name}_") if series.label else None, float(row[key])


class Exporter:
    """Answers scrapes from the moment that it is made; `show` says what with."""

    def __init__(self, port: int, run: str):
        """Raises OSError, in one line, where the port is taken."""
        from prometheus_client import CollectorRegistry, start_http_server

        self.run, self.num_steps = run, 0
        self.recorder: Recorded | None = None
        address = os.environ.get(ADDRESS, "0.0.0.0")
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"logging.prometheus_port={port} on {address}: {reason}; "
                f"choose another port, or 0 for any that is free (the address is {ADDRESS}'s)"
            ) from error
        self.address = f"http://{address}:{self._server.server_port}/metrics"

    def show(self, recorder: Recorded | None, num_steps: int) -> None:
        """From here on scrapes answer with this run's series."""
        self.num_steps, self.recorder = num_steps, recorder

    def collect(self) -> Iterator[Any]:
        """Called by a scrape, in the server's thread."""
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, Any] = {}
        if self.recorder is None:
            return
        for series, label, value in samples(self.recorder, self.num_steps):
            if value is None:
                continue
            labels = ["run", *([series.label] if series.label else [])]
            family = families.setdefault(
                series.name, GaugeMetricFamily(PREFIX + series.name, series.says, labels=labels)
            )
            family.add_metric([self.run, *([label] if label is not None else [])], value)
        yield from families.values()

    def close(self) -> None:
        """Let the port go."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
