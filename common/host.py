"""What the host offers a process, and what a process keeps of it: its begin, memory, threads for XLA."""

import ctypes
import os
import re
import sys
import time
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # as in glibc's malloc.h
XLA_THREADS = "NPROC"  # how many cores XLA takes the machine to have, which is how many threads it makes
HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux
FORCED = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
# XLA's scheduler that lets devices reach collectives in one order; the default (jaxlib 0.10) does not.
ONE_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
EACH = 4  # threads of a device that may be in a collective at once: layers, the loss, and what stands beside


def process_began() -> float:
    """Seconds since 1970; where there is no /proc it is now."""
    try:
        stat = Path("/proc/self/stat").read_text("utf-8")
        # The name, in parentheses, may hold anything; the start is the 22nd field, in ticks since the boot.
        ticks = int(stat.rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - max(age, 0.0)


def resident_bytes() -> int | None:
    """Host memory that this process holds now; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_model() -> str | None:
    """The processor's name for itself; None where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def keep_freed_memory() -> bool:
    """Have glibc hand freed memory to the next that asks, not to the system; whether that could be done.

    XLA:CPU allocates an executable's temporaries anew at every call. glibc maps such a block and unmaps it
    after use, and the system clears each of its pages at the first touch: a step of 13M parameters and 4,096
    tokens spent a seventh of its processor time there. One arena for all threads, since only the main one
    may grow without mapping. Its pages are large ones where the system gives them, which spares another
    twentieth. Call it before any thread begins; a process then holds on to the most it ever needed. Elsewhere
    than under glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None or not all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1)]):
        return False
    _ask_for_large_pages(libc)
    return True


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Have what the heap will grow into backed by large pages; where that is refused they are small."""
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # The heap grows by it and keeps it when it is freed, by the options above. Untouched it is no memory.
    page = os.sysconf("SC_PAGE_SIZE")
    size = page * (os.sysconf("SC_PHYS_PAGES") // 2)
    start = libc.malloc(size)
    if start:
        begin = -(-start // page) * page
        libc.madvise(begin, (start + size - begin) // page * page, HUGE_PAGES)
        libc.free(start)


def enough_threads() -> int | None:
    """Have XLA make as many threads as forced CPU devices need, before jax is used; how many, if it is told.

    A device that waits in a collective keeps a thread of the pool that all devices share. XLA begins a
    collective behind a loop when the loop has begun, not when it is over, so that some devices wait in one of
    the loop and others in the one behind it; with a thread for each device, all of them wait, and nobody is
    left to bring the rest there (XLA gives up after 40 s). Seen with `mesh.fsdp=8` on two cores. A value that
    the environment has already is kept.
    """
    found = FORCED.findall(os.environ.get("XLA_FLAGS", ""))
    devices = int(found[-1]) if found else int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1)
    if devices < 2 or XLA_THREADS in os.environ:
        return None
    threads = max(os.cpu_count() or 1, EACH * devices)
    os.environ[XLA_THREADS] = str(threads)
    return threads


def one_order(platform: str, devices: int) -> dict[str, str]:
    """Compiler options for a program of so many devices, without which those of a CPU wait for ever.

    XLA's default scheduler lets them reach independent collectives in different orders; each then waits in
    another one. An executable of jaxlib 0.12 that comes from the compile cache takes them for the same one
    instead: one execution in a hundred of a ring over two devices was wrong, or ended the process.
    """
    return dict(ONE_ORDER) if platform == "cpu" and devices > 1 else {}
