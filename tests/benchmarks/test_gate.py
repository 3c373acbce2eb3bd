"""The gate: it compares ratios, allows for their spread, and says so where it cannot tell."""

import json

import pytest

from benchmarks.gate import Incomparable, compare, judge, main, uncertainty

MACHINE = {"cpu": "a", "processor": "a 1-2", "cores": 2, "flags": []}


def ratio(median, spread=0.02, n=25):
    return {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread), "min": 0.0, "n": n}


def result(*, machine=None, **ratios):
    found = {name: value if isinstance(value, dict) else ratio(value) for name, value in ratios.items()}
    return {"machine": machine or MACHINE, "workload": {"shape": "cpu"}, "ratios": found}


def test_a_ratio_may_fall_by_the_tolerance_and_what_the_spread_allows():
    # 0.04 / 1.349 * 1.253 / 5 = 0.74 % on each side; twice both together is 2.1 %.
    assert uncertainty(ratio(1.6)) == pytest.approx(0.00743, rel=1e-2)
    assert not judge(ratio(1.50), ratio(1.6), 0.05)[0]  # 6.3 %
    assert judge(ratio(1.48), ratio(1.6), 0.05)[0]  # 7.5 %
    assert judge(ratio(1.50), ratio(1.6), 0.0)[0]
    assert not judge(ratio(1.48, spread=0.05), ratio(1.6, spread=0.05), 0.05)[0]  # too noisy to blame
    assert judge(ratio(1.48, spread=0.05, n=400), ratio(1.6, spread=0.05, n=400), 0.05)[0]


def test_a_fall_beyond_the_noise_is_one_however_noisy():
    with pytest.raises(Incomparable, match="more rounds"):
        judge(ratio(1.4, spread=0.3, n=9), ratio(1.6), 0.05)
    assert judge(ratio(0.55, spread=0.3, n=9), ratio(1.6), 0.05)[0]


def test_becoming_faster_is_no_fault():
    assert not judge(ratio(3.0), ratio(1.6), 0.0)[0]


def test_absolute_times_are_not_looked_at():
    fresh, committed = result(a=1.6), result(a=1.6)
    fresh["step_seconds"], committed["step_seconds"] = {"a": 100.0}, {"a": 1.0}
    assert compare(fresh, committed) == [("a", False, compare(fresh, committed)[0][2])]


@pytest.mark.parametrize(
    ("fresh", "says"),
    [
        (result(b=1.0), "a is missing"),
        (result(a=ratio(1.6, spread=0.6, n=9)), "more rounds"),
        (result(a=ratio(1.6, spread=float("nan"))), "more rounds"),
        (result(a=1.6) | {"workload": {"shape": "124m"}}, "different workloads"),
    ],
)
def test_what_cannot_be_compared_is_refused(fresh, says):
    with pytest.raises(Incomparable, match=says):
        compare(fresh, result(a=1.6))


def test_a_committed_result_without_ratios_passes_nothing():
    with pytest.raises(Incomparable, match="no ratios"):
        compare(result(a=1.0), result())


def write(directory, name, **more):
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(result(**more)))


@pytest.mark.parametrize(
    ("now", "status", "says"), [(1.6, 0, "2 of 2 ratios held"), (1.2, 1, "FELL  versus: a")]
)
def test_the_command_compares_files_of_one_name(tmp_path, capsys, now, status, says):
    write(tmp_path / "fresh", "versus", a=now, b=2.0)
    write(tmp_path / "committed", "versus", a=1.6, b=2.0)
    assert main([str(tmp_path / "fresh"), str(tmp_path / "committed")]) == status
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", [{"processor": "b 1-2"}, {"cores": 64}, {"devices": "1 x H200"}, {"processor": None}]
)
def test_ratios_of_another_machine_are_not_held_against_this_one(tmp_path, capsys, other):
    write(tmp_path / "fresh", "versus", machine=MACHINE | other, a=1.0)
    write(tmp_path / "committed", "versus", a=1.6)
    words = [str(tmp_path / "fresh"), str(tmp_path / "committed")]
    assert main(words) == 2
    key, value = next(iter(other.items()))
    assert f"{key} {MACHINE.get(key, 'unknown')}, here {value}" in capsys.readouterr().err
    assert main([*words, "--other-machine"]) == 1
    assert "another machine: " in capsys.readouterr().out


def test_of_several_kinds_of_machines_the_same_kind_is_compared(tmp_path, capsys):
    other = MACHINE | {"processor": "b 1-2"}
    write(tmp_path / "fresh", "versus", machine=other, a=0.9)
    write(tmp_path / "committed", "versus", a=1.6)
    write(tmp_path / "committed", "versus.b", machine=other, a=0.9)
    write(tmp_path / "committed", "versus_b", machine=other, a=5.0)  # another result
    assert main([str(tmp_path / "fresh"), str(tmp_path / "committed")]) == 0
    assert "0.900 -> 0.900" in capsys.readouterr().out


def test_the_command_does_not_call_nothing_a_success(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "new.json").write_text(json.dumps(result(a=1.0)))
    assert main([str(tmp_path / "fresh"), str(tmp_path)]) == 2
    assert "new.json has no committed namesake" in capsys.readouterr().err
