"""A run that is asked while it trains and afterwards, and the same weights as others publish them."""

import json

import pytest

from artifacts.metrics import MetricsLog
from evaluation import olmo
from scripts.evaluate import main
from scripts.export import main as export
from training.loop import fit

STEPS = ("training.num_steps=4", "eval.every=4", "checkpoint.every=4", "schedule.warmup_steps=1")
LINES = {
    "choice": [
        {"context": f"the {a} fox", "continuations": [" jumps over", " of class"], "gold": i % 2, "shots": 1}
        for i, a in enumerate(("quick", "brown", "lazy", "class"))
    ],
    "rolling": [{"text": "the quick brown fox jumps over lazy dogs and returns"}, {"text": "import a class"}],
    "generate": [{"context": "the quick", "answers": ["brown"], "stop": [" "], "max_new_tokens": 4}],
}
METRIC = {"choice": "accuracy", "rolling": "bits_per_byte", "generate": "f1"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    tasks = []
    for kind, lines in LINES.items():
        text = "\n".join(json.dumps({"kind": kind, **line}) for line in lines)
        (folder / f"{kind}.jsonl").write_text(text)
        tasks.append(f"  {kind}s: {{file: {kind}.jsonl, metric: {METRIC[kind]}}}")
    path = folder / "mine.yaml"
    path.write_text("\n".join(["tasks:", *tasks]))
    return path


@pytest.fixture(scope="module")
def run(ground, suite):
    """Asked at steps 2 and 4."""
    assert fit(ground.config("asked", *STEPS, f"eval.suite={suite}", "eval.suite_every=2")) == 0
    return ground.run("asked")


@pytest.fixture(scope="module")
def evaluated(run, suite):
    assert main([str(run), f"suite={suite}"]) == 0
    return run / "evaluations" / "mine-4"


def test_a_run_is_asked_while_it_trains(ground, run):
    rows = MetricsLog.read(run / "metrics.jsonl")
    asked = {row["step"]: row for row in rows if "suite/rollings/bits_per_byte" in row}
    assert set(asked) == {2, 4}
    assert all(0 <= row["suite/choices/accuracy"] <= 1 for row in asked.values())
    first, last = (row["suite/rollings/bits_per_byte"] for row in asked.values())
    assert 0 < last < first  # it learns
    summary = ground.summary("asked")
    assert summary["suite/rollings/bits_per_byte"] == last
    assert summary["goodput"]["categories"]["evaluation"] > 0  # in the ledger, as all that is no step


def test_the_script_says_what_the_loop_said(ground, evaluated):
    result = json.loads(evaluated.with_name("mine-4.json").read_text())
    assert (result["model"], result["step"], result["suite"], result["bos"]) == ("asked", 4, "mine", True)
    summary = ground.summary("asked")
    for name, task in result["tasks"].items():
        value = task["figures"][task["metric"]]["value"]
        assert value == pytest.approx(summary[f"suite/{name}/{task['metric']}"], rel=1e-5)
    assert result["tasks"]["choices"]["shots"] == 1
    assert result["tasks"]["choices"]["figures"]["accuracy"]["documents"] == 4
    rows = [json.loads(line) for line in evaluated.with_name("mine-4.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["choices"] * 4 + ["rollings"] * 2 + ["generates"]
    assert len(rows[0]["logprobs"]) == 2 and rows[0]["terms"]["accuracy"] in ([0.0, 1.0], [1.0, 1.0])
    page = evaluated.with_name("mine-4.html").read_text()
    assert "data:image/png;base64," in page and "the quick fox" in page and "document 1: " in page


def test_the_same_weights_published_have_the_same_figures(ground, run, suite, evaluated, capsys):
    there = ground.path / "asked-hf"
    assert export([str(run), f"output={there}", "trim=false"]) == 0  # an odd number of rows does not split
    capsys.readouterr()
    words = [f"suite={suite}", "bos=true", "length=32", f"output={ground.path}/out/hf"]
    versus = evaluated.with_name("mine-4.jsonl")
    assert main([str(there), *words, f"versus={versus}", "tasks=choices,rollings", "fsdp=2", "tensor=2"]) == 0
    said = capsys.readouterr()
    ours = json.loads(evaluated.with_name("mine-4.json").read_text())["tasks"]
    theirs = json.loads((ground.path / "out/hf.json").read_text())["tasks"]
    assert set(theirs) == {"choices", "rollings"}
    for name, task in theirs.items():
        for metric, figures in task["figures"].items():
            assert figures == pytest.approx(ours[name]["figures"][metric], rel=1e-5)
    table = said.out.splitlines()
    assert table[0].split() == ["task", "metric", "value", "±", "error", "documents", "shots", "cut"]
    assert table[1].split()[:2] == ["choices", "accuracy"] and "begin with bos: true" in said.err
    assert table[-1].split()[:3] == ["rollings", "bits_per_byte", "+0.0000"]
    assert "Against" in (ground.path / "out/hf.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "run=nowhere is no run's name or directory"),
        (["RUN", "suite=smal"], "suite=smal is no suite; did you mean small?"),
        (["RUN", "suite=SUITE", "tasks=choice"], "tasks=choice is not in suite=mine; did you mean choices?"),
        (["RUN", "suite=SUITE", "limit=-1"], "limit=-1 must be 0 or more"),
        (["RUN", "suite=SUITE", "step=3"], "step=3 has no checkpoint"),
        (["RUN", "suite=SUITE", "bos=yes"], "bos=yes is not one of auto, true, false"),
        (["RUN", "suite=SUITE", "fsdp=9"], "fsdp=9 tensor=1 is more than the 8 devices here"),
        (
            ["RUN", "suite=SUITE", "versus=none.jsonl", "tasks=choices"],
            "versus=none.jsonl has no rows of a result",
        ),
        (
            ["RUN", "suite=small", "wheel=none.whl"],
            "none.whl is missing; python -m evaluation.olmo fetches it",
        ),
    ],
)
def test_nonsense_is_one_line_and_status_two(run, suite, evaluated, capsys, words, said):
    words = [word.replace("RUN", str(run)).replace("SUITE", str(suite)) for word in words]
    capsys.readouterr()
    assert main([*words, f"output={run}/nonsense"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and said in error[0]
    assert not list(run.glob("nonsense*"))


def test_a_suite_that_cannot_be_read_ends_a_run_before_it_begins(ground, tmp_path, monkeypatch):
    monkeypatch.setenv(olmo.CACHE, str(tmp_path))
    with pytest.raises(ValueError, match="is missing; python -m evaluation.olmo fetches it"):
        fit(ground.config("unasked", *STEPS, "eval.suite=small"))
    assert not ground.run("unasked").exists()
    with pytest.raises(ValueError, match="eval.suite_every=-1 must be 1 step or more, or 0"):
        ground.config("unasked", *STEPS, "eval.suite_every=-1")
