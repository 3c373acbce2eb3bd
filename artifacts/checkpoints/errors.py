"""What goes wrong with a checkpoint, in one line each: altered, unreadable, or not to be written."""

import errno
import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.errors import RunFault
from common.text import reason
from parallel import processes


class CorruptCheckpoint(RunFault):
    """What was read is not what was saved."""


@contextmanager
def one_verdict(name: str) -> Iterator[None]:
    """Where one process finds a checkpoint damaged, all do, and none is left waiting in a collective."""
    try:
        with processes.all_or_none(name):
            yield
    except processes.PeerFault as error:
        raise CorruptCheckpoint(str(error)) from error


@contextmanager
def faults(what: str) -> Iterator[None]:
    """Whatever is raised becomes a RunFault that says `what` failed, why, and what to do."""
    try:
        yield
    except (RunFault, processes.ClusterFault):
        raise
    except Exception as error:  # Orbax, tensorstore and the file system each raise their own
        remedy = "free space or mend the disk, then the same command goes on from the last good one"
        raise RunFault(f"{what}: {_disk_says(error) or reason(error)}; {remedy}") from error


@contextmanager
def corruption(step: int | str) -> Iterator[None]:
    """Whatever is raised by a read means that the checkpoint of this step is damaged."""
    _hush()
    try:
        yield
    except CorruptCheckpoint:
        raise
    except Exception as error:  # a truncated file surfaces as any of a dozen types
        raise CorruptCheckpoint(f"checkpoint {step} cannot be read: {reason(error)}") from error


@functools.cache
def _hush() -> None:
    """Drop what is said of the reads that Orbax gives up beside a failing one: pages, and no word of use.

    The failure itself is raised. Each of them ends in a coroutine that nobody awaits, a task whose error
    nobody asks for, and a callback into an event loop that is closed, at any time afterwards.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def unless_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_closed


def _disk_says(error: Exception) -> str | None:
    """The operating system's words, which tensorstore hides behind a long path."""
    reasons = (
        os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
    )
    return next((reason for reason in reasons if reason in str(error)), None)
