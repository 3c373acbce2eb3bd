"""Batches made ahead, in a thread, while a step runs."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from data.batch import Batch, Rows
from data.loading.input_timing import InputTiming, Seconds, copying, stage
from data.loading.loader import Loader


class Prefetcher:
    """A thread that makes batches ahead, from step `start` on, `depth` at most waiting.

    `place` (such as a copy to devices) is applied in the thread. What the thread raises, `next` raises.
    `stages`: the seconds that the thread spent on the batch of the last `next`, by stage.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        start: int,
        depth: int = 2,
        rows: Rows = None,
        place: Callable[[Batch], Any] = lambda batch: batch,
    ):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self.stages: Seconds = {}
        self._thread = threading.Thread(target=self._work, args=(loader, start, rows, place), daemon=True)
        self._thread.start()

    def _work(self, loader: Loader, step: int, rows: Rows, place: Callable[[Batch], Any]) -> None:
        stages = InputTiming()
        try:
            while not self._closed.is_set():
                with stages.watching():
                    with copying(stages):
                        batch = loader.batch(step, rows)
                    with stage("place"):
                        placed = place(batch)
                self._put((placed, loader.state(), stages.take()))
                step += 1
        except (
            BaseException
        ) as error:  # whatever it is, the consumer must hear of it rather than wait for ever
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def next(self) -> tuple[Any, float, dict[str, Any]]:
        """Return (batch, seconds waited for it, the loader's state after it)."""
        began = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # a second call must not wait for ever either
            raise item
        batch, state, self.stages = item
        return batch, time.perf_counter() - began, state

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join()
