"""Parts of the suite: together they are all of it, and no test is in two."""

from argparse import ArgumentTypeError
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.parallel.test_matrix import CASES
from tests.parts import SMOKE, part_of, read_part, unit
from tests.training.ground import ROOT

NAMES = [f"tests/parallel/test_matrix.py::test_equals_one_device[{case}]" for case in CASES]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_every_part_of_the_matrix_has_cases_and_no_case_is_in_none(count):
    assert {part_of(name, count) for name in NAMES} == set(range(1, count + 1))


@pytest.mark.parametrize("count", [4, 6])
def test_half_of_a_part_is_a_part_of_twice_as_many(count):
    """So a commit that has time for half leaves out what its turn in the longer round will bring."""
    for number in range(2 * count):
        halves = {name for name in NAMES if part_of(name, 2 * count) == number % (2 * count) + 1}
        assert halves <= {name for name in NAMES if part_of(name, count) == number % count + 1}


def test_four_commits_in_a_row_share_the_matrix_about_evenly():
    sizes = Counter(part_of(name, 4) for name in NAMES)
    assert max(sizes.values()) <= 1.6 * len(NAMES) / 4


def test_a_file_stays_together_and_cases_of_the_matrix_do_not():
    def item(*markers):
        return SimpleNamespace(nodeid="tests/a.py::b[c]", get_closest_marker=lambda name: name in markers)

    assert unit(item("slow")) == "tests/a.py" and unit(item("slow", "matrix")) == "tests/a.py::b[c]"


def test_a_part_is_read_or_refused_in_one_line():
    assert read_part("3/4") == (3, 4) and read_part("1/1") == (1, 1)
    for text in ("0/4", "5/4", "4", "a/4", "1/", "-1/4"):
        with pytest.raises(ArgumentTypeError, match="use K/N with K from 1 to N"):
            read_part(text)


@pytest.mark.parametrize("name", SMOKE)
def test_what_is_smoke_is_there(name):
    """A test that is renamed would leave every part in silence."""
    path, _, begins = name.partition("::")
    function, _, case = begins.partition("[")
    assert f"\ndef {function}" in (ROOT / path).read_text() or (not function and (ROOT / path).is_file())
    if path == "tests/parallel/test_matrix.py":
        assert name in {*NAMES}
