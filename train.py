"""Train a language model: `python train.py +experiment=NAME`; `--help` lists what there is.

Composes the config, checks it, calls `fit`; nothing else. Several processes of it are one job (see
`parallel.processes`). Exit status: 0 done, 1 fault in mid-run, 2 bad input, 75 saved at a signal: go on.
"""

import atexit
import contextlib
import faulthandler
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

from common.errors import RunFault
from common.host import enough_threads, keep_freed_memory, process_began
from common.terminal import steady_streams
from configs.cli import main
from parallel import processes
from training.config import Config
from training.legal.check import check

HERE = Path(__file__).resolve().parent
STATUS: list[int] = []  # of this process, at its end
BEGAN = [process_began()]  # the first job of a sweep takes it


def foreign_data() -> str | None:
    """Where the package `data` comes from, if not from here: another of that common name may shadow ours."""
    spec = find_spec("data")
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    return None if origin == HERE / "data" / "__init__.py" else str(origin or "nowhere")


def train(config: Config) -> int:
    """Hand over to the training loop, imported only now: `--help` and a typo should not wait for JAX."""
    import jax

    from training.loop import fit
    from training.opening.initial_weights import with_parent_model

    with processes.all_or_none("the configuration"):
        config = with_parent_model(config)
        # Once more, now that the machine is known; under autoscale the run decides what of it is used.
        check(config, jax.device_count() if config.autoscale is None else None)
    return fit(config, began=BEGAN.pop() if BEGAN else None)


def end_at_once() -> None:
    """The last act of a process: Python would take a second to take itself apart."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if STATUS:
        os._exit(STATUS[0])


if __name__ == "__main__":
    steady_streams()
    atexit.register(end_at_once)  # the first to be registered is the last to be called
    faulthandler.enable()  # a library that aborts, as JAX where rank 0 is gone, leaves stacks behind
    keep_freed_memory()  # before jax begins its threads
    enough_threads()
    if where := foreign_data():
        print(f"error: `data` comes from {where}, not from {HERE}; take it off PYTHONPATH", file=sys.stderr)
        sys.exit(2)
    try:
        faults = (RunFault, processes.ClusterFault)
        status = main(train, faults=faults, join=processes.initialize, prints_error=processes.prints_error)
    except Exception:  # a defect: the traceback, and no waiting for processes that will not come
        traceback.print_exc()
        status = 1
    STATUS.append(status)
    processes.write_verdict(status)
    processes.leave(status)
