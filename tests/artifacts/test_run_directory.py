"""A run's directory: whole or not at all, one process at a time, and only for the config that made it."""

import copy
import errno
import importlib
import json
import os
import subprocess
import sys
from dataclasses import MISSING, asdict, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import pytest
import yaml

from artifacts.directory import differing_keys, is_frozen, open_run
from artifacts.manifest import build_manifest, git_state
from models.config import (
    DeltaConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    MultipliersConfig,
    RopeScaling,
)
from optim.config import OPTIMIZERS, SCHEDULES, AdamWConfig, OptimConfig, ScheduleConfig, WSDConfig
from parallel.config import AutoscaleConfig
from parallel.hardware import DeviceConfig, HardwareConfig, LinkConfig
from training.config import AdapterConfig, Config, LocalSGDConfig
from training.setup import as_now

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "dir": "runs/a"},
    "seed": 0,
    "deterministic": False,
    "init_from": None,
    "model": asdict(ModelConfig(d_model=256)),
    "data": {"source": "stdlib", "path": None, "seq_len": 256, "workers": 2, "cache_dir": ".cache"},
    "tokenizer": {"kind": "bpe", "vocab_size": 4096},
    "mesh": {"data": -1, "rules": {"embed": ["fsdp"]}},
    "hardware": {"peak_tflops": None},
    "optim": {"name": "adamw", "learning_rate": 3e-4},
    "schedule": {"name": "cosine", "warmup_steps": 10},
    "training": {
        "num_steps": 100,
        "global_batch_size": 8,
        "accumulation_steps": 1,
        "precision": "auto",
        "full_precision": [],
        "remat": "none",
        "scan_layers": True,
        "attention": "reference",
        "loss_chunk": 512,
        "z_loss": 0.0,
        "ema_decay": None,
    },
    "checkpoint": {"every": 20, "directory": None},
    "eval": {"every": 20},
    "sample": {"prompts": ["é\u0085 : # '\"\n"]},
    "logging": {"every": 20},
}
FROZEN = {
    "seed": 1,
    "init_from": "other",
    "model.d_model": 512,
    "model.window_pattern": ["local", "global"],
    "data.seq_len": 128,
    "data.source": "folder",
    "tokenizer.vocab_size": 512,
    "optim.name": "lion",
    "optim.learning_rate": 1e-4,
    "schedule.warmup_steps": 11,
    "training.global_batch_size": 16,
    "training.precision": "bfloat16",
    "training.full_precision": ["o"],
    "training.z_loss": 1e-4,
    "training.ema_decay": 0.999,
    "training.num_steps": 200,
    "checkpoint.directory": "s3://bucket/run",
}
FREE = {
    "run.dir": "elsewhere/a",
    "deterministic": True,
    "data.workers": 1,
    "data.cache_dir": "/tmp/x",
    "data.path": "/moved",
    "mesh.data": 2,
    "mesh.rules": {"embed": ["tensor"]},
    "hardware.peak_tflops": 1.0,
    "training.accumulation_steps": 2,
    "training.remat": "full",
    "training.scan_layers": False,
    "training.attention": "chunked",
    "training.loss_chunk": 256,
    "checkpoint.every": 5,
    "eval.every": 5,
    "sample.prompts": [],
    "logging.every": 1,
}


def _with(key, value, config=CONFIG):
    config = copy.deepcopy(config)
    *groups, leaf = key.split(".")
    tree = config
    for group in groups:
        tree = tree[group]
    tree[leaf] = value
    return config


def _manifest(data="d", tokenizer="t", diff=""):
    return {
        "created": "now",
        "host": "h",
        "git": {"sha": "s", "diff": diff},
        "data": {"digest": data},
        "tokenizer": {"digest": tokenizer},
        "restarts": [],
    }


def _make(path, config=CONFIG, **facts):
    run = open_run(config, path)
    run.begin(_manifest(**facts))
    run.close()


def _tree(path):
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def _refused(config, path, match, kind=ValueError):
    before = _tree(path.parent) if path.parent.is_dir() else None
    with pytest.raises(kind, match=match) as caught:
        open_run(config, path)
    assert "\n" not in str(caught.value)
    assert before is None or _tree(path.parent) == before
    return str(caught.value)


def test_a_run_is_found_again_by_its_directory(tmp_path):
    path = tmp_path / "deep" / "runs" / "a"
    run = open_run(CONFIG, path)
    assert not run.resuming and list(tmp_path.iterdir()) == []
    run.begin(_manifest(diff="--- a\n+++ b\n"))
    run.close()
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    assert (path / "git.diff").read_text() == "--- a\n+++ b\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a"]
    again = open_run(CONFIG, path)
    assert again.resuming and again.changed == {}
    again.close()


def test_an_empty_directory_is_taken(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    _make(path)
    assert (path / "config.yaml").exists()


def typed(value):
    """A value as on a command line."""
    return "null" if value is None else str(value).replace("'", "").replace(", ", ",")


@pytest.mark.parametrize("key", FROZEN)
def test_a_key_that_makes_another_run_is_refused_with_both_values(tmp_path, key):
    path = tmp_path / "a"
    _make(path)
    message = _refused(_with(key, FROZEN[key]), path, "another configuration")
    old: Any = CONFIG
    for part in key.split("."):
        old = old[part]
    assert f"{key} is {typed(old)} there and {typed(FROZEN[key])} now" in message
    assert "run.name=" in message and "init_from=a" in message


@pytest.mark.parametrize("key", FREE)
def test_a_key_that_only_says_where_or_what_to_log_may_change(tmp_path, key):
    path = tmp_path / "a"
    _make(path)
    config = _with(key, FREE[key])
    run = open_run(config, path)
    assert run.resuming and run.changed
    run.begin(_manifest(), resume_step=40)
    run.close()
    stored = json.loads((path / "manifest.json").read_text())
    assert len(stored["restarts"]) == 1 and stored["restarts"][0]["step"] == 40
    assert stored["restarts"][0]["config"] == json.loads(
        json.dumps({k: list(v) for k, v in run.changed.items()})
    )
    # The changed value is now the run's: the same command resumes without a difference.
    again = open_run(config, path)
    assert again.changed == {}
    again.close()


def test_every_key_is_either_frozen_or_free_here():
    named = {k.split(".")[0] for k in (*FROZEN, *FREE)}
    assert named == set(CONFIG)
    for key in FROZEN:
        assert is_frozen(key, CONFIG)
    for key in FREE:
        assert not is_frozen(key, CONFIG)
    assert is_frozen("data.mixture.code.weight", CONFIG)
    assert not is_frozen("data.mixture.code.path", CONFIG)  # may move, as data.path may


@pytest.mark.parametrize(
    "schedule, frozen", [("constant", False), ("wsd", False), ("cosine", True), ("linear", True)]
)
def test_the_number_of_steps_may_change_only_where_the_past_does_not_know_it(tmp_path, schedule, frozen):
    path = tmp_path / "a"
    config = _with("schedule.name", schedule)
    _make(path, config)
    longer = _with("training.num_steps", 200, config)
    if frozen:
        assert "schedule=constant" in _refused(longer, path, r"training\.num_steps is 100 there and 200 now")
    else:
        open_run(longer, path).close()


def test_differences_are_symmetric_and_absent_keys_count():
    other = _with("model.d_model", 512)
    other["optim"]["learning_rate"] = 1e-3
    shorter = copy.deepcopy(CONFIG)
    del shorter["optim"]["learning_rate"]
    assert differing_keys(other, shorter) == {
        "model.d_model": (512, 256),
        "optim.learning_rate": (1e-3, "(absent)"),
    }
    assert differing_keys(shorter, other)["optim.learning_rate"] == ("(absent)", 1e-3)
    assert differing_keys(CONFIG, other) == {
        "model.d_model": (256, 512),
        "optim.learning_rate": (3e-4, 1e-3),
    }
    assert differing_keys(other, CONFIG) == {
        key: pair[::-1] for key, pair in differing_keys(CONFIG, other).items()
    }
    assert differing_keys(CONFIG, copy.deepcopy(CONFIG)) == {}


def whole_configs():
    """A config of every optimizer, and of every schedule, with every optional group there."""
    groups = {"autoscale": AutoscaleConfig(), "local_sgd": LocalSGDConfig(), "adapter": AdapterConfig()}
    sizes = {"num_kv_heads": 8, "head_dim": 192}
    parts = {"moe": MoEConfig(), "mla": MLAConfig(), "mtp": MTPConfig(), "rope_scaling": RopeScaling()}
    model = ModelConfig(**sizes, **parts, delta=DeltaConfig())
    hardware = HardwareConfig(device=DeviceConfig())
    for optim, schedule in zip_longest(OPTIMIZERS, SCHEDULES):
        yield Config(
            model=model,
            hardware=hardware,
            optim=(optim or OPTIMIZERS[0])(),
            schedule=(schedule or SCHEDULES[0])(),
            **groups,
        )
    # Further tokens refuse multipliers.
    multiplied = ModelConfig(**sizes, multipliers=MultipliersConfig())
    yield Config(model=multiplied, optim=OPTIMIZERS[0](), schedule=SCHEDULES[0]())


def keys_of(config, prefix=()):
    """Every field of every dataclass below, as (path, type of the dataclass, field)."""
    for item in fields(config):
        yield (*prefix, item.name), type(config), item
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from keys_of(value, (*prefix, item.name))


def without(tree, path):
    """A copy without one key."""
    tree = copy.deepcopy(tree)
    below = tree
    for part in path[:-1]:
        below = below[part]
    del below[path[-1]]
    return tree


def test_a_key_that_came_later_had_its_default_in_every_config_dataclass():
    """Runs outlive the version that began them: each key in turn is taken for one that did not exist then."""
    met = set()
    for config in whole_configs():
        stored = asdict(config)
        for path, kind, item in keys_of(config):
            had = differing_keys(as_now(without(stored, path), config), stored)
            value = getattr_path(config, path)
            default = item.default if item.default is not MISSING else item.default_factory()
            if path == ("model", "mtp", "normed_stream"):  # further tokens were once predicted from another
                assert had == {"model.mtp.normed_stream": (False, True)}
            elif value == default:
                assert had == {}, path
            else:
                assert had and all(key.startswith(".".join(path)) for key in had), path
            met.add(kind)
    known = {kind for kind in vars_of_config_modules() if kind not in (OptimConfig, ScheduleConfig)}
    assert known == met | {LinkConfig}  # of which a datasheet has a list, one value


def getattr_path(config, path):
    """The value at a path of fields."""
    for part in path:
        config = getattr(config, part)
    return config


def vars_of_config_modules():
    """Every dataclass that the root's tree can hold, found by its name in the modules that define them."""
    modules = ("data", "models", "optim", "parallel", "training", "artifacts", "serving")
    loaded = [importlib.import_module(f"{name}.config") for name in modules]
    loaded.append(importlib.import_module("parallel.hardware"))
    made = {value for module in loaded for value in vars(module).values() if isinstance(value, type)}
    return {value for value in made if is_dataclass(value) and value.__name__.endswith(("Config", "Scaling"))}


def test_a_field_added_to_a_dataclass_does_not_refuse_earlier_runs(tmp_path):
    """As the next version would have it: a subclass of every group with one field more."""
    config = Config(optim=AdamWConfig(), schedule=WSDConfig())
    path = tmp_path / "a"
    _make(path, asdict(config))
    grown = {
        item.name: make_dataclass(
            f"Grown{item.name}",
            [("new_key", int, field(default=7))],
            bases=(type(getattr(config, item.name)),),
        )()
        for item in fields(config)
        if is_dataclass(getattr(config, item.name))
    }
    later = replace(config, **grown)
    open_run(asdict(later), path, partial(as_now, config=later)).close()
    later.model.new_key = 8
    with pytest.raises(ValueError, match=r"model\.new_key is 7 there and 8 now"):
        open_run(asdict(later), path, partial(as_now, config=later))


def test_many_differences_stay_one_line(tmp_path):
    path = tmp_path / "a"
    _make(path)
    config = CONFIG
    for key, value in FROZEN.items():
        config = _with(key, value, config)
    message = _refused(config, path, "another configuration")
    assert f"{len(FROZEN) - 6} more" in message and len(message) < 900


@pytest.mark.parametrize("kind", ["data", "tokenizer"])
def test_data_or_tokenizer_that_changed_under_the_run_are_refused(tmp_path, kind):
    path = tmp_path / "a"
    _make(path)
    before = _tree(path)
    run = open_run(CONFIG, path)
    with pytest.raises(ValueError, match=f"other {kind} .*run.name="):
        run.begin(_manifest(**{kind: "changed"}))
    assert _tree(path) == before
    _make(path)  # and the lock is free again


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", b"just text", b"", b"a: 1\n\tb: 2"])
def test_a_corrupt_config_is_one_line(tmp_path, content):
    path = tmp_path / "a"
    _make(path)
    (path / "config.yaml").write_bytes(content)
    assert "run.name=" in _refused(CONFIG, path, r"config\.yaml cannot be read")


def test_a_corrupt_manifest_is_one_line(tmp_path):
    path = tmp_path / "a"
    _make(path)
    (path / "manifest.json").write_text("{")
    _refused(CONFIG, path, r"manifest\.json cannot be read")


def test_what_is_no_run_of_ours_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    _refused(CONFIG, tmp_path / "a", "no config.yaml.*run.name=")
    (tmp_path / "b").write_text("x")
    _refused(CONFIG, tmp_path / "b", "is a file.*run.name=")
    _refused(CONFIG, tmp_path / "b" / "runs" / "c", "b is a file.*run.dir=")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    _refused(CONFIG, tmp_path / "link", "run.name=")


def test_a_parent_that_cannot_be_written_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    _refused(CONFIG, tmp_path / "runs" / "a", "cannot be written.*run.dir=", OSError)


@pytest.mark.parametrize("code, remedy", [(errno.EROFS, "writable"), (errno.ENOSPC, "free space")])
@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir"])
def test_a_refusing_disk_leaves_nothing_half_written(tmp_path, monkeypatch, code, remedy, call):
    run = open_run(CONFIG, tmp_path / "runs" / "a")

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match=f"runs/a: {os.strerror(code)}; .*{remedy}"):
            run.begin(_manifest())
    assert list(tmp_path.iterdir()) == []
    _make(tmp_path / "runs" / "a")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusing_disk_on_resume_keeps_the_old_start(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    _make(path)
    before = _tree(path)
    run = open_run(_with("mesh.data", 2), path)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        run.begin(_manifest())
    assert _tree(path) == before


def test_a_start_killed_before_its_name_is_swept_up(tmp_path):
    stale = tmp_path / ".a.00000000.tmp"
    stale.mkdir()
    (stale / "config.yaml").write_text("seed: 1")
    other = tmp_path / ".ab.00000000.tmp"
    other.mkdir()
    _make(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".ab.00000000.tmp", "a"]


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    path = tmp_path / "a"
    _make(path)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from artifacts.directory import _lock\nfrom pathlib import Path\n"
        "_lock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        _refused(CONFIG, path, "in use by another process.*run.name=")
        other.kill()
        other.wait()
    open_run(CONFIG, path).close()


def test_of_two_that_make_the_same_run_one_wins(tmp_path):
    path = tmp_path / "a"
    first, second = open_run(CONFIG, path), open_run(CONFIG, path)
    first.begin(_manifest())
    with pytest.raises(ValueError, match="made by another process"):
        second.begin(_manifest())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    _refused(CONFIG, path, "in use")  # the winner's lock holds from before the directory had its name
    first.close()


def test_restarts_say_what_was_different(tmp_path):
    path = tmp_path / "a"
    _make(path)
    for host in ("h", "other"):
        run = open_run(CONFIG, path)
        run.begin({**_manifest(diff="changed\n"), "host": host}, resume_step=7)
        run.close()
    restarts = json.loads((path / "manifest.json").read_text())["restarts"]
    assert [r.get("host") for r in restarts] == [None, "other"]
    assert (path / "git.restart2.diff").read_text() == "changed\n"


def test_a_start_knows_which_facts_behind_the_last_bits_are_not_the_first_ones(tmp_path):
    facts = {**_manifest(), "mesh": {"data": 8}, "packages": {"jax": "1"}}
    first = open_run(CONFIG, tmp_path / "a")
    first.begin(facts)
    first.close()
    again = open_run(CONFIG, tmp_path / "a")
    assert again.other_bits({**facts, "host": "another", "scheduler": {}}) == []
    assert again.other_bits({**facts, "mesh": {"data": 4}, "packages": {"jax": "2"}}) == ["packages", "mesh"]
    again.close()


def test_the_manifest_holds_what_reproduces_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    manifest = build_manifest(CONFIG, prepared_digest="d", tokenizer_digest="t", mesh={"data": 8})
    assert manifest["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert manifest["mesh"] == {"data": 8} and manifest["seed"] == 0
    assert manifest["scheduler"] == {"SLURM_JOB_ID": "17"}
    assert "XLA_FLAGS" in manifest["environment"] and "secret" not in json.dumps(manifest)
    assert {"jax", "flax", "optax", "numpy"} <= set(manifest["packages"])
    assert len(manifest["locks"]["requirements.lock"]) == 64
    assert manifest["threads"]["affinity"] >= 1


def test_git_state_has_commit_diff_and_untracked_and_is_none_outside(tmp_path, monkeypatch):
    monkeypatch.delenv("CAMBRIAN_COMMIT", raising=False)
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "code.py").write_text("x = 1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = git_state(tmp_path)
    assert clean is not None and len(clean["sha"]) == 40 and clean["diff"] == "" and clean["untracked"] == []
    (tmp_path / "code.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("")
    dirty = git_state(tmp_path)
    assert (
        dirty is not None
        and "+x = 2" in dirty["diff"]
        and len(dirty["diff_sha256"]) == 64
        and dirty["untracked"] == ["new.py"]
    )
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") is None


def test_an_image_says_what_commit_it_was_built_from(tmp_path, monkeypatch):
    for told, known in (("", False), ("unknown", False), ("c0ffee-dirty", True)):
        monkeypatch.setenv("CAMBRIAN_COMMIT", told)
        state = git_state(tmp_path)
        assert (state is not None) is known
    assert state["sha"] == "c0ffee-dirty" and state["from"] == "CAMBRIAN_COMMIT"
