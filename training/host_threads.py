"""Threads for several CPU devices of one process: more than the machine has cores, or they wait for ever."""

import os
import re

NAME = "NPROC"  # how many cores XLA takes the machine to have, which is how many threads it makes
FORCED = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
EACH = 4  # threads of a device that may be in a collective at once: layers, the loss, and what stands beside


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
    if devices < 2 or NAME in os.environ:
        return None
    threads = max(os.cpu_count() or 1, EACH * devices)
    os.environ[NAME] = str(threads)
    return threads
