"""The schedule simulator, as a person calls it."""

import subprocess
import sys

from scripts.schedule import main


def test_it_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "schedule.png"
    assert main(["interleaved_1f1b", "stages=4", "microbatches=8", f"png={picture}"]) == 0
    said = capsys.readouterr().out
    assert "bubble         15.8%" in said and "at most 11 a stage" in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_it_refuses_in_one_line(capsys):
    assert main(["1f1b", "microbatches=0"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "error: pipeline.microbatches=0 must be 1 or more\n"


def test_it_runs_by_itself():
    command = [sys.executable, "scripts/schedule.py", "zero_bubble", "stages=2", "microbatches=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "F0B0" in done.stdout and "W2" in done.stdout
