"""What a process frees it keeps: a CPU's step asks for the same gigabyte again and again."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # as in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc hand freed memory to the next that asks, not to the system; whether that could be done.

    XLA:CPU allocates an executable's temporaries anew at every call. glibc maps such a block and unmaps it
    after use, and the system clears each of its pages at the first touch: a step of 13M parameters and 4,096
    tokens spent a seventh of its processor time there. One arena for all threads, since only the main one
    may grow without mapping. Call it before any thread begins; a process then holds on to the most it ever
    needed. Elsewhere than under glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        [mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1)]
    )
