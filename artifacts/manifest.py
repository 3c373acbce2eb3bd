"""Everything needed to make a run again: code, packages, flags, devices, mesh, seeds, data, parent, job.

The manifest is what the run found, `config.yaml` is what it was asked. Environment variables are recorded by
name from a list, never wholesale: an environment holds secrets.
"""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from common.files import file_digest, text_digest
from common.host import cpu_model

_ROOT = Path(__file__).resolve().parents[1]
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL")
_FLAG_PREFIXES = ("JAX_", "XLA_PYTHON_CLIENT_", "NCCL_", "HYDRA_FULL_ERROR")
_SLURM = (
    *("JOB_ID", "JOB_NAME", "JOB_PARTITION", "JOB_NODELIST", "JOB_NUM_NODES", "NTASKS", "CPUS_PER_TASK"),
    *("ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "CLUSTER_NAME"),
)
# scripts/kubernetes.py hands over the last three.
_SCHEDULER = (
    *(f"SLURM_{name}" for name in _SLURM),
    "JOBSET_NAME",
    "JOBSET_NAMESPACE",
    "JOBSET_RESTART_ATTEMPT",
)
_JAX_CONFIG = (
    *(
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_default_prng_impl",
        "jax_threefry_partitionable",
    ),
    *("jax_numpy_dtype_promotion", "jax_compilation_cache_dir", "jax_platforms"),
)


def build_manifest(
    config: Mapping[str, Any],
    *,
    prepared_digest: str,
    tokenizer_digest: str,
    mesh: Mapping[str, int],
    data: Mapping[str, Any] | None = None,
    parent: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON-able facts of this process; `["git"]["diff"]` is the whole text of uncommitted changes.

    `data`: what `Prepared.description` says; `parent`: path and digest of the checkpoint in `init_from`;
    `mesh`: sizes by axis; `extra`: further facts, such as what precision `auto` became.
    """
    return {
        "created": now(),
        "command": list(sys.argv),
        "host": socket.gethostname(),
        **surroundings(),
        "mesh": dict(mesh),
        "seed": config.get("seed"),
        "data": {"digest": prepared_digest, "description": dict(data or {})},
        "tokenizer": {"digest": tokenizer_digest},
        "parent": dict(parent) if parent else None,
        "scheduler": {name: os.environ[name] for name in _SCHEDULER if name in os.environ},
        **dict(extra or {}),
        "restarts": [],
    }


def surroundings() -> dict[str, Any]:
    """What this process finds whatever it is asked to do: code, packages, flags, devices, threads."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "packages": _packages(),
        "locks": {path.name: file_digest(path) for path in sorted(_ROOT.glob("requirements*.lock"))},
        "git": git_state(_ROOT),
        "environment": recorded_environment(),
        "jax": _jax_config(),
        "devices": _devices(),
        "threads": {"affinity": _affinity(), "cpus": os.cpu_count()},
    }


def is_flag(name: str) -> bool:
    """Whether an environment variable is one of those that a manifest keeps."""
    return name in _FLAGS or name.startswith(_FLAG_PREFIXES)


def now() -> str:
    """UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit, uncommitted changes as a diff, names of untracked files; None where nothing says it."""
    top = _git(root, "rev-parse", "--show-toplevel")
    # Installed inside somebody else's checkout, that repository's commit would say nothing about this code.
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return _image_state(os.environ.get("CAMBRIAN_COMMIT"))
    diff = _git(root, "diff", "--no-ext-diff", "HEAD") or ""
    untracked = _git(root, "ls-files", "--others", "--exclude-standard") or ""
    return {
        "sha": (_git(root, "rev-parse", "HEAD") or "").strip() or None,
        "diff": diff,
        "diff_sha256": text_digest(diff) if diff else None,
        "untracked": untracked.splitlines()[:100],
    }


def _image_state(commit: str | None) -> dict[str, Any] | None:
    """What the Dockerfile was told, in an image without a checkout; `-dirty` stays, its diff is not there."""
    if commit in (None, "", "unknown"):
        return None
    return {"sha": commit, "diff": "", "diff_sha256": None, "untracked": [], "from": "CAMBRIAN_COMMIT"}


def _git(root: Path, *arguments: str) -> str | None:
    # Optional locks would make two runs that start together disturb each other's index.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, env=environment, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _packages() -> dict[str, str]:
    found = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    return dict(sorted(found.items()))


def recorded_environment() -> dict[str, str]:
    """The variables that change what is computed or how, by name: no secret is among them."""
    return {k: v for k, v in sorted(os.environ.items()) if is_flag(k)}


def _jax_config() -> dict[str, Any]:
    import jax

    return {name: getattr(jax.config, name, None) for name in _JAX_CONFIG}


def _devices() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }


def _affinity() -> int | None:
    """Cores this process may use: XLA:CPU splits reductions by it, so equal bits need an equal number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
