"""PyTorch, from the same weights on the same tokens, takes the same steps: our mathematics is the field's."""

import json
import os
import subprocess

import jax
import numpy as np
import pytest

from benchmarks import gpu, jax_worker, kernels, step, versus_generate, versus_torch
from benchmarks.planner import plans
from benchmarks.workload import synthetic_batch
from models.transformer import build_model
from tests.configs.composing import config

REQUIRED = "CAMBRIAN_REQUIRE_TORCH"
STEPS = 10
TINY = (
    *versus_torch.COMMON,
    "model.num_layers=2",
    "model.d_model=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.d_ff=96",
    "model.vocab_size=384",
    "data.seq_len=32",
    "training.global_batch_size=4",
    "training.num_steps=10",
    "training.precision=float32",
    "schedule.warmup_steps=3",
    "optim.learning_rate=0.01",
)


def torch_python():
    try:
        return versus_torch.torch_python()
    except ValueError as error:
        message = f"NOT COMPARED WITH PYTORCH: {error}"
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(message)


def torch_losses(directory):
    """Of the PyTorch side of a job, eager, in a process of its own; one thread."""
    command = versus_torch.torch_command(torch_python(), directory, "eager", "float32", 1)
    done = subprocess.run(
        command, input=f"{STEPS}\n", capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1])["losses"])


def test_transformers_writes_the_same_text_of_the_same_weights(tmp_path):
    torch_python()
    words = [word for word in TINY if not word.startswith("training.precision")]
    flags = ["--rounds=1", "--rows=2", "--tokens=4", "--threads=1", f"--output={tmp_path}"]
    assert versus_generate.main([*flags, *words, "model.vocab_size=4096"]) == 0
    table = json.loads((tmp_path / "versus_generate.json").read_text("utf-8"))["table"]
    assert [row["equal tokens, %"] for row in table if "float32" in row["precision, rows"]] == [100, 100]


@pytest.mark.parametrize(
    "further", [(), ("model.tie_embeddings=false", "model.rope_scaling={kind: llama3, factor: 8}")]
)
def test_pytorch_has_the_same_losses_from_the_same_weights(tmp_path, further):
    torch_python()
    job = config(*TINY, *further)
    jax_worker.export(job, tmp_path, batches=3)
    with np.load(tmp_path / "arrays.npz") as arrays:
        work = jax_worker.load(job, arrays["tokens"], jax.devices()[:1])
    ours, theirs = np.array(work.losses(STEPS)), torch_losses(tmp_path)
    assert ours[0] - ours[-1] > 0.5  # ten steps that learn, or equality would say little of the optimizer
    difference = np.abs(theirs / ours - 1)
    print("relative difference by step:", difference)
    assert np.all(difference[:3] < 2e-6) and np.all(difference < 1e-5), difference


def test_a_torch_python_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(versus_torch.TORCH_PYTHON, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="make torch-env"):
        versus_torch.torch_python()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.activation=relu2", r"model\.activation=relu2"),
        ("model.qk_norm=true", r"model\.qk_norm=True"),
        ("optim=lion", r"optim\.name"),
        ("training.z_loss=0.001", r"training\.z_loss"),
        ("training.accumulation_steps=2", r"training\.accumulation_steps"),
    ],
)
def test_what_the_baseline_lacks_is_refused(override, key):
    with pytest.raises(ValueError, match=key):
        jax_worker.check_comparable(config(*TINY, override))


def test_packed_rows_restart_where_documents_do():
    batch = synthetic_batch(8, 64, 384, seed=1, packed=True)
    starts = np.diff(batch["segment_ids"], axis=1, prepend=0) > 0
    assert np.all(batch["positions"][starts] == 0) and np.all(batch["segment_ids"][:, 0] == 1)
    assert np.all(np.diff(batch["positions"], axis=1)[~starts[:, 1:]] == 1)
    assert batch["segment_ids"].max() > 2
    assert np.all(batch["loss_weights"][:, :-1] == ~starts[:, 1:])
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    whole = synthetic_batch(8, 64, 384, seed=1, packed=False)
    assert np.all(whole["segment_ids"] == 1) and np.all(whole["loss_weights"] == 1)


def test_ratios_pair_ours_with_theirs_of_one_precision():
    samples = {
        "jax:float32": [1.0],
        "eager:float32": [2.0],
        "compile:bfloat16": [0.5],
        "jax:bfloat16": [0.25],
    }
    found = {name: value["median"] for name, value in versus_torch.ratios(samples).items()}
    assert found == {"jax:float32 / eager:float32": 2.0, "jax:bfloat16 / compile:bfloat16": 2.0}


@pytest.mark.parametrize(
    ("text", "says"), [("eager:float32", "nothing of ours"), ("flax:float32", "flax:float32 is none")]
)
def test_variants_are_checked(text, says):
    with pytest.raises(ValueError, match=says):
        versus_torch.check_variants(text)


def test_gpu_commands_are_commands_of_ours():
    """None of them can be run where the suite is, so that at least their words are held to be legal."""
    for module, *words in (command for commands in gpu.PARTS.values() for command in commands):
        if module == "step":
            asked, overrides = step.arguments().parse_known_args(words)
            assert asked.name and config(*overrides).training.precision == "bfloat16"
        elif module == "versus_torch":
            asked, overrides = versus_torch.arguments().parse_known_args(words)
            assert asked.shape in versus_torch.SHAPES and not overrides
            versus_torch.check_variants(asked.variants)
        elif module == "planner":
            assert words == ["predicted", "--hardware", "h200"]
        else:
            assert module == "kernels" and kernels.arguments().parse_args(words).vocab == 50304


@pytest.mark.parametrize(("shape", "parameters"), [("124m", 124.4), ("350m", 354.8), ("1.34b", 1336.3)])
def test_what_is_planned_and_measured_is_of_the_size_that_it_is_called(shape, parameters):
    made = config(*plans.PREDICTED[shape], "hardware=h200", "hardware.topology=1x1")
    assert build_model(made.model).num_params()["total"] / 1e6 == pytest.approx(parameters, rel=5e-3)


@pytest.mark.parametrize(("shape", "parameters"), [("cpu", 11.0), ("124m", 123.6), ("1.34b", 1336.3)])
def test_shapes_are_of_the_size_that_they_are_called(shape, parameters):
    made = config(*versus_torch.COMMON, *versus_torch.SHAPES[shape])
    jax_worker.check_comparable(made)
    assert build_model(made.model).num_params()["total"] / 1e6 == pytest.approx(parameters, rel=2e-3)
