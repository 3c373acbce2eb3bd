"""Plans kept on disk: packing a large corpus takes minutes, and every start of every host needs the same.

A plan is a pure function of (token store, seed, epoch, packing, row length). One that took longer than
SECONDS to make is written beside the stores, with the sha256 of its numbers; what fails it is made again,
and said.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.files import replacing
from data.cache import MANIFEST, digest_of
from data.loading.packing import WINDOW, PackingPlan
from data.tokens.store import TokenStore

FORMAT = 1
SECONDS = 1.0  # a plan made faster than this is not worth a file
STALE = 3600  # seconds after which a file in the making was left by a killed process


def kept_plan(
    store: TokenStore, root: str, key: tuple[int, int, str, int], make: Callable[[], PackingPlan]
) -> PackingPlan:
    """Return the plan of `key`: (seed, epoch, packing, row length), read where `root` keeps it, else made.

    A cache that cannot be written costs the making again at the next start, and nothing else.
    """
    path = _path(store, root, key)
    if path is not None and path.exists():
        plan = _read(path)
        if plan is not None:
            return plan
        print(f"data: building again: {path} is corrupt: its sha256 is not what it says", flush=True)
    began = time.perf_counter()
    plan = make()
    if path is not None and time.perf_counter() - began > SECONDS:
        with contextlib.suppress(OSError):
            _write(path, plan)
    return plan


def _path(store: TokenStore, root: str, key: tuple[int, int, str, int]) -> Path | None:
    """Named by the digest of the store's manifest, which covers every token; None for a store without one."""
    try:
        digest = json.loads((store.path / MANIFEST).read_text("utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        return None
    name = digest_of({"format": FORMAT, "window": WINDOW, "store": digest, "key": key})
    return Path(root) / "plans" / f"{name[:32]}.plan"


def _read(path: Path) -> PackingPlan | None:
    try:
        with path.open("rb") as file:
            about = json.loads(file.readline())
            if 8 * sum(about["counts"]) != path.stat().st_size - file.tell():
                return None
            arrays = [np.fromfile(file, np.int64, count) for count in about["counts"]]
        return PackingPlan(*arrays) if about["sha256"] == _digest(arrays) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, plan: PackingPlan) -> None:
    """Whole or not at all: several hosts may write the same plan at once, each to a name of its own."""
    path.parent.mkdir(exist_ok=True)
    for left in path.parent.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > STALE:
            left.unlink(missing_ok=True)
    arrays = [np.asarray(a, np.int64) for a in (plan.starts, plan.lengths, plan.row_offsets)]
    about = {"counts": [len(a) for a in arrays], "sha256": _digest(arrays)}
    with replacing(path, shared=True) as aside, aside.open("wb") as file:
        file.write(json.dumps(about).encode() + b"\n")
        for array in arrays:
            array.tofile(file)


def _digest(arrays: list[np.ndarray]) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(array.data)
    return total.hexdigest()
