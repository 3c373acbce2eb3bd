"""What bad input gets: one line that names key, value and remedy; status 2; nothing written."""

import os
import subprocess
import sys

import pytest

from configs.cli import main
from configs.groups import CONFIG_DIR

DEBUG = "+experiment=debug"
PLANES = "{kind: longrope, short_factor: [1, 1, 1, 1], long_factor: [1, 2, 3, 4]}"
DEBUG_8 = (DEBUG, "mesh.data=8")

# What was typed after `train.py`, and what the one line must contain.
BAD = {
    "nothing": ([], ["run.name", "+experiment=NAME"]),
    "bare name": (["quickstart"], ["quickstart", "+experiment=quickstart"]),
    "experiment without plus": (["experiment=debug"], ["did you mean +experiment=debug?"]),
    "unknown experiment": (["+experiment=quickstrat"], ["did you mean +experiment=quickstart?"]),
    "unknown group": ([DEBUG, "modle=modern"], ["modle", "did you mean model?"]),
    "unknown option": ([DEBUG, "optim=adamww"], ["optim=adamww", "did you mean optim=adamw?", "lion"]),
    "second optimizer": ([DEBUG, "+optim=lion"], ["drop the +", "optim=lion"]),
    "no optimizer": ([DEBUG, "~optim"], ["~optim", "optim=NAME"]),
    "unknown key": ([DEBUG, "model.num_layer=3"], ["model.num_layer ", "did you mean model.num_layers?"]),
    "key without room": ([DEBUG, "learning_rate=1"], ["did you mean optim.learning_rate?"]),
    "forced unknown key": ([DEBUG, "++model.num_layer=3"], ["did you mean model.num_layers?"]),
    "appended key": ([DEBUG, "+seed=1"], ["drop the +", "seed=1"]),
    "whole room": ([DEBUG, "training=3"], ["training", "training.num_steps"]),
    "another optimizer's key": (
        [DEBUG, "optim=adamw", "optim.momentum=0.9"],
        ["optim.momentum", "optim=muon"],
    ),
    "autoscale turned off": ([DEBUG, "autoscale=null"], ["leave a part out with ~autoscale"]),
    "autoscale thresholds": (
        [DEBUG, "autoscale=queue", "autoscale.grow_at=9"],
        ["autoscale.grow_at=9", "autoscale.shrink_at=4"],
    ),
    "deleted key": ([DEBUG, "~model.num_layers"], ["model.num_layers"]),
    "unknown flag": ([DEBUG, "--bogus"], ["--bogus", "--help"]),
    "key as a flag": (["--experiment", "debug"], ["--experiment", "without dashes", "+experiment=NAME"]),
    "unreadable override": ([DEBUG, "a=b=["], ["a=b=[", "quote"]),
    "text for a number": ([DEBUG, "model.num_layers=abc"], ["model.num_layers=abc", "whole number"]),
    "fraction for a count": ([DEBUG, "training.num_steps=1.5"], ["training.num_steps=1.5", "whole number"]),
    "null for a count": ([DEBUG, "model.num_layers=null"], ["model.num_layers", "whole number"]),
    "text for a list": ([DEBUG, "model.window_pattern=local"], ["model.window_pattern", "list[str]"]),
    "text for a switch": ([DEBUG, "deterministic=maybe"], ["deterministic=maybe", "true or false"]),
    "nan": ([DEBUG, "optim.learning_rate=nan"], ["optim.learning_rate=nan", "finite"]),
    "inf": ([DEBUG, "sample.temperature=inf"], ["sample.temperature=inf", "finite"]),
    "guard": ([DEBUG, "guard.skip_sigma=0"], ["guard.skip_sigma=0", "above 0, such as 6, or null"]),
    "rollback": (
        [DEBUG, "guard.rollback_batches=12", "guard.max_skips=5", "checkpoint.every=8"],
        ["guard.rollback_batches=12", "checkpoint.every=8", "guard.max_skips=5", "use 13 or more, or 0"],
    ),
    "choice": ([DEBUG, "model.norm=rmsnrom"], ["model.norm=rmsnrom", "layernorm", "did you mean rmsnorm?"]),
    "data choice": ([DEBUG, "data.packing=conkat"], ["data.packing=conkat", "did you mean concat?"]),
    "remat choice": ([DEBUG, "training.remat=ful"], ["training.remat=ful", "did you mean full?"]),
    "xla choice": ([DEBUG, "hardware.xla=gpu_clusters"], ["hardware.xla=", "did you mean gpu_cluster?"]),
    "zero layers": ([DEBUG, "model.num_layers=0"], ["model.num_layers=0"]),
    "no checkpoint": ([DEBUG, "checkpoint.keep=0"], ["checkpoint.keep=0", "1 or more"]),
    "eval batches": ([DEBUG, "eval.batches=0"], ["eval.batches=0", "-1"]),
    "tiny vocabulary": ([DEBUG, "tokenizer.vocab_size=100"], ["tokenizer.vocab_size=100", "257"]),
    "negative decay": ([DEBUG, "optim.weight_decay=-1"], ["optim.weight_decay=-1"]),
    "share": ([DEBUG, "data.validation_fraction=1.5"], ["data.validation_fraction=1.5"]),
    "run name": ([DEBUG, "run.name=../other"], ["run.name='../other'", "directory name"]),
    "folder without path": ([DEBUG, "data=folder"], ["data.source=folder", "data.path"]),
    "tfds without name": ([DEBUG, "data=tfds"], ["data.source=tfds", "data.name"]),
    "tokenizer without path": ([DEBUG, "tokenizer=file"], ["tokenizer.kind=file", "tokenizer.path"]),
    "streaming best_fit": (
        [DEBUG, "data.mode=streaming", "data.packing=best_fit"],
        ["data.packing=best_fit", "data.packing=concat"],
    ),
    "kv heads": (
        [DEBUG, "model.num_kv_heads=3"],
        ["model.num_kv_heads=3", "model.num_heads=8", "1, 2, 4, 8"],
    ),
    "odd head": ([DEBUG, "model.head_dim=7"], ["model.head_dim=7", "8"]),
    "window missing": ([DEBUG, "model.window_pattern=[local]"], ["model.window"]),
    "window unused": ([DEBUG, "model.window=16"], ["model.window=16", "local"]),
    "scaling without rope": (
        [DEBUG, "model.position=none", "model.rope_scaling.kind=yarn"],
        ["model.rope_scaling.kind=yarn", "model.position=rope"],
    ),
    "longrope beyond its length": (
        [DEBUG, "model.max_seq_len=32", f"model.rope_scaling={PLANES}"],
        ["data.seq_len=64", "model.max_seq_len=32", "longrope"],
    ),
    "positions": (
        [DEBUG, "model.position=learned", "model.max_seq_len=32"],
        ["data.seq_len=64", "model.max_seq_len=32"],
    ),
    "vocabulary": ([DEBUG, "model.vocab_size=200"], ["model.vocab_size=200", "257", "384"]),
    "warm-up": ([DEBUG, "schedule.warmup_steps=21"], ["schedule.warmup_steps=21", "training.num_steps=20"]),
    "warm-up meets decay": (
        [DEBUG, "schedule=wsd", "schedule.warmup_steps=18"],
        ["schedule.warmup_steps=18", "schedule.decay_fraction=0.2", "at most 16"],
    ),
    "batch over mesh": (
        [*DEBUG_8, "training.global_batch_size=12"],
        ["training.global_batch_size=12", "mesh.data=8", "8 or 16"],
    ),
    "batch over accumulation": (
        [DEBUG, "mesh.data=1", "training.accumulation_steps=3"],
        ["training.global_batch_size=8", "training.accumulation_steps=3", "6 or 9"],
    ),
    "heads over tensor": (
        [DEBUG, "mesh.data=1", "mesh.tensor=3"],
        ["model.num_heads=8", "mesh.tensor=3", "1, 2, 4, 8"],
    ),
    "width over fsdp": (
        [DEBUG, "mesh.data=1", "mesh.fsdp=3", "training.global_batch_size=9"],
        ["model.d_model=64", "mesh.fsdp=3"],
    ),
    "two free axes": ([DEBUG, "mesh.fsdp=-1"], ["mesh.data=-1", "mesh.fsdp=-1", "only one"]),
    "zero axis": ([DEBUG, "mesh.tensor=0"], ["mesh.tensor=0", "-1"]),
    "layers over stages": (
        [DEBUG, "mesh.data=1", "mesh.pipeline=4"],
        ["model.num_layers=2", "mesh.pipeline=4", "use mesh.pipeline=1, 2 or model.num_layers=4"],
    ),
    "schedule": ([DEBUG, "pipeline.schedule=1fb1"], ["pipeline.schedule=1fb1", "did you mean 1f1b?"]),
    "no microbatch": ([DEBUG, "pipeline.microbatches=0"], ["pipeline.microbatches=0", "1 or more"]),
    "no chunk": ([DEBUG, "pipeline.virtual_stages=0"], ["pipeline.virtual_stages=0", "1 or more"]),
    "accumulation in a pipeline": (
        [DEBUG, "mesh.data=1", "mesh.pipeline=2", "training.accumulation_steps=2"],
        ["training.accumulation_steps=2", "mesh.pipeline=2", "use training.accumulation_steps=1"],
    ),
    "microbatches over rows": (
        [DEBUG, "mesh.data=2", "mesh.pipeline=2"],
        ["training.global_batch_size=8", "mesh.data=2 * pipeline.microbatches=8", "microbatches=1, 2, 4"],
    ),
    "context attention": (
        [DEBUG, "context.attention=rings"],
        ["context.attention=rings", "did you mean ring?"],
    ),
    "positions over context": (
        [DEBUG, "mesh.data=1", "mesh.context=8", "context.attention=ring", "data.seq_len=72"],
        [
            "data.seq_len=72",
            "mesh.context=8 in zigzag order",
            "use data.seq_len=64, 80 or mesh.context=1, 2, 3",
        ],
    ),
    "experts of a dense model": (
        [DEBUG, "mesh.data=1", "mesh.expert=2"],
        ["mesh.expert=2", "model.moe=null", "use mesh.expert=1", "nearest legal meshes of 2 devices: mesh."],
    ),
    "slices of any size": (
        [DEBUG, "mesh=multi_slice", "mesh.replica=-1"],
        ["mesh.dcn.replica=-1", "1 or more"],
    ),
    "slices": ([DEBUG, "mesh.data=4", "+mesh.dcn.data=3"], ["mesh.dcn.data=3", "mesh.data=4", "1, 2, 4"]),
    "slices without plus": ([DEBUG, "mesh.dcn.data=2"], ["+mesh.dcn.data=SLICES"]),
    "slices of no axis": ([DEBUG, "+mesh.dcn.date=2"], ["mesh.dcn.date", "did you mean data?"]),
    "no slice": ([DEBUG, "+mesh.dcn.data=0"], ["mesh.dcn.data=0", "1 or more"]),
    "key inside of null": ([DEBUG, "model.moe.num_experts=0"], ["model.moe.num_experts=0", "positive"]),
    "room for null": ([DEBUG, "model.moe={experts: 4}"], ["model.moe.experts", "is not a key"]),
    "word for a room": ([DEBUG, "model.rope_scaling=yarn"], ["model.rope_scaling", "{kind: linear}", "null"]),
    "unknown key of experts": ([DEBUG, "model.moe.num_expert=4"], ["did you mean model.moe.num_experts?"]),
    "inner steps alone": (
        [DEBUG, "mesh.data=1", "local_sgd.inner_steps=5"],
        ["local_sgd.inner_steps=5", "mesh.replica=1", "use mesh.replica=2", "local_sgd.inner_steps=1"],
    ),
    "checkpoints between outer steps": (
        [DEBUG, "mesh.data=1", "mesh.replica=2", "local_sgd.inner_steps=4"],
        ["checkpoint.every=10", "local_sgd.inner_steps=4", "use checkpoint.every=8, 12"],
    ),
    "no inner step": ([DEBUG, "local_sgd.inner_steps=0"], ["local_sgd.inner_steps=0", "1 (synchronous)"]),
    "outer momentum": ([DEBUG, "local_sgd.outer_momentum=1"], ["local_sgd.outer_momentum=1", "below 1"]),
    "exchange": ([DEBUG, "local_sgd.exchange=int4"], ["local_sgd.exchange=int4", "did you mean int8?"]),
    "rule for nothing": ([DEBUG, "mesh.rules.embd=[fsdp]"], ["mesh.rules.embd", "did you mean embed?"]),
    "rule to nothing": ([DEBUG, "mesh.rules.embed=[fdsp]"], ["fdsp", "did you mean fsdp?"]),
    "new rule": ([DEBUG, "mesh.rules.positions=[fsdp]"], ["+mesh.rules.positions="]),
    "bad job in a sweep": (["-m", DEBUG, "model.num_layers=1,0"], ["model.num_layers=0"]),
    "bad option in a sweep": (["-m", DEBUG, "optim=adamw,loin"], ["did you mean optim=lion?"]),
    "one directory for two jobs": ([DEBUG, "-m", "seed=1,1"], ["runs/debug-seed=1"]),
}


def never(config):
    raise AssertionError("a malformed command must not reach training")


@pytest.mark.parametrize("case", BAD)
def test_malformed_command_gets_one_line_and_status_2_and_writes_nothing(case, tmp_path, monkeypatch, capfd):
    words, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main(never, words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("error: ")
    for fragment in expected:
        assert fragment in err
    assert list(tmp_path.iterdir()) == []


class Fault(Exception):
    """Stands for what training raises in mid-run."""


@pytest.mark.parametrize(
    "error, status, line",
    [
        (
            ValueError("data.path=x is not there;\n  give another"),
            2,
            "error: data.path=x is not there; give another\n",
        ),
        (FileNotFoundError(2, "No such file", "corpus"), 2, "error: [Errno 2] No such file: 'corpus'\n"),
        (Fault("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_the_task_raises_becomes_a_line_and_a_status(error, status, line, tmp_path, monkeypatch, capfd):
    def task(config):
        raise error

    monkeypatch.chdir(tmp_path)
    assert main(task, [DEBUG], faults=(Fault,)) == status
    assert capfd.readouterr().err == line


def test_a_defect_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def task(config):
        raise ZeroDivisionError("ours")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(task, [DEBUG])


def test_the_environment_and_the_command_line_are_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    assert main(lambda config: 0, [DEBUG]) == 0
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


def run_train(cwd, *words, **env):
    command = [sys.executable, str(CONFIG_DIR.parent / "train.py"), *words]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def test_the_command_itself_keeps_the_promise(tmp_path):
    done = run_train(tmp_path, DEBUG, "model.num_layers=abc")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: model.num_layers=abc has the wrong type; it takes a whole number\n"
    assert list(tmp_path.iterdir()) == []


def test_full_error_shows_the_traceback(tmp_path):
    done = run_train(tmp_path, DEBUG, "model.num_layers=abc", HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "ValidationError" in done.stderr
    assert done.stderr.endswith("it takes a whole number\n")
