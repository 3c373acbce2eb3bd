"""What a run says of its compilations, each second once; and that the cache gives back what it was given."""

import os
import resource
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.training.ground import ROOT
from training.compile_cache import CacheWatch, VerifiedCache, _Spans, start_compile_cache


def test_spans_inside_of_others_count_once():
    spans = _Spans()
    told = [(1.0, 2.0), (2.5, 3.0), (0.5, 4.0), (4.0, 5.0), (7.0, 8.0), (6.0, 8.0), (5.5, 9.0)]
    assert sum(spans.add(*span) for span in told) == pytest.approx(3.5 + 1.0 + 3.5)


def test_tracing_is_compilation_and_what_is_traced_inside_of_it_is_no_more():
    @jax.jit
    def inner(x):
        time.sleep(0.2)
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.1)
        return inner(inner(x) * 2)

    watch = CacheWatch(None)
    began = time.time()
    outer.lower(1.0).compile()
    wall = time.time() - began
    assert 0.3 <= watch.seconds <= wall


def test_what_is_compiled_already_costs_nothing():
    double = jax.jit(lambda x: x * 2)
    double(1.0).block_until_ready()
    watch = CacheWatch(None)
    double(2.0).block_until_ready()
    assert watch.seconds == 0.0


KEYS = ("jit_train_step-0a", "jit_eval_step-0b")
VALUE = bytes(range(256)) * 40


def cache_of(path, max_size=-1):
    """A cache with an entry, and the entry's file."""
    cache = VerifiedCache(str(path), max_size=max_size)
    cache.put(KEYS[0], VALUE)
    (file,) = path.glob("*-cache")
    assert cache.get(KEYS[0]) == VALUE
    return cache, file


def flipped(entry, bit):
    return entry[: bit // 8] + bytes([entry[bit // 8] ^ 1 << bit % 8]) + entry[bit // 8 + 1 :]


@pytest.mark.parametrize("max_size", [-1, 1 << 20])
@pytest.mark.parametrize(
    "altered",
    [
        *(lambda entry, bit=bit: flipped(entry, bit % (8 * len(entry))) for bit in (0, 255, 256, 40_001, -1)),
        *(lambda entry, size=size: entry[:size] for size in (0, 1, 31, 32, 33, 5_000, -1)),
        lambda entry: entry + b"\0",
        lambda entry: bytes(len(entry)),
        lambda entry: entry[32:],  # what JAX alone would have written
    ],
)
def test_an_entry_that_is_not_as_it_was_written_is_said_once_and_written_anew(
    tmp_path, capsys, altered, max_size
):
    cache, file = cache_of(tmp_path, max_size)
    file.write_bytes(altered(file.read_bytes()))
    assert [cache.get(KEYS[0]) for _ in range(3)] == [None] * 3
    out, err = capsys.readouterr()
    assert err == f"compile cache: {file} is not as it was written; it is compiled anew\n" and not out
    cache.put(KEYS[0], VALUE)
    assert VerifiedCache(str(tmp_path), max_size=max_size).get(KEYS[0]) == VALUE
    assert capsys.readouterr() == ("", "")


def test_a_sound_entry_under_the_name_of_another_is_not_taken_for_it(tmp_path, capsys):
    cache, file = cache_of(tmp_path)
    other = file.with_name(file.name.replace(*KEYS))
    other.write_bytes(file.read_bytes())
    assert (cache.get(KEYS[1]), cache.get(KEYS[0])) == (None, VALUE)
    assert str(other) in capsys.readouterr().err


def test_what_was_there_before_is_no_entry_and_nothing_to_speak_of(tmp_path, capsys):
    (tmp_path / f"{KEYS[0]}-cache").write_bytes(VALUE)
    cache = VerifiedCache(str(tmp_path), max_size=-1)
    assert cache.get(KEYS[0]) is None
    assert capsys.readouterr() == ("", "")


def test_an_entry_that_cannot_be_read_is_said_and_compiled(tmp_path, capsys):
    cache, file = cache_of(tmp_path)
    file.unlink()
    file.mkdir()
    assert cache.get(KEYS[0]) is None
    assert "is not as it was written" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_no_part_of_an_entry(tmp_path, monkeypatch):
    cache, file = cache_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.put(KEYS[1], VALUE)
    assert list(tmp_path.iterdir()) == [file]


OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_include_metadata_in_key",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def watch(tmp_path):
    """Of a cache that takes every program; jax has the one before back in the end."""
    before = {key: getattr(jax.config, key) for key in OPTIONS}
    compilation_cache.reset_cache()
    yield start_compile_cache(str(tmp_path))
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def test_an_executable_that_a_full_disk_does_not_take_costs_a_compilation_and_no_word(watch, capfd):
    """Warnings are errors here, so that jax's would be seen."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = []
    for largest in (100, before[0], before[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            jax.clear_caches()
            jax.jit(lambda x: x * x * x).lower(2.0).compile()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        found.append((watch.hits, watch.misses))
    assert found == [(0, 1), (0, 2), (1, 2)]
    assert capfd.readouterr() == ("", "")


def test_those_who_read_while_others_write_see_the_whole_entry_or_none(tmp_path, capsys):
    big, seen = VALUE * 50, set()

    def write():
        for _ in range(20):
            VerifiedCache(str(tmp_path), max_size=-1).put(KEYS[0], big)

    def read():
        for _ in range(200):
            seen.add(VerifiedCache(str(tmp_path), max_size=-1).get(KEYS[0]))

    threads = [threading.Thread(target=act) for act in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert big in seen and seen <= {big, None}
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.iterdir())) == 1


# Compiled four times: nothing there, as it was written, torn, as it was written.
FOUR = """
import sys
from pathlib import Path
import jax
from training.compile_cache import start_compile_cache
watch = start_compile_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for time in range(4):
    jax.jit(lambda x: x * 3 + 1).lower(1.0).compile()
    jax.clear_caches()
    print(watch.hits, watch.misses)
    if time == 1:
        for entry in Path(sys.argv[1]).glob("*-cache"):
            entry.write_bytes(entry.read_bytes()[:-9])
"""


def test_a_torn_entry_costs_one_compilation(tmp_path):
    command = [sys.executable, "-c", FOUR, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=120)
    assert done.stdout.splitlines() == ["0 1", "1 1", "1 2", "2 2"], done.stderr
    assert done.stderr.count("\n") == done.stderr.count("is not as it was written") == 1
