"""Pairs of a run's own answers, and whose answers a rule prefers."""

import json

import pytest

from scripts.make_pairs import Answer, asked, main, right, short
from training.loop import fit


@pytest.fixture(scope="module")
def model(ground, tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "7"}]
    records = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(5)] + [{"messages": turns}]
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records), "utf-8")
    words = ("model.num_layers=1", "training.num_steps=2", "eval.every=2", "schedule=constant")
    assert fit(ground.config("answering", *words, "schedule.warmup_steps=1")) == 0
    return str(ground.run("answering")), path


def test_pairs_are_the_best_and_the_worst_of_a_prompt_and_the_same_twice(model, tmp_path, capsys):
    run, path = model
    words = [run, str(path), "samples=3", "max_new_tokens=9", "prefer=long"]
    for name in ("one.jsonl", "two.jsonl"):
        assert main([*words[:2], str(tmp_path / name), *words[2:]]) == 0
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    for line in (tmp_path / "one.jsonl").read_text().splitlines():
        pair = json.loads(line)
        assert len(pair["chosen"].encode()) >= len(pair["rejected"].encode()) > 0 and pair["prompt"]
    capsys.readouterr()
    assert main([*words, f"rival={run}"]) == 0
    assert capsys.readouterr().out.startswith("long: 50.0% (± 0.0%) of 6 prompts")


def test_records_are_asked_by_their_first_turn(model, tmp_path):
    _, path = model
    assert asked(path, 4, 10) == [("4+1=", "5"), ("what?", "7")]
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1 is no record"):
        asked(tmp_path / "bad.jsonl", 0, 1)


def test_rules():
    assert short(Answer("a", 1), "") > short(Answer("ab", 2), "") > short(Answer(" ", 1), "")
    assert right(Answer("so 5", 2), "5") == 1 and right(Answer("6", 1), "5") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [(["prefer=best"], "prefer=best"), (["samples=0"], "samples=0"), ([], "give the file to write")],
)
def test_bad_words_are_one_line(model, words, message, capsys):
    assert main([*model[:1], str(model[1]), *words]) == 2
    assert message in capsys.readouterr().err
