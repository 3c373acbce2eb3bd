"""Shapes in signatures are true: a whole small program runs with each of them checked."""

import os
import subprocess
import sys

import pytest

from tests.test_layering import ROOT


@pytest.mark.slow
def test_annotations_hold_from_text_to_text_and_refuse_wrong_shapes():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.annotated_run"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["held", "traced", "refused"]
