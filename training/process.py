"""What the system knows of this process: when it began, and how much memory it holds."""

import os
import time
from pathlib import Path


def process_began() -> float:
    """Seconds since 1970; where there is no /proc it is now."""
    try:
        stat = Path("/proc/self/stat").read_text()
        # The name, in parentheses, may hold anything; the start is the 22nd field, in ticks since the boot.
        ticks = int(stat.rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - max(age, 0.0)


def resident_bytes() -> int | None:
    """Host memory that this process holds now; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_model() -> str | None:
    """The processor's name for itself; None where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
