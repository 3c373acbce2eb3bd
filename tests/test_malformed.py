"""Malformed commands and situations, end to end: one line, the right status, nothing half-made.

Most run the real task in this process, on one of its devices; a few are commands of their own, for what only
a terminal shows. `tests/configs/test_bad_commands.py` holds the many ways to mistype an override.
"""

import errno
import fcntl
import gzip
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

import artifacts.directory
import train
import training.loop
import training.setup
from artifacts.metrics import MetricsLog
from common.errors import RunFault
from configs.cli import main
from data.cache import verify
from scripts import generate

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    *(
        "model.num_layers=1",
        "model.d_model=16",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.head_dim=8",
    ),
    *("model.d_ff=16", "data.seq_len=16", "training.num_steps=4", "schedule.warmup_steps=0", "mesh=single"),
    *("checkpoint.every=2", "eval.every=2", "sample.prompts=[]", "logging.tensorboard=false"),
    *("data=folder", "data.workers=1", "data.validation_fraction=0.3", "hardware.peak_tflops=0.1"),
)


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@dataclass
class Place:
    """A directory where commands are typed, and the caches that commands share elsewhere."""

    path: Path
    shared: Path

    def words(self, *extra: str) -> list[str]:
        caches = (f"data.cache_dir={self.shared}/data", f"run.compile_cache={self.shared}/xla")
        return ["+experiment=debug", f"data.path={self.shared}/texts", *caches, *TINY, "run.name=a", *extra]

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def texts(self, name: str = "", content: bytes | str = "") -> None:
        """A folder of sound texts, `texts`, and one more file."""
        shutil.copytree(self.shared / "texts", self.path / "texts")
        if name:
            self.write(f"texts/{name}", content)


def files(root: Path) -> dict[str, str]:
    """Every file but locks, by content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A corpus, a finished run and caches."""
    root = tmp_path_factory.mktemp("shared")
    (root / "texts").mkdir()
    for i in range(40):
        (root / "texts" / f"{i:02}.txt").write_text(f"document {i} " * (20 + i))
    return root


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    """An empty directory on a machine of one device."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return Place(path, shared)


@pytest.fixture
def typed(place, capfd) -> Callable[..., Outcome]:
    """Run the command in this process."""

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        status = main(train.train, place.words(*words), faults=(RunFault,))
        return Outcome(status, *capfd.readouterr())

    return run


def assert_one_line(outcome: Outcome, status: int, *fragments: str) -> None:
    assert outcome.status == status, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.out
    for fragment in fragments:
        assert fragment in outcome.err


# What is typed after the words of a good command, and what the line must name.
COMMANDS = {
    "key": (["model.num_layer=3"], ["model.num_layer ", "did you mean model.num_layers?"]),
    "group": (["optimizer=lion"], ["optimizer", "did you mean optim?"]),
    "option": (["optim=loin"], ["optim=loin", "did you mean optim=lion?"]),
    "experiment": (["+experiment=debgu"], ["+experiment=debgu", "did you mean +experiment=debug?"]),
    "type": (["training.num_steps=many"], ["training.num_steps=many", "whole number"]),
    "hardware": (["hardware=h1000"], ["hardware=h1000", "did you mean hardware=h100?"]),
    "nan": (["optim.learning_rate=nan"], ["optim.learning_rate=nan", "finite"]),
    "slash": (["run.name=a/b"], ["run.name='a/b'", "directory name"]),
    "seed below": (["seed=-1"], ["seed=-1", "0 to 2147483647"]),
    "seed above": (["seed=99999999999999999999"], ["seed=99999999999999999999", "at most 2147483647"]),
    "steps above": (["training.num_steps=9999999999"], ["training.num_steps=9999999999", "at most"]),
    "larger mesh": (["mesh.data=16", "training.global_batch_size=16"], ["mesh.data=16", "1 is here"]),
    "mesh that does not divide": (
        ["mesh.data=-1", "mesh.fsdp=2"],
        ["mesh.fsdp=2", "does not divide 1 devices", "mesh.data=-1"],
    ),
    "pipeline": (["mesh.pipeline=2"], ["model.num_layers=1", "mesh.pipeline=2", "use mesh.pipeline=1"]),
    "heads": (["mesh.tensor=8"], ["model.num_heads=2", "mesh.tensor=8", "1, 2"]),
    "batch over mesh": (
        ["mesh.data=3"],
        ["training.global_batch_size=8", "split into mesh.data=3;", "such as 6 or 9"],
    ),
    "batch over steps": (
        ["training.accumulation_steps=3"],
        ["training.global_batch_size=8", "training.accumulation_steps=3", "multiple of 3"],
    ),
    "warm-up": (
        ["schedule.warmup_steps=5"],
        ["schedule.warmup_steps=5", "training.num_steps=4", "at most 4"],
    ),
    "positions": (
        ["model.position=learned", "model.max_seq_len=8"],
        ["data.seq_len=16", "model.max_seq_len=8", "raise"],
    ),
    "tfds without path": (["data=tfds", "data.path=null"], ["data.source=tfds", "data.path", "data.name"]),
    "missing tfds dataset": (
        ["data=tfds", "data.path=/none", "data.name=wiki40b/en:1.3.0"],
        ["data.name=wiki40b/en:1.3.0", "does not exist", "give a directory"],
    ),
    "missing folder": (["data.path=none"], ["data.path=none does not exist", "give the folder"]),
    "missing tokenizer": (
        ["tokenizer=file", "tokenizer.path=none.json"],
        ["tokenizer.path=none.json cannot be read", "give a tokenizer.json"],
    ),
    "parent": (["init_from=nobody"], ["init_from=nobody", "give a run's name"]),
    "row longer than the corpus": (
        ["data.seq_len=100000"],
        ["data.seq_len=100000 is more than the", "larger corpus"],
    ),
    "no held-out text": (
        ["data.validation_fraction=0.00001"],
        ["data.validation_fraction=1e-05 leaves no validation documents", "raise it"],
    ),
    "vocabulary": (
        ["model.vocab_size=128", "tokenizer=bpe", "tokenizer.vocab_size=300"],
        ["model.vocab_size=128", "300", "384"],
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_malformed_command_is_one_line_and_writes_nothing(case, place, typed):
    words, fragments = COMMANDS[case]
    assert_one_line(typed(*words), 2, *fragments)
    assert files(place.path) == {}
    assert_cache_is_sound(place.shared / "data")


def assert_cache_is_sound(cache: Path) -> None:
    """Whatever a later run would take is whole."""
    assert not list(cache.glob("*/.building-*"))
    for manifest in cache.glob("*/*/manifest.json"):
        verify(manifest.parent)
    for kind in ("documents", "tokenizer", "tokens"):
        found = (cache / kind).iterdir() if (cache / kind).exists() else []
        assert all((entry / "manifest.json").exists() for entry in found if entry.is_dir())


# A file among sound ones, and what the line must name.
BAD_FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("x.txt", b"", ["x.txt is empty", "move it away"]),
    "not UTF-8": ("x.md", b"caf\xe9", ["x.md is not UTF-8 at byte 3", "convert"]),
    "broken JSON": ("x.jsonl", b'{"text": "a"}\n{"text":\n', ["x.jsonl:2 is not JSON", "remove that line"]),
    "no text_key": ("x.jsonl", b'{"body": "a"}\n', ["data.text_key=text is not in", "x.jsonl:1", "body"]),
    "truncated gzip": (
        "x.jsonl.gz",
        gzip.compress(b'{"text": "abc"}\n' * 99)[:-9],
        ["x.jsonl.gz is truncated or corrupt", "fetch it again"],
    ),
    "no parquet": ("x.parquet", b"PAR1 and no more", ["x.parquet is not a sound parquet file"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_in_the_corpus_is_named(case, place, typed):
    name, content, fragments = BAD_FILES[case]
    place.texts(name, content)
    before = files(place.path)
    assert_one_line(typed("data.path=texts", "data.cache_dir=cache"), 2, "data.", *fragments)
    # No run, and in the cache no more than the byte tokenizer, which knows nothing of the corpus.
    assert {path.split("/")[0] for path in files(place.path) if "tokenizer" not in path} == {"texts"}
    assert files(place.path / "texts") == {k[6:]: v for k, v in before.items()}
    assert_cache_is_sound(Path("cache"))


@pytest.mark.parametrize("kind", ("link to nowhere", "pipe"))
def test_what_cannot_be_read_is_named_at_once(kind, place, typed):
    """Also for root, whom permissions do not stop."""
    place.texts()
    if kind == "pipe":
        os.mkfifo("texts/x.txt")
    else:
        os.symlink("nowhere", "texts/x.txt")
    assert_one_line(typed("data.path=texts", "data.cache_dir=cache"), 2, "texts/x.txt", "move it away")
    assert not Path("runs").exists()


def test_an_empty_folder_and_a_file_for_a_folder(place, typed):
    (place.path / "empty").mkdir()
    assert_one_line(typed("data.path=empty"), 2, "data.path=empty holds no documents", ".jsonl.gz")
    place.write("file", "x")
    assert_one_line(typed("data.path=file"), 2, "data.path=file is not a folder")
    assert sorted(files(place.path)) == ["file"]


@pytest.mark.parametrize(
    "content", (b"{", b"\xff", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
)
def test_a_broken_tokenizer_file_is_named(content, place, typed):
    place.write("t.json", content)
    assert_one_line(typed("tokenizer=file", "tokenizer.path=t.json"), 2, "tokenizer.path=t.json")
    assert sorted(files(place.path)) == ["t.json"]


@pytest.fixture
def good(place, typed):
    """A finished run of four steps, made by the first test that asks for it."""
    path = place.shared / "runs" / "good"
    if not path.exists():
        outcome = typed("run.name=good", f"run.dir={path}")
        assert (outcome.status, outcome.err) == (0, ""), outcome
    return path


def copy_of(good: Path, place: Place) -> Path:
    return shutil.copytree(good, place.path / "runs" / "a")


# What a second start of the same run says otherwise, and what the line must name.
OTHERWISE = {
    "shape": (["model.d_model=32"], ["model.d_model is 16 there and 32 now", "run.name="]),
    "seed": (["seed=1"], ["seed is 0 there and 1 now", "init_from=a"]),
    "optimizer": (["optim=lion"], ["optim.name is adamw there and lion now"]),
    "length": (["training.num_steps=9"], ["training.num_steps is 4 there and 9 now", "schedule=wsd"]),
    "parent": (["init_from=other"], ["init_from is null there and other now"]),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_resume_with_another_configuration_is_refused(case, good, place, typed):
    copy_of(good, place)
    before = files(place.path)
    words, fragments = OTHERWISE[case]
    assert_one_line(typed(*words), 2, "runs/a was made with another configuration", *fragments)
    assert files(place.path) == before


def unfinished(good: Path, place: Place) -> Path:
    """The run as if it had been stopped before its last words."""
    run = copy_of(good, place)
    (run / "summary.json").unlink()
    return run


def test_a_resume_with_other_data_is_refused(good, place, typed):
    unfinished(good, place)
    place.texts("new.txt", "one more document")
    before = files(place.path)
    outcome = typed("data.path=texts", "data.cache_dir=cache")
    assert_one_line(outcome, 2, "runs/a has other data", "restore the data, or use another run.name=")
    assert files(place.path / "runs") == {k[5:]: v for k, v in before.items() if k.startswith("runs/")}


@pytest.mark.parametrize("name", ("config.yaml", "manifest.json"))
def test_a_resume_of_a_run_with_a_broken_record_is_refused(name, good, place, typed):
    run = unfinished(good, place)
    (run / name).write_text((run / name).read_text()[:40] + "\n{[")
    before = files(place.path)
    assert_one_line(typed(), 2, f"runs/a/{name} cannot be read", "restore it")
    assert files(place.path) == before


def test_a_run_that_another_process_has_is_left_alone(good, place, typed):
    run = unfinished(good, place)
    with open(run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_one_line(typed(), 2, "runs/a is in use by another process", "choose another run.name=")


def test_a_directory_of_something_else_is_left_alone(place, typed):
    place.write("runs/a/thesis.txt", "years of work")
    assert_one_line(typed(), 2, "runs/a has files but no config.yaml", "another run.name=")
    assert sorted(files(place.path)) == ["runs/a/thesis.txt"]


def test_a_path_below_a_file_is_refused(place, typed):
    place.write("file", "x")
    assert_one_line(typed("run.dir=file/a"), 2, "/file is a file", "choose another run.dir=")
    assert_one_line(typed("data.cache_dir=file/a"), 2, "data.cache_dir=file/a cannot be written")
    assert_one_line(
        typed("run.compile_cache=file/a"), 2, "run.compile_cache=file/a cannot be written", "null"
    )
    assert sorted(files(place.path)) == ["file"]


def test_a_read_only_directory_is_refused_before_any_work(place, typed, monkeypatch):
    access = os.access
    (place.path / "runs").mkdir()
    refused = str(place.path / "runs")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != refused and access(path, mode))
    monkeypatch.setattr(training.setup, "prepare", None)  # must not be reached
    assert_one_line(typed(), 2, "here/runs cannot be written", "choose another run.dir=")


@pytest.mark.parametrize("code, remedy", [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable")])
def test_a_disk_that_takes_no_run_leaves_none(code, remedy, place, typed, monkeypatch):
    def refuse(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(artifacts.directory.os, "fsync", refuse)
    assert_one_line(typed(), 2, "cannot write", "runs/a", os.strerror(code), remedy, "run.dir=")
    assert list(place.path.iterdir()) == []


def test_a_start_from_weights_of_another_shape_is_refused(good, place, typed):
    outcome = typed(f"init_from={good}", "model.d_model=32")
    assert_one_line(
        outcome, 2, "params.embed.table is float32[384, 16] there and float32[384, 32]", "config.yaml"
    )
    assert files(place.path) == {}


@pytest.fixture
def disk_fills_up(monkeypatch):
    """From a moment on no file can grow past some bytes: what a full disk does, without a disk to fill."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def at(moment: str, limit: int) -> None:
        module = training.setup if moment == "open_recorder" else training.loop
        whole = getattr(module, moment)

        def limited(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                return whole(*args)
            finally:
                monkeypatch.setattr(module, moment, whole)  # the next start finds space

        monkeypatch.setattr(module, moment, limited)

    yield at
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "moment, limit, steps, fragments",
    [
        ("open_recorder", 4096, 4, ["runs/a"]),
        ("train", 6000, 40, ["cannot write", "metrics.jsonl"]),
        ("train", 12000, 4, ["a checkpoint could not be written to", "checkpoints"]),
        ("finish", 12000, 4, ["runs/a"]),
    ],
)
def test_a_disk_full_in_mid_run_is_one_line_and_status_1_and_the_run_goes_on(
    moment, limit, steps, fragments, place, typed, disk_fills_up
):
    words = (
        f"training.num_steps={steps}",
        f"checkpoint.every={steps}",
        f"eval.every={steps}",
        "logging.every=99",
    )
    disk_fills_up(moment, limit)
    outcome = typed(*words)
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    assert_one_line(outcome, 1, os.strerror(errno.EFBIG), "free space", "same command", *fragments)
    assert not Path("runs/a/summary.json").exists()
    assert typed(*words).status == 0
    rows = MetricsLog.read("runs/a/metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))


@pytest.mark.parametrize("most, last", [(1, 2), (10, 4)])
def test_a_loss_that_diverges_stops_the_run_before_it_is_saved(place, typed, most, last):
    """At the limit, or at the last step: a run whose last updates were skipped has not come to its end."""
    words = ("optim.learning_rate=1e30", "optim.grad_clip=null", "checkpoint.every=1", "eval.every=5")
    outcome = typed(*words, f"guard.max_skips={most}")
    assert_one_line(outcome, 1, f"nan at step {last}", "lower optim.learning_rate")
    rows = MetricsLog.read(place.path / "runs/a/metrics.jsonl")
    saved = [int(p.name) for p in Path("runs/a/checkpoints").iterdir() if p.name.isdigit()]
    assert [row["step"] for row in rows] == list(range(1, last + 1)) and saved == [1]


def test_a_damaged_cache_is_made_again_and_not_taken(place, typed):
    words = ("data.cache_dir=cache", "training.num_steps=1", "checkpoint.every=1")
    assert typed(*words).status == 0
    for pattern in (
        "documents/*/*/*/*train.array_record*",
        "tokens/*-train/tokens.bin",
        "tokens/*-train/manifest.json",
    ):
        (victim,) = Path("cache").glob(pattern)
        victim.write_bytes(victim.read_bytes()[:-20])
        shutil.rmtree("runs")
        if pattern.startswith("documents"):  # read only where something is built from it
            shutil.rmtree(next(Path("cache/tokens").glob("*-train")))
        outcome = typed(*words)
        assert (outcome.status, outcome.err) == (0, "")
        assert f"data: building again: {victim}" in outcome.out
        assert_cache_is_sound(Path("cache"))


def truncated_tfds(place: Place) -> Path:
    """A prepared TFDS directory (the folder corpus, as TFDS wrote it) with half a shard."""
    (info,) = (place.shared / "data").glob("documents/*/*/*/dataset_info.json")
    copied = shutil.copytree(info.parent, place.path / "folder_corpus" / "1.0.0")
    shard = next(copied.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return copied


@pytest.mark.parametrize("mode", ("cached", "streaming"))
def test_a_truncated_array_record_is_named(mode, good, place, typed):
    path = truncated_tfds(place)
    outcome = typed("data=tfds", f"data.path={path}", f"data.mode={mode}", "data.cache_dir=cache")
    assert_one_line(outcome, 2, str(path), "no sound TFDS dataset", "prepare it again")
    assert not Path("runs").exists()
    assert_cache_is_sound(Path("cache"))


# Words for scripts/generate.py, and what the line must name.
PROMPTS = {
    "unknown run": (["nobody"], ["run=nobody is no run's name or directory", "runs/ has a, b"]),
    "no run": ([], ["RUN is missing", "--help"]),
    "typo": (["a", "promt=x"], ["promt is no key", "did you mean prompt?"]),
    "no number": (["a", "max_new_tokens=many"], ["max_new_tokens=many", "whole number"]),
    "no such step": (["a", "step=3"], ["step=3 has no checkpoint", "2, 4"]),
    "no average": (["a", "weights=ema"], ["no ema", "training.ema_decay"]),
    "too many devices": (["a", "tensor=64"], ["tensor=64", "1 devices", "fewer"]),
    "no checkpoint": (["b"], ["runs/b has no checkpoint yet"]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_malformed_prompt_is_one_line(case, good, place, capfd):
    copy_of(good, place)
    shutil.copytree(good, place.path / "runs" / "b", ignore=shutil.ignore_patterns("checkpoints"))
    before = files(place.path)
    capfd.readouterr()
    words, fragments = PROMPTS[case]
    status = generate.main(words)
    out, err = capfd.readouterr()
    *said, line = err.splitlines(keepends=True)
    assert_one_line(Outcome(status, out, line), 2, *fragments)
    assert out == "" and all(s.startswith("runs/a: step") for s in said)
    assert files(place.path) == before


def in_terminal(place: Place, *words: str) -> Outcome:
    """The command itself, in a process of its own: what libraries print at import and at exit is seen too."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=place.path, env=env, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_commands_of_their_own_say_the_same(good, place):
    train_py = str(ROOT / "train.py")
    place.texts("x.jsonl", json.dumps({"text": "a"}) + "\n[]\n")
    outcome = in_terminal(place, train_py, *place.words("data.path=texts", "data.cache_dir=cache"))
    assert_one_line(outcome, 2, "x.jsonl:2 is a list", "object")
    path = truncated_tfds(place)
    outcome = in_terminal(
        place, train_py, *place.words("data=tfds", f"data.path={path}", "data.cache_dir=cache")
    )
    assert_one_line(outcome, 2, "no sound TFDS dataset")
    outcome = in_terminal(place, str(ROOT / "scripts" / "generate.py"), "nobody")
    assert_one_line(outcome, 2, "runs/ has none; train one with train.py")
    assert not Path("runs").exists()
    outcome = in_terminal(place, train_py, *place.words("optim.learning_rate=1e30", "optim.grad_clip=null"))
    assert_one_line(outcome, 1, "nan at step 4")
