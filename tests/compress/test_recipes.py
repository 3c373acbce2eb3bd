"""Recipes, the command that follows them on a run and on what came of it, and its report."""

import json
from pathlib import Path

import numpy as np
import pytest

from compress.recipes import RECIPES, load_recipe, recipe
from compress.report import front, markdown, table
from compress.slice import Slice
from compress.steps import Prune, Quantize
from configs.groups import mesh_rules
from interop.adapted import is_published
from interop.safetensors import Tensors
from models.weights import QTensor, merged
from scripts.compress import main
from scripts.evaluate import main as evaluate
from training.loop import fit
from training.opening.initial_weights import with_parent_model
from training.opening.opened import open_published

STEPS = ("training.num_steps=4", "eval.every=4", "checkpoint.every=4", "schedule.warmup_steps=1")
ROWS = {"calibration": {"rows": 8, "length": 64}, "held_out": 8}
RECIPE = {
    "packed": [{"prune": "sparsegpt", "pattern": "2:4"}, {"quantize": "gptq", "bits": 3, "tables": 8}],
    "narrow": [{"slice": "width", "mlp": 0.5}],
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_one_and_says_what_for(path):
    assert load_recipe(path.stem).steps
    head = path.read_text("utf-8").splitlines()
    assert head[1] == f"# python scripts/compress.py RUN recipe={path.stem}" and head[2].startswith(
        "# note: "
    )


def test_a_recipe_is_its_steps_in_order():
    found = recipe("mine", {**ROWS, "steps": [*RECIPE["packed"], *RECIPE["narrow"]]})
    assert found.steps == (
        Prune("sparsegpt", pattern="2:4"),
        Quantize("gptq", 3, tables=8),
        Slice("width", mlp=0.5),
    )
    assert (found.calibration.length, found.held_out) == (64, 8)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "steps is empty"),
        ({"stepz": []}, "stepz is no key there; did you mean steps"),
        ({"steps": [{"quantise": "rtn"}]}, "a step begins with quantise; did you mean quantize"),
        ({"steps": [{"quantize": "gtpq"}]}, "quantize=gtpq is not one of .* did you mean gptq"),
        ({"steps": [{"quantize": "rtn", "bit": 4}]}, "bit is no key there; did you mean bits"),
        ({"steps": [{"quantize": "rtn", "bits": 1}]}, "bits=1 is not one of"),
        ({"steps": [{"quantize": "rtn", "keep": ["x"]}]}, "keep=x is not one of"),
        ({"steps": [{"prune": "wanda", "pattern": "2/4"}]}, "pattern=2/4 must be N:M, as 2:4 is"),
        ({"steps": [{"slice": "width"}]}, "slice=width must be given a share"),
        ({"steps": [{"slice": "depth"}]}, "keep=None must be a number for depth"),
        ({"steps": [{"slice": "depth", "keep": 3, "mlp": 0.5}]}, "slice=depth must be width for mlp"),
        (
            {"calibration": {"rows": 0}, "steps": [{"quantize": "rtn"}]},
            "calibration.rows=0 must be 1 or more",
        ),
    ],
)
def test_a_recipe_that_is_none_is_one_line(values, said):
    with pytest.raises(ValueError, match=said):
        recipe("mine", values)


@pytest.fixture(scope="module")
def run(ground):
    assert fit(ground.config("compressed", *STEPS)) == 0
    return ground.run("compressed")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name, steps in RECIPE.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**ROWS, "steps": steps}))  # JSON is YAML
    words = ",".join(str(folder / f"{name}.yaml") for name in RECIPE)
    assert main([str(run), f"recipe={words}", f"output={folder / 'out'}", "speed=false"]) == 0
    return folder / "out"


def test_an_artifact_is_opened_as_it_was_made(made):
    assert is_published(made / "packed")
    opened = open_published(str(made / "packed"), mesh_rules())
    model, params, _, _ = opened.trained
    assert model.config.vocab_size == opened.tokenizer.vocab_size  # rows of padding are nobody's
    mlp = params["segments"]["0"]["0"]["mlp"]
    assert isinstance(mlp["up"], QTensor) and mlp["up"].grid == 3
    zeros = np.asarray(merged(mlp["up"])).reshape(mlp["up"].shape[0], -1, 4, *mlp["up"].shape[2:]) == 0
    assert (zeros.sum(axis=2) >= 2).all()
    row = json.loads((made / "packed/compression.json").read_text())
    # Another process would find the same figure: what was judged is what was written.
    from compress.measure import sizes

    again = sizes(params, "float32")
    assert {key: row[key] for key in again} == pytest.approx(again)
    assert row["bits_a_weight"] < row["bits_stored"] < 12 and row["nonzero"] < 0.8


def test_a_file_for_llama_cpp_is_what_was_judged(run, tmp_path):
    levels = {"quantize": "rtn", "bits": 4, "group": 32, "symmetric": False, "tables": 8, "scales": "float16"}
    steps = {"levels": levels, "thin": {"factorize": "svd", "share": 0.5}}
    for name, step in steps.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**ROWS, "steps": [step]}))
    words = ",".join(str(tmp_path / f"{name}.yaml") for name in steps)
    out = tmp_path / "out"
    assert main([str(run), f"recipe={words}", f"output={out}", "speed=false", "format=gguf"]) == 0
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["rows"]}
    assert 4.5 < rows["levels"]["bits_stored"] < 8.5 and rows["thin"]["bits_stored"] == 32
    assert 16 < rows["thin"]["bits_a_weight"] < 32
    for name in steps:
        assert rows[name]["megabytes"] == pytest.approx((out / name / "model.gguf").stat().st_size / 1e6)
    opened = open_published(str(out / "levels/model.gguf"), mesh_rules())
    model, params, _, _ = opened.trained
    assert model.config.vocab_size == opened.tokenizer.vocab_size
    from compress.measure import sizes

    assert sizes(params, "float32")["nonzero"] == rows["levels"]["nonzero"]


def test_programs_for_jax_alone_have_the_levels(run, tmp_path):
    recipe = {**ROWS, "steps": [{"quantize": "rtn", "bits": 8, "tables": 8}]}
    (tmp_path / "levels.yaml").write_text(json.dumps(recipe))
    words = [f"recipe={tmp_path / 'levels.yaml'}", f"output={tmp_path / 'out'}", "speed=false"]
    assert main([str(run), *words, "format=stablehlo"]) == 0
    out = tmp_path / "out/levels"
    kinds = [str(kind) for _, kind, _, _ in Tensors(out).entries.values()]
    assert kinds.count("int8") > 4 and {path.name for path in out.glob("*.bin")} == {
        "begin.bin",
        "read.bin",
        "next.bin",
    }
    row = json.loads((out / "compression.json").read_text())
    assert row["megabytes"] == pytest.approx((out / "model.safetensors").stat().st_size / 1e6)


def test_a_sliced_model_is_what_a_run_may_begin_with(ground, made):
    words = (f"init_from={made / 'narrow'}", "model=parent", "tokenizer=inherit")
    assert fit(with_parent_model(ground.config("distilled", *STEPS, *words))) == 0
    assert ground.summary("distilled")["eval/loss"] > 0


def test_packed_weights_are_evaluated_and_begin_a_run_too(ground, made, tmp_path):
    lines = [json.dumps({"kind": "rolling", "text": "import a class and return it"})]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text("tasks:\n  texts: {file: texts.jsonl, metric: bits_per_byte}\n")
    words = [str(made / "packed"), f"suite={tmp_path / 'mine.yaml'}", f"output={tmp_path / 'result'}"]
    assert evaluate(words) == 0
    words = (f"init_from={made / 'packed'}", "model=parent", "tokenizer=inherit")
    assert fit(with_parent_model(ground.config("from_packed", *STEPS, *words))) == 0


def test_the_report_has_every_artifact_beside_the_dense_model(made):
    found = json.loads((made / "report.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[0] == "dense" and set(names[1:]) == set(RECIPE)
    dense, rows = found["rows"][0], {row["name"]: row for row in found["rows"]}
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and dense["flips"] == 0
    for name in RECIPE:
        row = rows[name]
        assert row["megabytes"] < dense["megabytes"] and row["kl"] > 0 and 0 <= row["flips"] < 1
        assert row["rise"] == pytest.approx(row["bits_per_byte"] / dense["bits_per_byte"] - 1)
        size = sum(path.stat().st_size for path in (made / name).glob("*.safetensors"))
        assert row["megabytes"] == pytest.approx(size / 1e6)
    page = (made / "report.html").read_text()
    assert "packed" in page and "data:image/png" in page
    assert (made / "report.md").read_text().count("\n| ") == len(names) + 2  # head and rule


def test_the_front_is_what_nothing_beats():
    rows = [
        {"name": name, "megabytes": size, "bits_per_byte": bits}
        for name, size, bits in (("a", 9, 1.0), ("b", 5, 1.1), ("c", 6, 1.2), ("d", 5, 1.3), ("e", 2, 1.5))
    ]
    assert [row["name"] for row in front(rows)] == ["e", "b", "a"]
    head, cells = table([*rows, {**rows[0], "tasks": {"arc": {"value": 0.5, "error": 0.01}}}])
    assert head == ["artifact", "MB", "bits per byte", "arc"] and cells[-1][-1] == "0.5 ± 0.01"
    assert markdown(rows).splitlines()[0] == "| artifact | MB | bits per byte |"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=int5"], "recipe=int5 is no recipe and no YAML file; did you mean int8?"),
        (["recipe=int8", "dtype=int8"], "dtype=int8 is not one of"),
        (["recipe=int8", "suite=tiny"], "suite=tiny is no suite"),
        (["recipe=int8", "family=lama"], "family=lama is not one of"),
        (["recipe=int8", "family=llama", "format=gguf"], "format=gguf must be hf for family"),
        (["recipe=int4", "format=stablehlo", "dtype=float16"], "dtype=float16"),
        (["recipe=int4", "format=gguf"], "scales=float32 must be float16 for format=gguf"),
        ([], "recipe=... is missing"),
    ],
)
def test_bad_words_are_one_line_and_status_2(run, words, said, capsys):
    assert main([str(run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_what_is_there_is_not_written_over(run, made, capsys):
    words = [str(run), f"recipe={made.parent / 'packed.yaml'}", f"output={made}"]
    assert main(words) == 2
    assert "is there already; remove it or choose another output" in capsys.readouterr().err


def test_an_unknown_run_is_named(capsys, tmp_path):
    assert main([str(tmp_path / "none"), "recipe=int8"]) == 2
    assert "is no run's name or directory" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
