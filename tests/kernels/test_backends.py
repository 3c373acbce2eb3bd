"""The table of attention backends: auto never picks what cannot run, and a name that cannot is refused."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels.backends import BACKENDS, FASTEST, Backend, Wanted, choose, facts_of, problem

DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"platform": "cpu", "devices": 1},
    "cpus": {"platform": "cpu", "devices": 8},
    "h100": {"platform": "gpu", "capability": (9, 0), "device": "H100"},
    "a100": {"platform": "gpu", "capability": (8, 0), "device": "A100"},
    "amd": {"platform": "gpu"},
    "tpu": {"platform": "tpu"},
    "new": {"platform": "abacus"},
}
ROWS: dict[str, dict[str, Any]] = {
    "whole": {"part": 4096},
    "short": {"part": 100},
    "ulysses": {"part": 4096, "context": "ulysses"},
    "parts": {"part": 512, "order": "text", "context": "allgather"},
    "small parts": {"part": 64, "order": "text", "context": "allgather"},
    "ring": {"part": 512, "order": "text", "context": "ring"},
}
GRID = [
    (
        device,
        rows,
        Wanted(
            head_dim=head,
            value_dim=value,
            grouped=True,
            window=window,
            softcap=cap,
            dtype=dtype,
            packed=packed,
            **DEVICES[device],
            **ROWS[rows],
        ),
    )
    for device, rows, (head, value), window, cap, dtype, packed in itertools.product(
        DEVICES,
        ROWS,
        [(128, 128), (192, 128), (100, 100), (320, 320)],
        [None, 128],
        [None, 50.0],
        ["bfloat16", "float32"],
        [True, False],
    )
]


def cudnn_runs(device, rows, wanted):
    """By NVIDIA's documentation, written out here a second time."""
    if device not in ("h100", "a100") or rows in ("parts", "small parts", "ring"):
        return False
    packed = device == "h100" or not wanted.packed
    kind = wanted.dtype == "bfloat16" and wanted.softcap is None
    return packed and kind and wanted.head_dim == wanted.value_dim == 128


def splash_runs(device, rows, wanted):
    return device == "tpu" and rows in ("whole", "ulysses", "parts") and wanted.head_dim in (128, 192)


def fused_runs(device, rows, wanted):
    return device == "cpu" and rows in ("whole", "short", "ulysses")


def test_auto_takes_the_fastest_that_runs_and_nothing_else():
    chosen = set()
    for device, rows, wanted in GRID:
        name = choose("auto", wanted).name
        expected = "reference" if device in ("cpu", "cpus") else "chunked"
        if fused_runs(device, rows, wanted):
            expected = "fused"
        if splash_runs(device, rows, wanted):
            expected = "splash"
        if cudnn_runs(device, rows, wanted):
            expected = "cudnn"
        assert name == ("ring" if rows == "ring" else expected), (device, rows, wanted)
        chosen.add(name)
    assert chosen == {"reference", "chunked", "fused", "cudnn", "splash", "ring"}


def test_a_name_that_cannot_run_stops_with_a_remedy_and_one_that_can_is_taken():
    runs = {"cudnn": cudnn_runs, "splash": splash_runs, "fused": fused_runs}
    for device, rows, wanted in GRID:
        for name in BACKENDS:
            can = rows != "ring" and runs.get(name, lambda *_: True)(device, rows, wanted)
            if name == "xla":
                can = can and wanted.softcap is None and wanted.head_dim == wanted.value_dim
            if can:
                assert choose(name, wanted).name == name
                continue
            with pytest.raises(ValueError) as error:
                choose(name, wanted)
            words = str(error.value)
            assert f"training.attention={name}" in words and "; use " in words and "\n" not in words, words


def test_why_names_what_was_passed_over():
    wanted = Wanted(head_dim=128, value_dim=128, dtype="float32", **DEVICES["h100"])
    assert choose("auto", wanted).why == "auto on gpu; cudnn computes in bfloat16 or float16, not float32"
    assert choose("chunked", wanted).why == "training.attention"


def test_the_last_of_every_platform_does_everything():
    anything = replace(BACKENDS["reference"], what="", quadratic=False)
    for names in FASTEST.values():
        assert replace(BACKENDS[names[-1]], what="", quadratic=False) == anything


@pytest.mark.parametrize(
    ("backend", "wanted", "words"),
    [
        (Backend("", packing=False), Wanted(packed=True), ["one document a row", "data.packing=none"]),
        (Backend("", grouped=False), Wanted(grouped=True), ["model.num_kv_heads", "model.num_heads"]),
        (Backend("", window=False), Wanted(window=8), ["model.window=8", "model.window=null"]),
        (Backend(""), Wanted(sinks=True), ["model.attention_sinks=true", "model.attention_sinks=false"]),
    ],
)
def test_what_an_entry_does_not_support_is_refused(backend, wanted, words, monkeypatch):
    monkeypatch.setitem(BACKENDS, "made_up", backend)
    reason = problem("made_up", wanted)
    assert all(word in reason for word in ["training.attention=made_up", "attention=chunked", *words]), reason
    assert problem("made_up", Wanted()) is None


def test_facts_of_devices():
    device = SimpleNamespace(platform="gpu", device_kind="AMD", compute_capability="gfx942")
    assert facts_of(device) == {"platform": "gpu", "capability": None, "device": "AMD"}
    assert facts_of(SimpleNamespace(platform="cpu", device_kind="cpu"))["capability"] is None
    hopper = SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")
    assert facts_of(hopper)["capability"] == (9, 0)


def test_the_page_has_a_row_for_every_backend():
    page = (Path(__file__).resolve().parents[2] / "docs" / "attention.md").read_text("utf-8")
    for name, backend in BACKENDS.items():
        cells = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |")).split("|")
        assert [cells[5].strip() == "need not be", cells[6].strip() == "yes", cells[8].strip() == "yes"] == [
            backend.wide_values,
            backend.softcap,
            backend.quadratic,
        ]
        assert cells[3].strip() == (", ".join(backend.dtypes) or "all")
