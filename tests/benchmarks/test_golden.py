"""Eight programs as committed, and a comparison that can tell when they are not."""

import copy

import pytest

from benchmarks.planner.cases import CASES
from benchmarks.planner.golden import FOLDER, compile_case, differences, read, summary
from tests.compilers import skip_without


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_compiler_makes_the_committed_program(name):
    try:
        compiled = compile_case(CASES[name])
    except ImportError as error:
        skip_without(error)
    lines = differences(read(name), summary(CASES[name], compiled))
    assert not lines, "\n".join([f"{name} is another program than the committed one:", *lines])


def test_every_case_has_a_file_and_every_file_a_case():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_nothing_differs_from_itself(name):
    assert differences(read(name), read(name)) == []
    assert read(name)["overrides"] == list(CASES[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s["collectives"].__setitem__("all-gather tensor", {"times": 3, "bytes": 2**20}),
            "APPEARED",
        ),
        (lambda s: s["collectives"].pop("all-gather fsdp"), "is gone"),
        (lambda s: s["collectives"]["all-gather fsdp"].__setitem__("times", 1), "all-gather fsdp"),
        (lambda s: s.__setitem__("kernels", {}), "kernels: cuDNN attention forward"),
        (lambda s: s["memory"].__setitem__("temporaries", s["memory"]["temporaries"] * 1.03), "temporaries"),
        (lambda s: s["memory"].__setitem__("parameters", s["memory"]["parameters"] + 4), "parameters"),
        (lambda s: s.__setitem__("attention", "chunked"), "attention: cudnn -> chunked"),
    ],
)
def test_what_differs_is_named(change, words):
    golden = read("llama3_8b_on_8_h200")
    now = copy.deepcopy(golden)
    change(now)
    assert words in "\n".join(differences(golden, now))


def test_a_little_more_in_temporaries_is_no_alarm():
    golden = read("llama3_8b_on_8_h200")
    now = copy.deepcopy(golden)
    now["memory"]["temporaries"] *= 1.01
    assert differences(golden, now) == []
