"""What a good command does: help without waiting, the resolved config, sweeps whose jobs never meet."""

import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import yaml

import train
from common.checks import ConfigError
from configs.cli import main, override_suffix
from configs.groups import CONFIG_DIR, groups, options
from configs.optional_groups import opened, optional_rooms
from models.config import MoEConfig, RopeScaling
from tests.configs.composing import config
from training.config import Config
from training.legal.check import check, mesh_sizes

HEAVY = "jax flax optax orbax numpy tensorflow_datasets tokenizers matplotlib rich".split()


def never(config):
    raise AssertionError("nothing was to be run")


def test_help_lists_every_experiment_group_and_option(capsys):
    assert main(never, ["--help"]) == 0
    page = capsys.readouterr().out
    for group in groups():
        for name in options(group):
            assert name in page
    assert "+experiment=NAME" in page
    assert max(map(len, page.splitlines())) <= 140


def test_help_and_a_typo_wait_for_nothing_heavy(tmp_path):
    """Not a timing: the modules that cost the time must not have been imported."""
    script = (
        "import runpy, sys\n"
        "def run(*words):\n"
        "    sys.argv = ['train.py', *words]\n"
        "    try:\n"
        f"        runpy.run_path({str(CONFIG_DIR.parent / 'train.py')!r}, run_name='__main__')\n"
        "    except SystemExit as done:\n"
        "        return done.code\n"
        "assert run('--help') == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "assert run('+experiment=debgu') == 2\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(CONFIG_DIR.parent)}
    )
    assert done.returncode == 2, done.stderr  # the last word's, by which the process ends
    after_help, message, after_typo = done.stderr.splitlines()
    assert (after_help, after_typo) == ("[]", "[]")
    assert "did you mean +experiment=debug?" in message


def test_cfg_job_prints_what_a_run_would_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(never, ["+experiment=debug", "--cfg", "job", "seed=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["run"]["dir"] == "runs/debug"
    assert printed["seed"] == 7
    assert printed["optim"]["name"] == "adamw"
    assert list(tmp_path.iterdir()) == []


def test_a_run_gets_its_config_and_gives_its_status(tmp_path, monkeypatch):
    seen = []

    def task(config):
        seen.append(config)
        return 75

    monkeypatch.chdir(tmp_path)
    assert main(task, ["+experiment=debug", "optim=muon", "optim.ns_steps=3"]) == 75
    (made,) = seen
    assert isinstance(made, Config)
    assert made == config("+experiment=debug", "optim=muon", "optim.ns_steps=3")
    assert list(tmp_path.iterdir()) == []  # the run's directory is training's to make


def swept(tmp_path, monkeypatch, *words):
    directories = []

    def task(config):
        directories.append(config.run.dir)
        return len(directories) - 1

    monkeypatch.chdir(tmp_path)
    status = main(task, list(words))
    assert status == len(directories) - 1  # the worst of all, though the others ran
    return directories


def test_jobs_of_a_sweep_have_directories_of_their_own(tmp_path, monkeypatch):
    assert swept(tmp_path, monkeypatch, "+experiment=debug", "-m", "optim.learning_rate=0.1,0.2") == [
        "runs/debug-optim.learning_rate=0.1",
        "runs/debug-optim.learning_rate=0.2",
    ]
    assert list(tmp_path.iterdir()) == []  # the runs are training's to make, and Hydra leaves nothing


def test_a_swept_experiment_is_named_by_itself_unless_one_name_was_given(tmp_path, monkeypatch):
    assert swept(tmp_path, monkeypatch, "-m", "+experiment=debug,quickstart") == [
        "runs/debug",
        "runs/quickstart",
    ]
    named = swept(tmp_path, monkeypatch, "-m", "+experiment=debug,quickstart", "run.name=x")
    assert named == ["runs/x-experiment=debug", "runs/x-experiment=quickstart"]


def test_a_suffix_is_a_directory_name_and_different_for_different_overrides():
    pairs = [("data.path=/a/b", "data.path=/a_b"), ("init_from=" + "a" * 300, "init_from=" + "a" * 299 + "b")]
    for one, other in pairs:
        suffixes = override_suffix([one]), override_suffix([other])
        assert suffixes[0] != suffixes[1]
        for suffix in suffixes:
            config("+experiment=debug", f"run.name='debug-{suffix}'")  # RunConfig takes it


def test_another_package_named_data_is_noticed(monkeypatch):
    assert train.foreign_data() is None
    monkeypatch.setattr(
        train, "find_spec", lambda name: ModuleSpec(name, None, origin="/else/data/__init__.py")
    )
    assert train.foreign_data() == "/else/data/__init__.py"
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert train.foreign_data() == "nowhere"


@pytest.mark.parametrize(
    "mesh, devices, sizes",
    [
        (["mesh=data"], 8, {"data": 8}),
        (["mesh=fsdp_tensor", "mesh.tensor=2"], 8, {"fsdp": 4, "tensor": 2}),
        (["mesh=single"], 1, {}),
    ],
)
def test_a_free_axis_takes_what_is_left(mesh, devices, sizes):
    made = mesh_sizes(config("+experiment=debug", *mesh).mesh, devices)
    assert made is not None
    assert {axis: size for axis, size in made.items() if size > 1} == sizes


@pytest.mark.parametrize(
    "mesh, devices, message",
    [
        (["mesh.data=3"], 8, "mesh.data=3 is 3 devices but 8 are here"),
        (["mesh.tensor=3"], 8, "does not divide 8 devices; the sizes must multiply to one of 1, 2, 4, 8"),
        ([], 6, "use a multiple of 6, such as 6 or 12"),
        (["mesh=fsdp", "model.d_model=60"], 8, "model.d_model=60 cannot be split over mesh.fsdp=8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, devices, message):
    made = config("+experiment=debug", *mesh)
    with pytest.raises(ConfigError, match=message):
        check(made, devices)


@pytest.mark.parametrize("tensor", [4, 8])
def test_fewer_kv_heads_than_tensor_devices_are_legal(tensor):
    made = config("+experiment=debug", "mesh.data=1", f"mesh.tensor={tensor}")
    assert made.model.num_kv_heads == 4
    check(made, tensor)


def test_a_part_that_is_null_opens_with_its_defaults_where_a_word_sets_something_in_it():
    rooms = list(optional_rooms(Config))
    assert {"model.moe", "model.mla", "model.mtp", "model.rope_scaling"} <= set(rooms)
    for room in rooms:  # every one, whatever comes to be
        assert opened([f"{room}.x=1"], Config) == [f"+_room=[{room}]", f"{room}.x=1"]
        assert opened([f"{room}=null"], Config) == [f"{room}=null"]
    assert config("+experiment=debug").model.moe is None
    words = ("model.moe.num_experts=4", "model.rope_scaling={kind: yarn}")
    model = config("+experiment=debug", *words).model
    assert model.moe == MoEConfig(num_experts=4) and model.rope_scaling == RopeScaling("yarn")
    kept = config("+experiment=debug_moe", "model.moe.num_experts=16").model.moe
    assert kept.num_experts == 16 and kept.score == "sigmoid"
    assert config("+experiment=debug_moe", "model.moe=null", "model.mla=null").model.moe is None


def test_a_sweep_opens_parts_too_and_names_its_jobs_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}
    words = ["+experiment=debug", "-m", "model.rope_scaling.factor=2,4"]
    assert main(lambda config: seen.update({config.run.name: config.model.rope_scaling}) or 0, words) == 0
    assert {name: scaling.factor for name, scaling in seen.items()} == {
        "debug-model.rope_scaling.factor=2": 2.0,
        "debug-model.rope_scaling.factor=4": 4.0,
    }
