"""scripts/checkpoint.py names what is damaged, what differs, and writes weights that others can read."""

import gc
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from artifacts.checkpoints.files import LIST, list_files
from artifacts.checkpoints.record import named_leaves
from data.config import TokenizerConfig
from data.tokens.tokenizer import AGREED, CONTRADICTED, train_tokenizer
from scripts.checkpoint import main
from tests.training.ground import DROPPED
from tests.training.states import flip, make_state, written

pytestmark = DROPPED


@pytest.fixture
def dropped_reads():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "one"
    run.mkdir()
    (run / "config.yaml").write_text("checkpoint:\n  directory: null\n")
    (run / "tokenizer.json").write_text("{}")
    written(run / "checkpoints", make_state(1), make_state(2)).close()
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "one")


def data_files(run, step):
    return sorted(p for p in (run / "checkpoints" / str(step) / "params").rglob("*") if p.parent.name == "d")


def test_a_sound_run_is_said_to_be_and_listed(made, capsys):
    assert main(["verify", str(made), "all=true"]) == 0
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == ["1: sound", "2: sound"]
    assert main(["list", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2"]
    assert all(line.endswith("files verified") and " 96 " in line for line in lines[1:])


def test_each_bad_file_and_array_is_named(run, capsys, dropped_reads):
    file = data_files(run, 2)[0]
    file.write_bytes(flip(file.read_bytes(), np.random.default_rng(0)))
    (run / "checkpoints" / "2" / "ema" / "_METADATA").unlink()
    name = file.relative_to(run / "checkpoints" / "2").as_posix()
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"2: {name} is altered (sha256)" in out and "2: ema/_METADATA is missing" in out
    assert out.splitlines()[-1].startswith("2: DAMAGED")
    assert main(["verify", str(run), "step=1"]) == 0
    capsys.readouterr()
    assert main(["list", str(run)]) == 1
    assert "DAMAGED: 2 files, first ema/_METADATA, which is missing" in capsys.readouterr().out


def test_an_array_that_the_list_vouches_for_is_still_verified(run, capsys, dropped_reads):
    """Altered before it was hashed: here, the arrays of another step."""
    step = run / "checkpoints" / "2"
    shutil.rmtree(step / "params")
    shutil.copytree(run / "checkpoints" / "1" / "params", step / "params")
    (step / LIST).unlink()
    list_files(step)
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "2: params.rest.scale is altered (digest)" in out and "is altered (sha256)" not in out


def test_without_its_list_arrays_are_verified_and_that_is_said(run, capsys):
    (run / "checkpoints" / "2" / LIST).unlink()
    assert main(["verify", str(run)]) == 0
    assert f"sound (no {LIST}" in capsys.readouterr().out
    assert not (run / "checkpoints" / "2" / LIST).exists()  # a tool changes nothing


def test_what_differs_is_named_with_its_size(run, capsys):
    assert main(["diff", str(run), f"{run}:2"]) == 0
    assert capsys.readouterr().out.startswith("0 arrays differ")
    assert main(["diff", f"{run}:1", str(run)]) == 3
    out = capsys.readouterr().out
    a, b = (np.asarray(make_state(s).params["rest"]["scale"], np.float64) for s in (1, 2))
    relative = np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max())
    assert f"params.rest.scale: float32[8], 8 of 8 values, relative {relative:.3g}" in out


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("weights", ("raw", "ema"))
def test_exported_weights_are_read_by_another_reader(made, tmp_path, dtype, weights):
    out = tmp_path / "out"
    words = [f"output={out}", f"dtype={dtype}", f"weights={weights}", "step=1"]
    assert main(["export", str(made), *words]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "model.safetensors", "tokenizer.json"]
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        read = ocp.load(out / "model.safetensors")
    state = make_state(1)
    wanted = named_leaves(state.ema if weights == "ema" else state.params)
    assert read.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert read[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(read[name]), np.asarray(leaf.astype(jnp.dtype(dtype))))


def test_the_exported_tokenizer_agrees_with_itself(run, tmp_path):
    """That of a run made when the list of added tokens had another id for the separator."""
    trained = train_tokenizer(["some text"], TokenizerConfig(vocab_size=257))._text
    (run / "tokenizer.json").write_bytes(trained.replace(AGREED, CONTRADICTED).encode())
    assert main(["export", str(run), f"output={tmp_path / 'out'}"]) == 0
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_bytes())
    (token,) = content["added_tokens"]
    assert token["id"] == content["model"]["vocab"][token["content"]] == 0


def test_nothing_damaged_is_exported(run, tmp_path, capsys, dropped_reads):
    for file in data_files(run, 2):
        file.write_bytes(file.read_bytes()[:100])
    assert main(["export", str(run), f"output={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "no_such_run"], "is no run's name"),
        (["verify", "{run}", "step=7"], "use latest or one of 1, 2"),
        (["export", "{run}", "output={run}"], "is there already"),
        (["diff", "{run}:x", "{run}"], "is no RUN:STEP"),
        (["fetch", "{run}", "{run}/back"], "is no URL"),
        (["fetch", "file://{run}", "{run}/back"], "holds no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_status_2(made, capsys, words, said):
    assert main([word.format(run=made) for word in words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
