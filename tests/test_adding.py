"""What the README says of adding things: in how many files, by adding them to a copy and training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.snapshot import ROOT, rooms
from tests.training.test_objectives import TOY

OPTIMIZER = '''

@dataclass
class SignConfig(OptimConfig):
    """Sign descent."""

    name: str = "sign"


OPTIMIZERS = (*OPTIMIZERS, SignConfig)
'''
SOURCE = '''
from data.sources.array_record import text_record, write_prepared


class CountingSource:
    """Documents that count."""

    directory, text_key, splits = None, "text", {"train": "train", "validation": "validation"}

    def __init__(self, config, say):
        self.config = config

    def inputs(self):
        return {"source": "counting"}

    def check(self):
        pass

    def freeze(self):
        pass

    def build(self, aside):
        texts = [" ".join(str(n) for n in range(i, i + 300)).encode() for i in range(40)]
        write_prepared(aside, "counting", {k: map(text_record, texts) for k in ("train", "validation")})
        return {}
'''


def change(path: Path, before: str, after: str) -> None:
    """Replace what must be there."""
    text = path.read_text("utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), "utf-8")


@pytest.mark.slow
def test_an_optimizer_is_three_files_a_kind_of_source_two_an_objective_one_and_a_yaml(tmp_path):
    code = tmp_path / "code"
    for room in rooms(ROOT):
        shutil.copytree(ROOT / room, code / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy2(ROOT / "train.py", code)
    before = {path: path.read_bytes() for path in code.rglob("*") if path.is_file()}

    config = code / "optim/config.py"
    config.write_text(config.read_text("utf-8") + OPTIMIZER, "utf-8")
    case = '        case OptimConfig(name="sign"):\n            return optax.scale_by_sign()\n'
    change(code / "optim/optimizers.py", "        case LionConfig():", f"{case}        case LionConfig():")
    (code / "configs/optim/sign.yaml").write_text("defaults: [/schema/optim/sign@_here_]\n", "utf-8")

    line = 'SOURCES = {"counting": "data.sources.counting:CountingSource", '
    change(code / "data/config.py", "SOURCES = {", line)
    (code / "data/sources/counting.py").write_text(SOURCE, "utf-8")

    (code / "training/objectives/toy.py").write_text(TOY, "utf-8")
    (code / "configs/objective/toy.yaml").write_text("name: toy\nbeta: 2.0\nmargin: 0.5\n", "utf-8")

    words = [
        "objective=toy",
        "objective.beta=3",
        "+experiment=debug",
        "optim=sign",
        "data.source=counting",
        "training.num_steps=4",
    ]
    words += ["data.workers=1", "sample.prompts=[]", "schedule.warmup_steps=1", "checkpoint.every=4"]
    words += [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "run.compile_cache=null"]
    ended = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=code,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "sign, cosine schedule" in ended.stdout
    now = {path: path.read_bytes() for path in code.rglob("*") if path.is_file()}
    assert {str(path.relative_to(code)) for path in now if now[path] != before.get(path)} == {
        *("optim/config.py", "optim/optimizers.py", "configs/optim/sign.yaml"),
        *("data/config.py", "data/sources/counting.py"),
        *("training/objectives/toy.py", "configs/objective/toy.yaml"),
    }
