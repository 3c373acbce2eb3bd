"""Results and the page that shows them: the page says what the JSON says, and neither names a machine."""

import json
import math
import re
import socket

import pytest

from benchmarks import measure, table


def test_the_page_says_what_the_results_say():
    page = table.PAGE.read_text("utf-8")
    assert table.rewritten(page, table.read_all()) == page, "run python -m benchmarks.table"


def test_a_changed_result_changes_the_page():
    page = "<!-- results: a -->\nold\n<!-- /results -->\nprose\n<!-- results: b -->\n<!-- /results -->\n"
    new = table.rewritten(page, {"a": {"title": "A", "table": [{"name": "x", "ms": 1234.5}]}})
    assert "| x | 1,234 |" in new or "| x | 1,235 |" in new
    assert "**A**" in new and "old" not in new and "prose" in new
    assert table.MISSING in new.split("prose")[1]
    assert table.rewritten(new, {"a": {"title": "A", "table": [{"name": "x", "ms": 1234.5}]}}) == new


def test_a_result_without_a_place_is_refused_or_collected():
    with pytest.raises(ValueError, match="b has no place"):
        table.rewritten("<!-- results: a -->\n<!-- /results -->", {"b": {}})
    page = "<!-- results: a -->\n<!-- /results -->\n<!-- results: * -->\n<!-- /results -->\n"
    new = table.rewritten(page, {"b": {"overhead": {"leaves": 500, "ms": 0.4}}})
    assert "| overhead.leaves | 500 |" in new and "| overhead.ms | 0.4 |" in new


def test_results_hold_no_host_name_and_no_path(tmp_path):
    path = measure.write_result("x", {"value": 1 / 3}, tmp_path)
    text = path.read_text()
    assert socket.gethostname() not in re.sub(r'"[a-z_]+":', "", text)
    assert not re.search(r'"/\w', text)
    assert measure.read_result(path)["value"] == 0.333333
    for committed in measure.RESULTS.glob("*.json"):
        assert not re.search(r'"/\w', committed.read_text("utf-8")), committed.name


def test_nan_is_no_result(tmp_path):
    with pytest.raises(ValueError):
        measure.write_result("x", {"value": math.nan}, tmp_path)


def test_a_broken_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json"):
        measure.read_result(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"x\.json"):
        measure.read_result(tmp_path / "x.json")


def test_summary_is_median_and_quartiles():
    assert measure.summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "min": 1.0,
        "n": 5,
    }
    assert measure.summary([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "n": 1}
    with pytest.raises(ValueError):
        measure.summary([])


def test_cases_take_turns_and_ratios_are_of_one_round():
    asked = []
    cases = {name: lambda name=name: asked.append(name) or float(len(asked)) for name in "ab"}
    samples = measure.alternate(cases, 3)
    assert "".join(asked) == "abbaab"
    assert samples == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    # A machine that is ten times slower in the second round changes no ratio.
    assert measure.ratio([1.0, 10.0], [2.0, 20.0])["median"] == 2.0
    assert measure.ratio([1.0, 10.0], [2.0, 20.0])["q3"] == 2.0
