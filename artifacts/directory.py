"""One run, one directory, found again by name: made whole or not at all, resumed only by its own config.

`open_run` only looks (and locks a directory that is there), so that everything a user can get wrong is said
before anything is written; `begin` writes, once data and devices are known.

What may change on a resume is what does not change the mathematics of the run: where it is computed (mesh,
hardware, accumulation, remat, attention path, loss chunk: the same sums in another order), what is written
down, and `training.num_steps` under the constant schedule (flat) and wsd (which only decides when the decay
begins). Data and tokenizer paths may move; their contents may not: the digests in the manifest are compared.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from artifacts.manifest import now
from common.errors import RunFault
from common.files import lock, sync, text_digest, write_text
from parallel import processes

_FROZEN_GROUPS = ("model", "data", "tokenizer", "optim", "schedule", "objective", "adapter")
_FROZEN_KEYS = (
    *("seed", "init_from", "freeze", "training.global_batch_size", "training.precision"),
    "training.full_precision",
    *("training.z_loss", "training.ema_decay", "training.num_steps"),
    "checkpoint.directory",  # where the run looks for what it goes on from
)
_FREE_KEYS = (
    *("data.cache_dir", "data.workers", "data.prefetch", "data.path", "data.download"),
    *("tokenizer.path", "tokenizer.chat_template"),
)
_OPEN_ENDED_SCHEDULES = ("constant", "wsd")
_SHOWN = 6
AsNow = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# Facts of a manifest by which the same mathematics may come out with other last bits.
DECIDES_BITS = (
    *("python", "packages", "devices", "mesh", "threads", "cpu", "jax", "compute_dtype", "compiler_options"),
)


def differing_keys(stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every leaf with its two values where they differ; a leaf that one side lacks is "(absent)" there."""
    a, b = dict(_leaves(stored)), dict(_leaves(config))
    keys = [*a, *(key for key in b if key not in a)]
    pairs = {key: (a.get(key, "(absent)"), b.get(key, "(absent)")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def completed(stored: Mapping[str, Any], now: Any) -> dict[str, Any]:
    """A stored config with the keys that have come into being since, at their defaults: what the run had.

    now: the dataclass that it is compared with. Each group takes the defaults of the class that it has
    there, which for an optimizer or a schedule is that of its name; a group that may be null was null.
    """
    whole = dict(stored)
    for item in fields(now):
        value = getattr(now, item.name)
        if is_dataclass(value) and isinstance(whole.get(item.name), Mapping):
            whole[item.name] = completed(whole[item.name], value)
        elif item.name not in whole and item.default is not MISSING:
            whole[item.name] = item.default
        elif item.name not in whole and item.default_factory is not MISSING:
            made = item.default_factory()
            whole[item.name] = asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
    return whole


def is_frozen(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a resume under another value of this key would be another run."""
    if key in _FREE_KEYS or (key.startswith("data.mixture.") and key.endswith(".path")):
        return False
    if key == "training.num_steps":
        return (config.get("schedule") or {}).get("name") not in _OPEN_ENDED_SCHEDULES
    return key in _FROZEN_KEYS or key.split(".")[0] in _FROZEN_GROUPS


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and (tree or not prefix):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def last_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the last start: its restarts keep only what was not as at the first."""
    return {**manifest, **(manifest.get("restarts") or [{}])[-1]}


class RunDirectory:
    """A run's directory, locked against a second process until `close` or the end of this one.

    `resuming`: the directory was made by an earlier start. `changed`: the keys that differ from the last
    start, with both values, all of them permitted. `summary`: what a finished run left, else None.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config
        self.resuming = False
        self.summary: dict[str, Any] | None = None
        self.changed: dict[str, tuple[Any, Any]] = {}
        self._lock: int | None = None
        self._manifest: dict[str, Any] = {}
        self.rollbacks: list[dict[str, Any]] = []  # see `training.safety.rollback`

    def begin(self, manifest: dict[str, Any], *, resume_step: int = 0) -> None:
        """Make the directory (a new run), or note this start in its restarts; `manifest`: `build_manifest`.

        Raises ValueError where data or tokenizer are not those of the run, OSError where the disk refuses.
        """
        manifest = dict(manifest, git=dict(manifest["git"]) if manifest.get("git") else None)
        diff = manifest["git"].pop("diff", "") if manifest["git"] else ""
        if not self.resuming:
            self._create(manifest, diff)
            return
        self._check_digests(manifest)
        restarts = [*self._manifest.get("restarts", []), self._restart(manifest, resume_step)]
        self._manifest = {**self._manifest, "restarts": restarts}
        with _explained(self.path):
            if diff:
                write_text(self.path / f"git.restart{len(restarts)}.diff", diff, durable=True)
            self.write_manifest()
            # Last: until here a crash leaves the old values to compare the next start with.
            write_text(self.path / "config.yaml", _yaml(self.config), durable=True)

    def write_manifest(self) -> None:
        """Put down what is known of the run, its rollbacks with it; the primary's to do."""
        rollbacks = {"rollbacks": self.rollbacks} if self.rollbacks else {}
        write_text(self.path / "manifest.json", _json({**self._manifest, **rollbacks}), durable=True)

    def check_restarts(self, step: int, most: int) -> None:
        """Raise RunFault where more than `most` starts in a row, this one from `step` too, got no further."""
        idle, before = 0, 0  # the first start began at 0
        for reached in (*(start["step"] for start in self._manifest.get("restarts", [])), step):
            idle, before = (0 if reached > before else idle + 1), reached
        if idle > most:
            raise RunFault(
                f"{self.path} was restarted {idle} times from step {step} and never got to a newer "
                f"checkpoint; see why they ended, then go on with run.max_restarts={idle + most}"
            )

    def facts(self) -> dict[str, Any]:
        """What another process of the job needs to know, JSON-able."""
        parent = {"parent": self.parent, "rollbacks": self.rollbacks}
        return {
            "path": str(self.path),
            "resuming": self.resuming,
            "summary": self.summary,
            "manifest": parent,
        }

    @classmethod
    def told(cls, facts: Mapping[str, Any], config: Mapping[str, Any]) -> "RunDirectory":
        """The directory as the primary sees it."""
        run = cls(Path(facts["path"]), dict(config))
        run.resuming, run.summary, run._manifest = facts["resuming"], facts["summary"], facts["manifest"]
        run.rollbacks = list(run._manifest.get("rollbacks", []))
        return run

    @property
    def parent(self) -> dict[str, Any] | None:
        """The checkpoint that the first start took its weights from, as its manifest names it."""
        return self._manifest.get("parent")

    @property
    def last_mesh(self) -> dict[str, int] | None:
        """Sizes by axis of the last start's mesh; None for a new run, and away from the primary."""
        return last_facts(self._manifest).get("mesh")

    @property
    def data_digest(self) -> str | None:
        """What the first start read, as its manifest names it; None for a new run."""
        return self._manifest.get("data", {}).get("digest")

    def close(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_digests(self, manifest: Mapping[str, Any]) -> None:
        for kind in ("data", "tokenizer"):
            old, new = (m.get(kind, {}).get("digest") for m in (self._manifest, manifest))
            if old != new:
                self.close()
                raise ValueError(
                    f"{self.path} has other {kind} (digest {str(old)[:9]} there, {str(new)[:9]} now); "
                    f"restore the {kind}, or use another run.name= (with init_from={self.path.name} to go on "
                    "from its weights)"
                )

    def other_bits(self, manifest: Mapping[str, Any]) -> list[str]:
        """Which facts that decide the last bits of a step are not those of the first start."""
        first = self._manifest
        return [name for name in DECIDES_BITS if name in first and first[name] != manifest.get(name)]

    def _restart(self, manifest: Mapping[str, Any], step: int) -> dict[str, Any]:
        """What of the manifest is not as it was at the first start."""
        skipped = ("created", "restarts", "rollbacks", "data", "tokenizer", "parent")
        changed = {k: v for k, v in manifest.items() if v != self._manifest.get(k) or k == "autoscale"}
        facts = {k: v for k, v in changed.items() if k not in skipped}
        return {
            "created": now(),
            "step": step,
            "config": {k: list(v) for k, v in self.changed.items()},
            **facts,
        }

    def _create(self, manifest: dict[str, Any], diff: str) -> None:
        made: list[Path] = []
        temporary: Path | None = None
        try:
            with _explained(self.path):
                made = _make_parents(self.path.parent)
                _remove_stale(self.path)
                temporary = self.path.parent / f".{self.path.name}.{os.urandom(4).hex()}.tmp"
                temporary.mkdir()
                # Locked before it has its name, so nobody can come between.
                self._lock = _lock(temporary)
                if diff:
                    write_text(temporary / "git.diff", diff, durable=True)
                write_text(temporary / "manifest.json", _json(manifest), durable=True)
                write_text(temporary / "config.yaml", _yaml(self.config), durable=True)
                os.rename(temporary, self.path)
                sync(self.path.parent)
                self._manifest = manifest
        except BaseException:
            self.close()
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            for parent in reversed(made):
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def open_run_together(
    config: Mapping[str, Any], run_dir: str | os.PathLike[str], as_now: AsNow = dict
) -> RunDirectory:
    """`open_run` by the primary; the other processes take its word, and theirs is never locked or begun.

    Raises what `open_run` raises, on all processes, and ValueError where one has another configuration.
    """
    digest = text_digest(_yaml(config))
    processes.same("configuration", digest, "start all of them with the same command line")
    mine: list[RunDirectory] = []

    def look() -> dict[str, Any]:
        mine.append(open_run(config, run_dir, as_now))
        return mine[0].facts()

    facts = processes.from_primary("the run's directory", look)
    return mine[0] if mine else RunDirectory.told(facts, config)


def open_run(
    config: Mapping[str, Any], run_dir: str | os.PathLike[str], as_now: AsNow = dict
) -> RunDirectory:
    """Look at `run_dir` and say whether `config` (plain nested dicts) may run there; nothing is written.

    as_now: what makes of a config that an earlier version stored one with the keys of today.

    Raises ValueError where the directory is another run's, another process's, or none of ours, OSError where
    it cannot be written. Each message is one line with the remedy.
    """
    path = Path(os.path.abspath(run_dir))
    run = RunDirectory(path, yaml.safe_load(_yaml(config)))
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        _check_writable(path)
        return run
    if not path.is_dir():
        raise ValueError(f"{path} is a file, not a run's directory; remove it or choose another run.name=")
    if not (path / "config.yaml").exists():
        raise ValueError(
            f"{path} has files but no config.yaml, so it is no run of ours; "
            "empty it or choose another run.name= or run.dir="
        )
    _check_writable(path)
    run.resuming = True
    run._lock = _lock(path)
    try:
        stored = stored_config(path)
        run._manifest = _load(path / "manifest.json", json.loads)
        run.rollbacks = list(run._manifest.get("rollbacks", []))
        run.changed = differing_keys(as_now(stored), run.config)
        _refuse_frozen(path, run)
        run.summary = _summary(path)
    except BaseException:
        run.close()
        raise
    return run


def stored_config(path: Path, key: str = "run.name") -> dict[str, Any]:
    """What a run was made with, as it was stored. ValueError with `key` as the remedy."""
    return _load(path / "config.yaml", yaml.safe_load, key)


def _summary(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _refuse_frozen(path: Path, run: RunDirectory) -> None:
    frozen = {key: pair for key, pair in run.changed.items() if is_frozen(key, run.config)}
    if not frozen:
        return
    shown = [
        f"{key} is {_as_typed(a)} there and {_as_typed(b)} now"
        for key, (a, b) in list(frozen.items())[:_SHOWN]
    ]
    if len(frozen) > _SHOWN:
        shown.append(f"{len(frozen) - _SHOWN} more")
    if "training.num_steps" in frozen:
        shown.append("num_steps may change only under schedule=constant and schedule=wsd")
    raise ValueError(
        f"{path} was made with another configuration: {'; '.join(shown)}. Restore the values to resume, or "
        f"choose another run.name= (and init_from={path.name} to start from its weights)"
    )


def _as_typed(value: Any) -> str:
    """As one would type it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _load(path: Path, parse: Any, key: str = "run.name") -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
    else:
        if isinstance(tree, dict):
            return tree
        reason = "it holds no mapping"
    raise ValueError(f"{path} cannot be read ({reason}); restore it, or choose another {key}=")


def _lock(directory: Path) -> int | None:
    """Take the directory's lock, or say that somebody has it. It goes with the process, however that ends."""
    try:
        return lock(directory / ".lock", wait=False)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"{directory} is in use by another process; wait for it, stop it, or choose another run.name="
            ) from error
        raise OSError(
            f"{directory} cannot be locked ({error.strerror}); choose a run.dir= on a file system with flock"
        ) from error


def _check_writable(path: Path) -> None:
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, so {path} cannot be made; choose another run.dir=")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing} cannot be written; change its permissions or choose another run.dir=")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """OSErrors of the system become one line with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # already explained
            raise
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ValueError(
                f"{path} was made by another process meanwhile; wait for it or choose another run.name="
            ) from error
        remedy = "free space or" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable or"
        raise OSError(f"cannot write {path}: {error.strerror}; {remedy} choose another run.dir=") from error


def _make_parents(parent: Path) -> list[Path]:
    missing = [p for p in (parent, *parent.parents) if not p.exists()][::-1]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_stale(path: Path) -> None:
    """Directories of starts killed before they had a name; one in the making is locked and stays."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.tmp", root_dir=path.parent):
        with contextlib.suppress(ValueError, OSError):
            fd = _lock(path.parent / name)
            shutil.rmtree(path.parent / name, ignore_errors=True)
            if fd is not None:
                os.close(fd)


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=2, default=str) + "\n"


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True)


def _plain(tree: Any) -> Any:
    """Tuples and mappings of any kind become what YAML gives back."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return tree
