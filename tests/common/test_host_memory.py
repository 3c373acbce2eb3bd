"""Freed memory is used again: its pages are not asked of the system twice."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = 64 * 2**20 // 4096
FAULTS = """
import resource, sys
from common.host import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import numpy as np
def touch():
    np.empty(64 * 2**20, np.uint8).fill(1)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT HELD HERE: another C library than glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_kept_memory_costs_no_page_faults(keep):
    words = [sys.executable, "-c", FAULTS, "keep" if keep else "leave"]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (int(out) < PAGES // 100) if keep else (int(out) > 10)  # huge pages make few faults of many


LARGE = """
import ctypes
from common.host import keep_freed_memory
assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
address = libc.malloc(ctypes.c_size_t(64 << 20))
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0] and ":" not in line.split()[0]:
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        inside = begin <= address + (8 << 20) < end
    if inside and line.startswith("VmFlags"):
        print("hg" in line.split())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT HELD HERE: another C library than glibc")
def test_the_heap_asks_for_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("NOT HELD HERE: this kernel has no transparent large pages")
    words = [sys.executable, "-c", LARGE]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "True\n"
