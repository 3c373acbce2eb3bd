"""The parse rate on snippets whose answer a person can see."""

import sys

import pytest

from serving.python_share import complete_statements, is_python, parse_share

WHOLE = "def add(a, b):\n    total = a + b\n    return total\n"
CUT = "\n\ndef next_one(x):\n    retu"


@pytest.mark.parametrize(
    "text",
    [
        WHOLE + CUT,
        WHOLE + "\nprint(add(1",  # an open bracket in the part that is dropped
        WHOLE + '\nNAME = """an open',
        WHOLE + "\n@cache\n@other\ndef next_one(",  # a decorator belongs to the statement that is cut
        WHOLE + "\nx = 'open",
        WHOLE + "\nif x:\n        a\n    b",  # a dedent to nowhere
        "def f(x):\n    if x:\n        return 1\n    else:\n        return 2\n\nclass A:\n  def",
        'def f():\n    """Text\nat the margin = not a statement(\n    """\n    return 1\n\nx = 1\n',
        "def f(\na,\nb,\n):\n    return a\n\nx = 1\n",
        "try:\n    import a\nexcept ImportError:\n    a = None\nfinally:\n    pass\nx",
        'def f():\n    a = "\\d"\n    return a\n\nx',  # a bad escape warns and parses
    ],
)
def test_complete_statements_before_a_cut_one_are_python(text):
    assert is_python(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def ",
        WHOLE,  # a single statement, which may go on
        "def add(a, b):\n    total = a +* b\n    return total\n" + CUT,
        "def f(a:\n    b = 1\n    return b\n" + CUT,
        "def f():\nreturn 1\nx = 2\ny = 3\nz = 4\n",
        "x = 1\ny = 2\n" + CUT,  # two lines
        "x = 1\n# one\n\n# two\n\ny = 2\n" + CUT,  # comments are no code
        "the cat sat\non the mat\nand then\nit slept\n",
        "x = 1\ny = 2\nz = '\x00'\nw = 3\nv = 4\n",
    ],
)
def test_what_is_not_python_is_not_counted(text):
    assert not is_python(text)


def test_a_text_that_the_model_ended_is_taken_whole():
    assert is_python(WHOLE, finished=True)
    assert not is_python(WHOLE + "def g(:\n", finished=True)
    assert not is_python("x = 1\ny = 2\n", finished=True)


def test_only_the_last_top_level_statement_is_dropped():
    assert (
        complete_statements("x = 1\n# why\ny = (\n1,\n2)\nz = 3\nw") == "x = 1\n# why\ny = (\n1,\n2)\nz = 3\n"
    )
    assert complete_statements("if x:\n    a\nelse:\n    b\n") == ""
    assert complete_statements("x = 1\n@a\n@b\nclass C:\n    pass\n") == "x = 1\n"
    assert complete_statements("x = 1\nif x:\n    a\nelif y:\n    b\n") == "x = 1\n"


def test_the_share_counts_every_snippet():
    assert parse_share([]) == (0.0, 0, 0)
    assert parse_share([WHOLE + CUT, WHOLE, "def ", WHOLE + CUT]) == (0.5, 2, 4)
    assert parse_share([WHOLE, WHOLE], finished=[True, False]) == (0.5, 1, 2)


def test_deep_nesting_is_an_answer_and_not_a_crash():
    assert not is_python("x = " + "(" * 5000 + "\ny = 1\nz = 2\nw = 3\n", finished=True)
    assert not is_python("x = " + "-" * (20 * sys.getrecursionlimit()) + "1\ny = 1\nz = 2\n", finished=True)
