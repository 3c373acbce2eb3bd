"""What is done to a checkpoint once it is committed, beside the loop: its files are hashed, then sent away.

One thread of the primary does it. What it meets is kept, and raised at the run's next save, wait or close:
an error here ends the run as one of the writer does.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from artifacts.checkpoints.files import LIST, list_files

POLL_SECONDS = 0.05


class Care:
    """The steps that are expected to be committed to `directory`, and what each gets when it is there.

    send: called with a step once its files are listed.
    """

    def __init__(self, directory: Path, send: Callable[[int], None] | None = None):
        self.directory, self._send = directory, send
        self._steps: queue.Queue[int] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._done = threading.Condition()
        self._open = 0  # steps that are not done with
        self._over = threading.Event()
        self._error: Exception | None = None

    def expect(self, step: int) -> None:
        """See to this step as soon as it has been committed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint care", daemon=True)
            self._thread.start()
        self._over.clear()
        with self._done:
            self._open += 1
        self._steps.put(step)

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until all that were expected are done with, `seconds` at most; say whether they are.

        Raises what went wrong with one of them.
        """
        with self._done:
            whole = self._done.wait_for(lambda: self._open == 0, seconds)
        error, self._error = self._error, None
        if error is not None:
            raise error
        return whole

    def decided(self) -> None:
        """The writer is done: what of the expected is not committed by now will not be."""
        self._over.set()

    def _work(self) -> None:
        while True:
            step = self._steps.get()
            try:
                if self._error is None and self._committed(step):
                    self._see_to(step)
            except Exception as error:  # raised in the loop's thread
                self._error = error
            with self._done:
                self._open -= 1
                self._done.notify_all()

    def _committed(self, step: int) -> bool:
        """Wait for the directory to have its name, which it gets whole."""
        while True:
            over = self._over.is_set()  # asked first, or what is committed just now would be passed over
            if (self.directory / str(step)).is_dir():
                return True
            if over:
                return False
            time.sleep(POLL_SECONDS)

    def _see_to(self, step: int) -> None:
        directory = self.directory / str(step)
        if not (directory / LIST).exists():
            list_files(directory)
        if self._send is not None:
            self._send(step)
