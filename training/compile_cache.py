"""The persistent compile cache, verified; whether it helped, and what compiling took all the same."""

import hashlib
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache  # there is no public way to give JAX a cache
from jax._src.compilation_cache import LRUCache

from common.files import replacing

HIT = "/jax/compilation_cache/cache_hits"
MISS = "/jax/compilation_cache/cache_misses"
STAGES = (  # of making an executable: tracing, lowering, compiling
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)

_SEAL_BYTES = hashlib.sha256().digest_size


class CacheWatch:
    """Counts hits and misses of this process from here on, and the seconds of its compilations.

    `seconds`: of tracing, lowering and compiling, moments that belong to several of them counted once.
    """

    def __init__(self, directory: Path | None):
        self.directory, self.hits, self.misses, self.seconds = directory, 0, 0, 0.0
        self._spans = _Spans()
        jax.monitoring.register_event_listener(self._listen)
        jax.monitoring.register_event_time_span_listener(self._time)

    def _listen(self, event: str, **_: Any) -> None:
        self.hits += event == HIT
        self.misses += event == MISS

    def _time(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event in STAGES:
            self.seconds += self._spans.add(start_time, end_time)

    def outcome(self) -> dict[str, Any]:
        """Hits, misses and bytes on disk; an empty dict where there is no cache."""
        if self.directory is None:
            return {}
        size = sum(file.stat().st_size for file in self.directory.glob("*") if file.is_file())
        return {"hits": self.hits, "misses": self.misses, "bytes": size}


class _Spans(threading.local):
    """Spans of time of each thread, told when they end: what is traced inside of another comes first."""

    def __init__(self) -> None:
        self.last: list[tuple[float, float]] = []  # those that a span to come may still contain

    def add(self, start: float, end: float) -> float:
        """The seconds by which the union of all spans has grown."""
        inside = 0.0
        while self.last and self.last[-1][0] >= start:
            begun, ended = self.last.pop()
            inside += ended - begun
        self.last.append((start, end))
        return max(0.0, end - start - inside)


class VerifiedCache(LRUCache):
    """JAX's directory of executables with a sha256 before each, under names of its own.

    JAX compresses entries without a checksum and never replaces one: a flipped bit is other machine code, and
    a torn entry a miss for ever. Here an entry that is not as it was written, or belongs under another name,
    is said in one line, removed, compiled and written anew. Several processes may read and write at once.
    """

    def get(self, key: str) -> bytes | None:
        """The executable as it was written; None, which has JAX compile, where there is none."""
        name = _sealed(key)
        try:
            entry = super().get(name)
        except OSError:
            entry = b""
        if entry is None or entry[:_SEAL_BYTES] == _seal(key, entry[_SEAL_BYTES:]):
            return entry and entry[_SEAL_BYTES:]
        path = Path(f"{self.path}/{name}-cache")
        try:
            path.unlink()
        except FileNotFoundError:  # another process was faster, and says it
            return None
        except OSError:  # `put` cannot replace it either: it is said at each start
            pass
        print(f"compile cache: {path} is not as it was written; it is compiled anew", file=sys.stderr)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Write an entry whole or not at all. Raises OSError, of which JAX makes a warning."""
        entry = _seal(key, value) + value
        if self.eviction_enabled:  # of JAX_COMPILATION_CACHE_MAX_SIZE, under a lock that readers take too
            return super().put(_sealed(key), entry)
        with replacing(Path(f"{self.path}/{_sealed(key)}-cache"), shared=True) as aside:
            aside.write_bytes(entry)


def _seal(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + value).digest()


def _sealed(key: str) -> str:
    """The name of an entry: what JAX alone wrote here has none of these, and is never read."""
    return f"{key}-sha256"


def start_compile_cache(directory: str | None, *, names: bool = False) -> CacheWatch:
    """Keep every executable that took a while to compile in `directory`; None turns the cache off.

    names: an executable that only differs in the names of its operations is another one: else a trace may
    have the names of an older program.
    Raises ValueError where it cannot be written: jax would go on without, and warn at each compilation.
    """
    path = Path(directory).absolute() if directory else None
    if path is not None:
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"run.compile_cache={directory} cannot be written; choose another directory, or null for none"
            )
    # An entry that a full disk keeps from being written costs a compilation, which the summary counts as a
    # miss; jax would add two lines to stderr, where we say only what is wrong with the run.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)
    compilation_cache.LRUCache = VerifiedCache  # type: ignore[misc]  # what JAX makes at its first compilation
    jax.config.update("jax_compilation_cache_dir", str(path) if path else None)
    jax.config.update("jax_compilation_cache_include_metadata_in_key", names)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return CacheWatch(path)
