"""The check of a cluster, on eight CPU devices and in two processes: who is planted is who is named.

CPU devices share two cores, so their real speeds say nothing: where speed is judged, times are planted too.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from launch.check import probe
from scripts import check_cluster
from tests.training.ground import ROOT

QUICK = ("--seconds", "0.2", "--memory", "0.2", "mesh.data=4", "mesh.tensor=2")


def number_of(device):
    """The place of a device in the mesh of these tests, of one process."""
    return device.id


def run(capsys, tmp_path, *words):
    path = tmp_path / "report.json"
    status = check_cluster.main([*QUICK, "--output", str(path), *words])
    said = capsys.readouterr()
    assert said.err == ""
    return status, said.out, json.loads(path.read_text())


def test_planted_slow_and_wrong_devices_are_named_and_nobody_else(capsys, tmp_path, monkeypatch):
    slow = {(5, "matmul f32 TFLOP/s"), (6, "all-reduce tensor GB/s"), (2, "link")}

    def elapsed(device, what, seconds):
        assert seconds > 0
        return 0.02 if (number_of(device), what) in slow else 0.01

    def fetched(device, what, value):
        result = np.array(value)
        if (number_of(device), what) in {(3, "matmul bf16 TFLOP/s"), (7, "all-gather data GB/s")}:
            result.reshape(-1).view(np.uint32)[11] ^= 1 << 20
        return result + 2 if (number_of(device), what) == (1, "memory") else result

    monkeypatch.setattr(probe, "elapsed", elapsed)
    monkeypatch.setattr(probe, "fetched", fetched)
    status, said, report = run(capsys, tmp_path)
    assert status == 1
    found = [(finding["kind"], finding["devices"]) for finding in report["findings"]]
    assert found == [
        *(("wrong", [1]), ("wrong", [3]), ("wrong", [7])),
        *(("slow", [5]), ("slow", [6]), ("slow", [1, 2])),
    ]
    lines = [line for line in said.splitlines() if line.startswith(("wrong:", "slow:"))]
    assert "memory: " in lines[0] and "words read back other than they were written" in lines[0]
    assert "device 3 (cpu:3 of process 0" in lines[1] and "matmul bf16 product is wrong in 1 of" in lines[1]
    assert "all-gather data: 1 of" in lines[2]
    assert "50% of the median" in lines[3] and "the link from device 1" in lines[5]
    assert "8 devices on 1 host: 6 to look at" in said


@pytest.mark.slow
@pytest.mark.faults
def test_sound_devices_are_fine_and_everything_is_in_table_and_json(capsys, tmp_path):
    status, said, report = run(capsys, tmp_path, "--slow", "0")
    assert status == 0 and "8 devices on 1 host: all fine" in said and report["findings"] == []
    assert [reading["device"] for reading in report["readings"]] == list(range(8))
    figures = {
        *("matmul bf16 TFLOP/s", "matmul f32 TFLOP/s", "memory GB/s"),
        *(f"{what} {axis} GB/s" for what in ("all-reduce", "all-gather") for axis in ("data", "tensor")),
    }
    for reading in report["readings"]:
        assert set(reading["figures"]) == figures and all(rate > 0 for rate in reading["figures"].values())
        assert reading["tested"] > 0
    assert [(link["source"], link["target"]) for link in report["links"]] == [
        (i, (i + 1) % 8) for i in range(8)
    ]
    assert report["settings"]["mesh"]["data"] == 4
    rows = said.splitlines()
    assert sum(row.endswith("fine") and " cpu:" in row for row in rows) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slow", "2"], "--slow=2.0 must be from 0 to 1"),
        (["--slow", "much"], "invalid float value"),
        (["mesh.data=3"], "mesh.data=3 is 3 devices but 8 are here"),
        (["mesh.datum=3"], "did you mean mesh.data?"),
        (["hardware=h101"], "did you mean hardware=h100?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, words, said):
    assert check_cluster.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_check_that_hangs_says_in_what_and_ends():
    lines = (
        "import time\nfrom scripts.check_cluster import Watch\n"
        "with Watch(0.2) as watch:\n    watch.say('a link')\n    time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: process 0 on ") and "hangs in: " in done.stderr


PLANTED = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from launch.check import probe
from parallel import processes
from scripts import check_cluster

def fetched(device, what, value):
    result = np.array(value)
    if processes.process_index() == 1 and what == "all-reduce data GB/s" and device.id % 2:
        result.reshape(-1)[0] += 1
    return result

probe.fetched = fetched
probe.elapsed = lambda device, what, seconds: 0.02 if (device.process_index, what) == (0, "link") else 0.01
processes.leave(check_cluster.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("planted", [False, True])
def test_two_processes_check_each_other_and_name_the_process_and_host(tmp_path, planted):
    script, path = tmp_path / "planted.py", tmp_path / "report.json"
    script.write_text(PLANTED.format(root=str(ROOT)))
    command = [
        *(sys.executable, "scripts/launch_local.py", "--processes", "2", "--devices-per-process", "2"),
        *("--script", str(script) if planted else "scripts/check_cluster.py", "--seconds", "0.5"),
        *("mesh.data=4", "--output", str(path), "--slow", "0.8" if planted else "0"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == planted, done.stderr
    report = json.loads(path.read_text())
    assert [reading["process"] for reading in report["readings"]] == [0, 0, 1, 1]
    assert report["settings"]["processes"] == 2
    if not planted:
        assert report["findings"] == [] and "4 devices on 1 host: all fine" in done.stdout
        return
    # Into process 0 links are twice as slow: one of the two inside a process, one of the two between them.
    found = [(finding["kind"], finding["devices"]) for finding in report["findings"]]
    assert found == [("wrong", [3]), ("slow", [0, 1]), ("slow", [3, 0])]
    assert "of process 1 on " in report["findings"][0]["line"]


def test_a_check_that_fails_leaves_nobody_behind_who_would_end_the_process_later():
    with pytest.raises(ZeroDivisionError), check_cluster.Watch(60) as watch:
        raise ZeroDivisionError
    assert watch.done.is_set()
