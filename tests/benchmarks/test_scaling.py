"""Every axis that scaling is measured over splits the model that it is measured on."""

from types import SimpleNamespace

import pytest

from benchmarks import scaling
from benchmarks.measure import write_result
from parallel.config import MESH_AXES
from tests.configs.composing import config
from training.legal.check import check


@pytest.mark.parametrize("axis", scaling.AXES)
def test_eight_devices_along_an_axis_split_the_model(axis):
    made = config(*scaling.overrides(axis, 8, "per device", ()))
    check(made, 8)
    assert made.training.global_batch_size == 8 * scaling.ROWS
    assert {name: getattr(made.mesh, name) for name in MESH_AXES if getattr(made.mesh, name) > 1} == {axis: 8}


def test_one_device_comes_first():
    class Asked:
        axes, sizes = "data,tensor", "2,4"

    found = list(scaling.cases(Asked))
    assert found[0] == ("data", 1, "total") and found[5] == ("tensor", 1, "total")
    assert found[1:5] == [("data", n, mode) for n in (2, 4) for mode in scaling.MODES]


def test_axes_measured_anew_are_added_to_the_others(tmp_path):
    cases = [{"axis": axis, "devices": 1} for axis in ("data", "tensor")]
    before = {"workload": scaling.workload(["a=1"]), "measurement": {"steps": 3}, "cases": cases}
    write_result("scaling", before, tmp_path)
    asked = SimpleNamespace(output=tmp_path, name="scaling", axes="tensor,expert", steps=3)
    assert scaling.kept_cases(asked, ["a=1"]) == cases[:1]
    with pytest.raises(ValueError, match="other overrides or --steps"):
        scaling.kept_cases(asked, ["a=2"])
