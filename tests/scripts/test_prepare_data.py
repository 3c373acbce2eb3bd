"""The errand that makes token stores beforehand."""

import sys

import pytest

from configs.cli import main
from scripts.prepare_data import beam_options, prepare_data, run, split_options


def test_prepare_data_makes_the_stores_that_it_names_and_makes_them_once(tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"document {i}\n" * 20)
    monkeypatch.chdir(tmp_path)
    words = ["+experiment=debug", "data=folder", "data.path=texts", "data.validation_fraction=0.3"]
    assert main(prepare_data, words) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    first = "".join(line for line in lines if not line.startswith("data: "))
    stores = [
        line.split(": ")[1] for line in first.splitlines() if line.startswith(("train: ", "validation: "))
    ]
    assert len(stores) == 2
    before = {store: (tmp_path / store).stat().st_mtime_ns for store in stores}
    assert main(prepare_data, words) == 0
    assert capsys.readouterr().out == first
    assert {store: (tmp_path / store).stat().st_mtime_ns for store in stores} == before
    assert not (tmp_path / "runs").exists()


def test_prepare_data_says_in_one_line_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(prepare_data, ["+experiment=debug", "data=folder", "data.path=nowhere"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "data.path=nowhere" in err
    assert out == ""


def test_own_options_are_taken_out_and_the_rest_is_the_configs():
    options, words = split_options(
        ["+experiment=debug", "--append", "seed=1", "--workers", "3", "--cfg", "job", "--runner", "Flink"]
    )
    assert (options.append, options.runner) == (True, "Flink")
    assert words == ["+experiment=debug", "seed=1", "--cfg", "job", "data.workers=3"]
    assert beam_options("direct", ["a=1", "--b=2"]) == ["--runner=DirectRunner", "--a=1", "--b=2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runner-option", "a=1"], "--runner-option needs --runner"),
        (["--workers", "many"], "--workers"),
        (["--runner", "direct"], "pip install -e '.[beam]'"),
    ],
)
def test_options_that_cannot_be_are_one_line(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert run(["+experiment=debug", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and said in err


def test_help_names_the_options(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--append", "--workers", "--runner NAME", "--runner-option"))
