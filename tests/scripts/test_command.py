"""A script's command line: RUN first, key=value after; what is wrong with it is one line and status 2."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import Requeue, RunFault
from scripts.command import parse, run
from tests.test_layering import ROOT


@dataclass(frozen=True)
class Options:
    """Words of every kind."""

    run: str
    steps: int | None = None
    rate: float = 0.5
    check: bool = False
    output: Path | None = None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quick"], Options("quick")),
        (["run=quick"], Options("quick")),
        (["--run", "quick", "--check", "--steps=3"], Options("quick", steps=3, check=True)),
        (["quick-seed=0,data=a"], Options("quick-seed=0,data=a")),
        (["null", "steps=null", "output=null"], Options("null")),
        (["rate=1e-3", "quick", "check=true", "output=a=b"], Options("quick", None, 1e-3, True, Path("a=b"))),
    ],
)
def test_words_become_what_the_dataclass_says(words, expected):
    assert parse(words, Options) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN is missing"),
        (["steps=3"], "RUN is missing"),
        (["quick", "more"], "'more' is no key=value"),
        (["quick", "stps=3"], "stps is no key of this command; did you mean steps?"),
        (["quick", "--steps"], "--steps is without a value; as in steps=VALUE"),
        (["quick", "--stps", "3"], "stps is no key of this command; did you mean steps?"),
        (["quick", "steps=many"], "steps=many is not a whole number"),
        (["quick", "rate=null"], "rate=null is not a number"),
        (["quick", "rate=fast"], "rate=fast is not a number"),
        (["quick", "check=yes"], "check=yes is not true or false"),
    ],
)
def test_what_has_no_place_is_refused_in_one_line(words, said, capsys):
    assert run(lambda asked: parse(asked, Options) and 0, words, "") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_an_error_has_its_status_and_help_is_the_purpose(monkeypatch, capsys):
    def fail(error):
        def action(words):
            raise error

        return run(action, [], "")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert [fail(e) for e in (ValueError("a\nb"), OSError("c"), RunFault("d"), Requeue("e"))] == [2, 2, 1, 75]
    assert capsys.readouterr().err == "error: a; b\nerror: c\nerror: d\nerror: e\n"
    assert run(lambda words: 7, ["--help"], "Does it.\n") == 0 and capsys.readouterr().out == "Does it.\n"
    assert run(lambda words: 7, [], "") == 7
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="a\nb"):
        fail(ValueError("a\nb"))


def test_every_script_finds_the_rooms_by_the_one_file():
    for path in (ROOT / "scripts").glob("*.py"):
        text = path.read_text("utf-8")
        if path.name == "command.py" or 'if __name__ == "__main__"' not in text:
            continue
        guards = [n for n in ast.parse(text).body if ast.unparse(n).startswith("if __name__ ==")]
        assert ast.unparse(guards[0].body[0]) == "import command", path
