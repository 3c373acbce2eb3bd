"""Whose fault it is: the command line's before the first step, the machine's from then on."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from artifacts.checkpoints.manager import Checkpoints
from artifacts.directory import RunDirectory
from common.errors import Requeue, RunFault
from parallel import processes

# What gloo, NCCL and the coordination service say when the other end of a connection is gone.
LOST = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "unavailable",
    "aborted",
    "remote process exited",
)


@contextmanager
def before_the_first_step() -> Iterator[None]:
    """Devices that cannot hold what is asked for are the command line's fault while nothing is written."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(device_fault(error)) from error


def device_fault(error: Exception) -> str:
    """One line for whatever XLA says, with a remedy where it says that memory is short."""
    line = str(error).strip().splitlines()[0][:300]
    remedy = "raise training.accumulation_steps, set training.remat=full, or split the model by mesh.fsdp"
    short = any(word in line for word in ("RESOURCE_EXHAUSTED", "ut of memory"))
    return f"the devices failed: {line.rstrip('.')}" + (f"; {remedy}" if short else "")


@contextmanager
def in_mid_run(directory: RunDirectory, checkpoints: Checkpoints | None = None) -> Iterator[None]:
    """From here on nothing is the command line's fault: what the data or the devices raise is a RunFault."""
    try:
        yield
    except KeyboardInterrupt as error:
        step = checkpoints.newest_committed() if checkpoints is not None else 0
        raise type(error)(f"interrupted; the same command goes on from step {step}") from None
    except OSError as error:
        where, what = error.filename or directory.path, error.strerror or error
        raise RunFault(
            f"{where}: {what}; free space or mend the disk, then the same command goes on"
        ) from error
    except ValueError as error:
        raise RunFault(str(error)) from error
    except processes.PeerFault:
        raise
    except processes.ClusterFault as error:
        raise Requeue(f"{error}; the same command goes on from the last checkpoint") from error
    except jax.errors.JaxRuntimeError as error:
        if processes.process_count() > 1 and any(word in str(error).lower() for word in LOST):
            what = f"process {processes.process_index()} has lost another one"
            line = device_fault(error)
            raise Requeue(f"{what}: {line}; the same command goes on from the last checkpoint") from error
        raise RunFault(device_fault(error)) from error
