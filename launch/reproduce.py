"""A run again, and whether it comes out the same: what differs, the rerun, the first step that differs."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from artifacts.ledger import last_step
from artifacts.load import load
from artifacts.manifest import git_state, is_flag
from artifacts.metrics import MetricsLog
from artifacts.reproduce_diff import Difference, compare, differences, first_config, repeatable
from common.text import aligned
from parallel.processes import free_port

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("loss", "grad_norm")
DATA = ("dataset digest", "tokenizer digest", "parent digest")
CODE = ("commit", "uncommitted changes")
# Said to an interpreter that has not yet loaded anything: as many threads as then, and the code of `root`.
BEGIN = """
import os, sys
root, threads = sys.argv[1], int(sys.argv[2])
if threads and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
sys.path.insert(0, root)
"""
PROBE = (
    BEGIN
    + """
import json
from artifacts.manifest import surroundings
print(json.dumps(surroundings(), default=str))
"""
)
RERUN = (
    BEGIN
    + """
from pathlib import Path
from common.host import keep_freed_memory
from common.host import enough_threads
keep_freed_memory()
enough_threads()
from parallel import processes
import yaml
from training.config import from_stored
from common.errors import RunFault
import train
try:
    processes.initialize()
    status = train.train(from_stored(yaml.safe_load(Path(sys.argv[3]).read_text("utf-8"))))
except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    status = 2
except RunFault as error:
    print(f"error: {error}", file=sys.stderr)
    status = error.status
processes.leave(status)
"""
)


@dataclass(frozen=True)
class ReproduceOptions:
    """The words of scripts/reproduce.py, whose docstring says what each is."""

    run: str
    steps: int | None = None
    output: Path | None = None
    check: bool = False
    here: bool = False
    tolerance: float = 0.0
    runs: Path = Path("runs")


@dataclass(frozen=True)
class Original:
    """What a run left: manifest and config, both of its first start, and its training rows."""

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def processes(self) -> int:
        """How many processes the job had."""
        return int((self.manifest.get("devices") or {}).get("processes", 1))

    @property
    def threads(self) -> int:
        """Cores that a process might use; 0 where nobody noted it."""
        return int((self.manifest.get("threads") or {}).get("affinity") or 0)

    def environment(self) -> dict[str, str]:
        """Of the rerun: this one's, with the run's flags in place of our own; GPUs are those here."""
        kept = {k: v for k, v in os.environ.items() if not is_flag(k) or k == "CUDA_VISIBLE_DEVICES"}
        flags = self.manifest.get("environment") or {}
        return kept | {k: v for k, v in flags.items() if k != "CUDA_VISIBLE_DEVICES"}


def read_original(options: ReproduceOptions) -> Original:
    """What the run left. Raises ValueError where that is no run, or cannot be read."""
    run = load(options.run, dict, options.runs)
    manifest = run.manifest()
    try:
        rows = [row for row in MetricsLog.read(run.path / "metrics.jsonl") if "loss" in row]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{run.path / 'metrics.jsonl'} cannot be read: {reason}") from error
    return Original(run.path, manifest, first_config(run.config, manifest), rows)


def look_around(original: Original, root: Path) -> list[Difference]:
    """What is not as it was: of this interpreter, these devices, and the files that the run was made from."""
    words = [sys.executable, "-c", PROBE, str(root), str(original.threads)]
    done = subprocess.run(words, env=original.environment(), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise ValueError(
            f"the devices cannot be asked: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
        )
    now = json.loads(done.stdout.splitlines()[-1])
    if original.processes > 1:  # the probe is one of them
        for name in ("processes", "count"):
            now["devices"][name] = original.manifest["devices"].get(name)
    return differences(original.manifest, now | sources(original))


def sources(original: Original) -> dict[str, Any]:
    """Digests of what the run was made from, as it is now; the reason in their place where it is not here."""
    from data.pipeline import prepare
    from training.config import from_stored
    from training.opening.initial_weights import find_parent, tokenizer_config

    config = from_stored(original.config)
    wanted = original.manifest["data"]["digest"]
    found: dict[str, Any] = {"parent": None}
    try:
        earlier = original.manifest.get("parent")
        parent = find_parent(config, earlier.get("step") if earlier else None)
        found["parent"] = parent.facts() if parent else None
        prepared = prepare(config.data, tokenizer_config(config, None, parent), progress=False, wanted=wanted)
    except (ValueError, OSError) as error:
        reason = {"digest": f"none: {' '.join(str(error).split())}"}
        return found | {"data": reason, "tokenizer": reason}
    return found | {"data": {"digest": prepared.digest}, "tokenizer": {"digest": prepared.tokenizer.digest}}


def table(found: Sequence[Difference]) -> Iterator[str]:
    """As columns; what cannot change a number comes last, and says so."""
    if not found:
        yield "nothing differs: code, packages, Python, devices, threads, flags, data, tokenizer"
        return
    rows = [("differs", "then", "now", "")]
    for one in sorted(found, key=lambda one: not one.matters):
        rows.append((one.what, one.then, one.now, "" if one.matters else "(changes no number)"))
    yield from aligned(rows)


@contextlib.contextmanager
def code_of(original: Original, here: bool) -> Iterator[Path]:
    """Where the run's code lies: here, or in a worktree of its commit that is removed in the end.

    Raises ValueError where it cannot be had.
    """
    git, now = original.manifest.get("git"), git_state(ROOT)
    if here or _same_code(git, now):
        yield ROOT
        return
    hint = "; here=true runs with the code that is here"
    if git is None or now is None:
        raise ValueError(f"{'the run' if git is None else 'this directory'} has no git commit{hint}")
    diff = _diff(original, git, hint)
    with tempfile.TemporaryDirectory(prefix="cambrian-") as scratch:
        tree = Path(scratch) / "code"
        added = _git("worktree", "add", "--detach", str(tree), git["sha"])
        if added is not None:
            raise ValueError(
                f"commit {git['sha'][:9]} is not in this repository ({added}); git fetch it{hint}"
            )
        try:
            if (
                diff
                and (refused := _git("-C", str(tree), "apply", "--whitespace=nowarn", str(diff))) is not None
            ):
                raise ValueError(
                    f"the run's uncommitted changes do not apply to its commit ({refused}){hint}"
                )
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _same_code(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    return a is not None and b is not None and all(a.get(k) == b.get(k) for k in ("sha", "diff_sha256"))


def _diff(original: Original, git: dict[str, Any], hint: str) -> Path | None:
    """The file with the run's uncommitted changes, None where it had none."""
    if not git.get("diff_sha256"):
        return None
    path = original.path / "git.diff"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != git["diff_sha256"]:
        raise ValueError(f"{path}, the run's uncommitted changes, is missing or altered{hint}")
    return path.absolute()


def _git(*words: str) -> str | None:
    """None where it worked, else what git says."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[0][:160]


def rerun(original: Original, root: Path, output: Path, last: int, whole: bool) -> int:
    """Train into `output` until step `last` has its row, or to the end; its status, 0 where we ended it."""
    tree = original.config | {"run": {**original.config["run"], "dir": str(output)}}
    generation = (original.manifest["data"].get("description") or {}).get("generation")
    if generation is not None:
        tree["data"] = {**tree["data"], "generation": generation}
    if tree.get("logging", {}).get("prometheus_port"):
        tree["logging"] = {
            **tree["logging"],
            "prometheus_port": None,
        }  # the run itself may be answering there
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.yaml"
        config.write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
        command = [sys.executable, "-c", RERUN, str(root), str(original.threads), str(config)]
        jobs = [subprocess.Popen(command, env=env, start_new_session=True) for env in places(original)]
        try:
            while any(job.poll() is None for job in jobs):
                if not whole and last_step(output / "metrics.jsonl") >= last:
                    return 0
                if any(job.poll() for job in jobs):
                    break
                time.sleep(0.1)
            return max((abs(job.wait(60)) for job in jobs), default=0)
        finally:
            for job in jobs:
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGKILL)
                job.wait()


def places(original: Original) -> list[dict[str, str]]:
    """The environment of each process. Raises ValueError where that job cannot be had on one machine."""
    base, count = original.environment(), original.processes
    if count == 1:
        return [base]
    if original.manifest["devices"]["platform"] != "cpu":
        raise ValueError(
            f"the run had {count} processes on {original.manifest['devices']['platform']}; only jobs of CPU "
            "processes are started again here; run it with its launcher and compare metrics.jsonl"
        )
    port = free_port()
    job = {"CAMBRIAN_COORDINATOR": f"127.0.0.1:{port}", "CAMBRIAN_PROCESSES": str(count)}
    return [base | job | {"CAMBRIAN_PROCESS": str(rank)} for rank in range(count)]


def fresh_directory(original: Original, asked: Path | None) -> Path:
    """An absolute path that is not there yet. Raises ValueError where the one asked for is."""
    if asked is not None:
        if asked.exists() and any(asked.iterdir()):
            raise ValueError(f"output={asked} is not empty; give a new directory")
        return asked.absolute()
    beside = original.path.absolute()
    names = (beside.with_name(f"{beside.name}-again{number or ''}") for number in range(10_000))
    return next(path for path in names if not path.exists())


def obstacles(found: Sequence[Difference], here: bool) -> list[Difference]:
    """Without `here`: data that are not the run's, since nothing could come out the same."""
    return [] if here else [one for one in found if one.what in DATA]


def reproduce(options: ReproduceOptions) -> int:
    """Report what differs, run again and compare; the exit status."""
    original = read_original(options)
    limit, notes = repeatable(original.manifest)
    print(f"{original.path}: {len(original.rows):,} steps, made {original.manifest.get('created')}")
    print("\n".join([*(f"  {note}" for note in notes)]), end="\n" if notes else "")
    found = look_around(original, ROOT)
    print("\n".join(table(found)), flush=True)
    if options.check:
        return int(any(one.matters for one in found))
    for one in obstacles(found, options.here):
        raise ValueError(f"{one.what} is {one.now}, not the run's {one.then}; restore it, or give here=true")
    with code_of(original, options.here) as root:
        if any(one.what.startswith(CODE) for one in found):
            print("code: what is here" if root == ROOT else "code: the run's commit and changes, checked out")
        return compared(original, root, options, limit)


def compared(original: Original, root: Path, options: ReproduceOptions, limit: int | None) -> int:
    """Rerun as far as it is asked for and can be told, and say how it came out."""
    rows = original.rows[: options.steps]
    if not rows:
        raise ValueError(f"{original.path} has no training steps to compare with")
    output = fresh_directory(original, options.output)
    last = rows[-1]["step"]
    whole = bool(original.manifest.get("rollbacks")) or (
        options.steps is None and last >= original.config["training"]["num_steps"]
    )
    print(f"rerunning {last:,} steps into {output}", flush=True)
    status = rerun(original, root, output, last, whole)
    if status:
        print(f"error: the rerun ended with status {status}", file=sys.stderr)
        return 2 if status == 2 else 1
    again = [row for row in MetricsLog.read(output / "metrics.jsonl") if "loss" in row]
    if limit is not None and limit < last and not options.tolerance:
        rows = [row for row in rows if row["step"] <= limit]
        print(
            f"only the {len(rows):,} steps up to step {limit} can be identical; tolerance=X compares the rest"
        )
    equal, mismatch = compare(rows, again, KEYS, options.tolerance)
    within = f"within {options.tolerance:g}" if options.tolerance else "bit for bit"
    if mismatch is None:
        print(f"identical: {equal:,} steps, {' and '.join(KEYS)} {within}")
        return 0
    print(f"differs at {mismatch}; {equal:,} steps before it are equal {within}")
    return 1
