"""Figures and their errors, held to those that a person works out."""

import math

import numpy as np
import pytest

from evaluation.metrics import OF_KIND, f1, figure, paired_bootstrap, same, terms
from evaluation.requests import TaskRequest
from evaluation.score import Scored
from tests.evaluation.asked import REQUESTS


def test_choices_by_every_length():
    """The right one, " nerves", is best by no length; a long one by bytes and characters apart."""
    asked = TaskRequest("t", "0", "choice", ("Q",), (" a", " bbbb", " éé"), gold=1)
    found = terms(Scored(asked, (-2.0, -4.0, -3.0), (1, 1, 3)))
    # sums -2 -4 -3; per character -2 -1 -1.5; per byte -2 -1 -0.75; per token -2 -4 -1
    assert {name: value for name, (value, _) in found.items() if name != "bits_per_byte"} == {
        "accuracy": 0.0,
        "accuracy_per_char": 1.0,
        "accuracy_per_byte": 0.0,
        "accuracy_per_token": 0.0,
    }
    assert found["bits_per_byte"] == (pytest.approx(4 / math.log(2)), 5.0)
    assert set(found) == set(OF_KIND["choice"])


def test_figures_are_ratios_with_their_errors():
    right = [{"accuracy": (x, 1.0)} for x in (1.0, 1.0, 1.0, 0.0)]
    found = figure("accuracy", right)
    assert found.value == 0.75 and found.documents == 4
    assert found.error == pytest.approx(0.5 / 2)  # deviation 0.5 of four
    # 3 bits of 1 byte and 1 bit of 3: 1 bit a byte, each 2 bits from it.
    bits = figure("bits_per_byte", [{"bits_per_byte": (3.0, 1.0)}, {"bits_per_byte": (1.0, 3.0)}])
    assert bits.value == 1.0 and bits.error == pytest.approx(math.sqrt(2 * 8) / 4)
    rolling = Scored(REQUESTS[4], (-2.0,), (4,))
    whole = figure("perplexity", [terms(rolling), terms(Scored(REQUESTS[4], (-6.0,), (4,)))])
    assert whole.value == pytest.approx(math.e) and whole.error == pytest.approx(math.e * 4 / 8)
    assert figure("perplexity", [terms(rolling)]).error is None
    with pytest.raises(ValueError, match="metric=f1 is none of these documents'; they have accuracy"):
        figure("f1", right)


def test_errors_are_what_figures_scatter_by():
    """Over a thousand draws of documents the error is the deviation, of a mean and of a ratio."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        size = rng.integers(1, 20, 60).astype(float)
        drawn.append(figure("b", [{"b": (n * 0.5 + rng.normal(), n)} for n in size]))
    spread = np.std([one.value for one in drawn])
    assert np.mean([one.error for one in drawn]) == pytest.approx(spread, rel=0.05)


def test_answers_are_compared_by_their_bare_words():
    assert same("The  Eiffel Tower!", "eiffel tower") and not same("tower", "eiffel tower")
    assert same(" + ", "+") and not same("-", "+")  # of signs nothing would be left
    assert f1("a red green fox", "the fox red") == pytest.approx(0.8)
    assert f1("", "fox") == 0.0 and f1("+", "+") == 1.0
    asked = TaskRequest("t", "0", "generate", ("Q",), answers=("no", "red fox"))
    assert terms(Scored(asked, text="the red fox")) == {"exact_match": (1.0, 1.0), "f1": (1.0, 1.0)}


def test_a_paired_bootstrap_sees_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)
    ours = {str(i): {"m": (x + 0.2 + rng.normal(0, 0.1), 1.0)} for i, x in enumerate(hard)}
    theirs = {str(i): {"m": (x + rng.normal(0, 0.1), 1.0)} for i, x in enumerate(hard)}
    difference, low, high = paired_bootstrap("m", ours, theirs, seed=1)
    assert low < 0.2 < high and high - low < 0.1 < 2 * 5 / math.sqrt(200)
    assert difference == pytest.approx((low + high) / 2, abs=0.01)
    assert paired_bootstrap("m", ours, theirs, seed=1) == (difference, low, high)
    assert paired_bootstrap("m", ours, theirs, seed=2) != (difference, low, high)
    assert paired_bootstrap("m", theirs, theirs) == (0.0, 0.0, 0.0)
    assert paired_bootstrap("m", theirs, {"3": ours["3"], "x": ours["4"]})[0] < 0
    with pytest.raises(ValueError, match="share no document"):
        paired_bootstrap("m", ours, {"x": theirs["0"]})
