"""Every objective's value and its gradient by log-probabilities against TRL itself, in its own environment.

`make torch-env` makes it, or CAMBRIAN_TORCH_PYTHON names its Python; CI has one. `trl_losses.py` runs there.
"""

import os
import subprocess

import jax
import numpy as np
import pytest

from tests.interop.test_parity import PYTHON, ROOT
from tests.objectives.test_formulas import CASES, batch, judged
from training.objectives.base import build_objective

pytestmark = pytest.mark.skipif(
    not PYTHON.exists() and "CAMBRIAN_REQUIRE_TORCH" not in os.environ,
    reason="needs TRL in an environment of its own: make torch-env",
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    given, logprobs = batch()
    np.savez(folder / "given.npz", logprobs=logprobs, **given)
    command = (PYTHON, "tests/objectives/trl_losses.py", folder / "given.npz", folder / "losses.npz")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    subprocess.run(command, cwd=ROOT, check=True, env=quiet)
    return np.load(folder / "losses.npz")


@pytest.mark.parametrize("case", [case for case in CASES if case != "dpo smoothed"])  # which it has no more
def test_value_and_gradient_are_trls(case, theirs):
    name, settings = CASES[case]
    given, logprobs = judged(name)
    objective = build_objective({"name": name, **settings})
    (value, _), slope = jax.value_and_grad(objective.value, has_aux=True)(
        np.float32(logprobs), jax.tree.map(np.float32, given)
    )
    np.testing.assert_allclose(value, theirs[f"{case}/value"], rtol=1e-6)
    wanted = theirs[f"{case}/slope"]
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(slope, wanted, atol=1e-6 * max(1.0, np.abs(wanted).max()))
