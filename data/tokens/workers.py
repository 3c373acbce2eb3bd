"""What every spawned worker process begins with."""

import multiprocessing
import os
import signal
import threading


def as_worker() -> None:
    """Leave Ctrl-C to the parent, which handles it once, and end with it, also when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when it is gone, killed too
        os._exit(1)
