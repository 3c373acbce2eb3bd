"""What Prometheus scrapes is what the run writes down; dashboard and alerts ask for nothing else."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from artifacts.exporter import ADDRESS, ALL, OF_A_ROW, OF_AN_EVALUATION, PREFIX, Exporter, memory
from artifacts.ledger import CATEGORIES, NAME, Ledger
from artifacts.metrics import MetricsLog
from tests.training.ground import ROOT
from training.loop import fit
from training.recorder import Recorder

PAGES = ROOT / "docs/monitoring"
WORDS = ("training.num_steps=5", "checkpoint.every=2", "eval.every=5", "schedule=constant")
# Words of an expression that are no series: functions, keywords, labels, and what Prometheus itself keeps.
PROMQL = {"sum", "max", "by", "delta", "time", "abs", "or", "run", "category", "up", "job", "label_values"}


@pytest.fixture(autouse=True)
def here_only(monkeypatch):
    monkeypatch.setenv(ADDRESS, "127.0.0.1")


def scrape(address):
    """Values by name and labels, the run's own left out."""
    with urllib.request.urlopen(address, timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sample.labels)
        assert labels.pop("run") in ("scraped", "unread")
        found[(sample.name.removeprefix(PREFIX), *labels.values())] = sample.value
    return found


def test_a_scrape_says_what_the_run_has_written(ground, capsys, monkeypatch):
    """Scraped where samples are written, when the last row has been."""
    scraped = {}

    def sample(*args):
        address = re.search(r"monitoring (http\S+)", capsys.readouterr().out).group(1)
        assert "127.0.0.1:0" not in address
        scraped.update(scrape(address))
        return {}

    monkeypatch.setattr("training.loop.write_samples", sample)
    config = ground.config("scraped", *WORDS, "logging.prometheus_port=0", "sample.prompts=[a]")
    assert fit(config) == 0
    rows = MetricsLog.read(ground.run("scraped") / "metrics.jsonl")
    row = [row for row in rows if "loss" in row][-1]
    held_out = [row for row in rows if "eval/loss" in row][-1]
    for key, series in {**OF_A_ROW, **OF_AN_EVALUATION}.items():
        label = (key.removeprefix("mfu_"),) if series.label else ()
        assert scraped.pop((series.name, *label)) == {**row, **held_out}[key]
    ledger = [json.loads(line) for line in (ground.run("scraped") / NAME).read_text().splitlines()][-1]
    for category, seconds in ledger["seconds"].items():
        if category not in ("samples", "checkpoints", "other"):  # which go on behind the scrape
            assert scraped[("goodput_seconds", category)] == pytest.approx(seconds, abs=1e-5)
    assert (scraped[("checkpoint_step",)], scraped[("planned_steps",)]) == (ledger["saved"], 5) == (5, 5)
    for name in ("redone_steps", "skipped_steps", "restarts"):
        assert scraped[(name,)] == 0
    assert scraped[("host_resident_bytes",)] == pytest.approx(ledger["host_resident_bytes"], rel=0.5)
    assert 0 <= scraped[("checkpoint_age_seconds",)] < 60
    with pytest.raises(OSError):  # the port is let go
        socket.create_connection(("127.0.0.1", config.logging.prometheus_port or 1), timeout=1)


def test_a_scrape_never_asks_the_devices_for_a_result():
    """A step under way stands for itself: whoever reads its metrics waits for it."""

    class UnderWay:
        def __getattr__(self, name):
            raise AssertionError(f"a scrape asked for {name}")

    idle = SimpleNamespace(update=lambda row: None, mfu=lambda speed: {})
    recorder = Recorder(None, idle, idle, None, tokens=0, every=1)
    done = {"loss": 2.0, "grad_norm": math.nan, "learning_rate": 0.1, "tokens": 8}
    recorder.push(1, {**done, "grad_norm": 1.0}, 0.0)
    recorder.push(2, UnderWay(), 0.0)
    exporter = Exporter(0, "unread")
    try:
        assert scrape(exporter.address) == {}  # before there is anything to show
        exporter.show(recorder, 9)
        found = scrape(exporter.address)
        assert (found[("step",)], found[("loss",)], found[("planned_steps",)]) == (1, 2.0, 9)
    finally:
        exporter.close()


def test_memory_is_told_by_device_where_the_backend_knows(monkeypatch):
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 7}, None]
    devices = [SimpleNamespace(id=i, memory_stats=lambda i=i: stats[i]) for i in range(2)]
    monkeypatch.setattr("jax.local_devices", lambda: devices)
    found = memory()
    assert found["host_resident_bytes"] > 1e6
    assert (found["device_bytes_in_use"], found["device_peak_bytes"]) == ({"0": 5}, {"0": 7})
    json.dumps(Ledger(facts=memory)._row("beat").decode())


def test_a_port_that_is_taken_is_one_line_and_nothing_is_written(ground):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=f"logging.prometheus_port={port} on 127.0.0.1: Address already"
        ) as said:
            fit(ground.config("no_port", *WORDS, f"logging.prometheus_port={port}"))
    assert "\n" not in str(said.value) and not ground.run("no_port").exists()
    with pytest.raises(ValueError, match="logging.prometheus_port=65536 must be a port"):
        ground.config("no_port", "logging.prometheus_port=65536")


def series_in(expression):
    """Names that an expression asks for; strings, labels and ranges left out."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', " ", expression)
    words = set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", bare)) - PROMQL - {"Inf"}
    labels = {series.label for series in ALL}
    return words - labels


def expressions():
    dashboard = json.loads((PAGES / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield f"variable {variable['name']}", variable.get("definition", "")
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def rules():
    return [
        rule
        for group in yaml.safe_load((PAGES / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]


def test_dashboard_and_alerts_ask_only_for_what_is_exported():
    exported = {PREFIX + series.name for series in ALL}
    asked = set()
    for where, expression in expressions():
        strange = series_in(expression) - exported
        assert not strange, f"{where} asks for {', '.join(strange)}"
        asked |= series_in(expression) & exported
        for category in re.findall(r'category=~?"([^"]+)"', expression):
            assert set(category.split("|")) <= set(CATEGORIES), where
    assert asked == exported - {PREFIX + "checkpoint_timestamp_seconds"}  # its age is shown
    assert series_in('sum by (run) (cambrian_los{run=~"$run"})') == {"cambrian_los"}  # this test can fail


def test_the_dashboard_is_one_that_grafana_takes():
    dashboard = json.loads((PAGES / "dashboard.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}
        assert not cells & places and grid["x"] + grid["w"] <= 24, panel["title"]
        places |= cells
        assert panel["targets"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.skipif(
    shutil.which("promtool") is None and not os.environ.get("CAMBRIAN_REQUIRE_PROMTOOL"),
    reason="promtool is not here: apt-get install prometheus",
)
def test_every_alert_is_silent_over_a_healthy_run_and_fires_in_a_sick_one(tmp_path):
    cases = ROOT / "tests/artifacts/monitoring/alerts_test.yml"
    for file in (PAGES / "alerts.yml", cases):
        shutil.copy(file, tmp_path)
    for command in (("check", "rules", "alerts.yml"), ("test", "rules", cases.name)):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert all(rule["alert"] in cases.read_text() for rule in rules())
