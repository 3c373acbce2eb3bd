"""`train.py` that takes PAUSE seconds a step and no core for it: what befalls a run falls in its middle."""

import os
import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # a process that it spawns imports this file under another name
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.parent)
    pause = float(os.environ.get("PAUSE", "0"))
    from data.loading.loader import Loader

    batch = Loader.batch

    def paced(self, step, rows=None):
        time.sleep(pause)
        return batch(self, step, rows)

    Loader.batch = paced  # type: ignore[method-assign]
    runpy.run_path(str(script), run_name="__main__")
