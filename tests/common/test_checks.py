import math
import re

import pytest

from common.checks import choice, did_you_mean, nearest, require, within


def test_what_is_not_so_is_said_in_one_line_with_key_value_and_limit():
    require(True, "a.b", 1, "1 or more")
    with pytest.raises(ValueError, match=r"^a.b=0 must be 1 or more$"):
        require(False, "a.b", 0, "1 or more")


@pytest.mark.parametrize(("value", "least", "most"), [(1, 1, math.inf), (0.5, 0, 1), (1, 0, 1), (None, 1, 2)])
def test_bounds_belong_to_the_range_and_null_passes(value, least, most):
    within("a.b", value, least, most)


@pytest.mark.parametrize(
    ("value", "least", "most", "limit"),
    [(0, 1, math.inf, "1 or more"), (2, 0, 1, "from 0 to 1"), (math.nan, 0, math.inf, "0 or more")],
)
def test_what_lies_outside_is_refused_and_so_is_nan(value, least, most, limit):
    with pytest.raises(ValueError, match=f"^a.b={value} must be {limit}$"):
        within("a.b", value, least, most)


def test_a_misspelt_choice_names_all_and_the_nearest():
    choice("a.b", "muon", ("adamw", "muon"))
    with pytest.raises(
        ValueError, match=re.escape("a.b=adam is not one of adamw, muon; did you mean adamw?")
    ):
        choice("a.b", "adam", ("adamw", "muon"))
    with pytest.raises(ValueError, match=r"a.b=None is not one of adamw, muon$"):
        choice("a.b", None, ("adamw", "muon"))


def test_the_nearest_is_found_by_the_last_part_of_a_key_too():
    assert nearest("num_layer", ["model.num_layers", "seed"]) == "model.num_layers"
    assert nearest("zzz", ["model.num_layers", "seed"]) is None
    assert did_you_mean("sed", ["seed"]) == "did you mean seed?"
    assert did_you_mean("zzz", iter(["seed", "name"])) == "use one of seed, name"
