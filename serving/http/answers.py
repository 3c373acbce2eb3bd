"""The answers to one HTTP request: given by the engine's thread, taken by the event loop."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

from serving.http.metrics import Metrics, Timing
from serving.http.stream import AnswerFailed, AnswerPart, AnswerStream
from serving.request import Answering, Event, Request, Written

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """Nobody waits for the answers any more."""


class Answers:
    """Made and used on the event loop; `close` leaves nothing running, whatever has happened."""

    def __init__(
        self, engine: Answering, metrics: Metrics, streams: Sequence[AnswerStream], receive: Receive
    ):
        self._engine, self._metrics, self._streams = engine, metrics, streams
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[tuple[int, Event, float]] = deque()
        self._woken = self._gone = False
        self._numbers: list[int] = []
        self._timings = [Timing(time.monotonic()) for _ in streams]
        self._watch = asyncio.create_task(self._until_gone(receive))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._streams)

    def submit(self, requests: Sequence[Request]) -> None:
        """Ask the engine, once a stream. Raises Refused or ValueError; `close` then takes the others back."""
        for index, request in enumerate(requests):
            self._numbers.append(self._engine.submit(request, partial(self._put, index)))

    def check(self) -> None:
        """Raise ClientGone where nobody waits any more."""
        if self._gone:
            raise ClientGone

    async def parts(self) -> AsyncIterator[dict[int, AnswerPart]]:
        """What has come since the last look, by choice, until all have ended.

        Raises ClientGone where nobody waits any more, AnswerFailed where the engine could not.
        """
        while any(not stream.ended for stream in self._streams):
            await self._wake.wait()
            self._wake.clear()
            self._woken = False  # before the events are taken: whatever comes from here on wakes again
            self.check()
            parts: dict[int, AnswerPart] = {}
            while self._events:
                index, event, at = self._events.popleft()
                parts.setdefault(index, AnswerPart()).add(self._take(index, event, at))
            yield parts

    def close(self) -> None:
        """Cancel what has not ended."""
        self._watch.cancel()
        for stream, number, timing in zip(self._streams, self._numbers, self._timings, strict=False):
            if not stream.ended:
                self._engine.cancel(number)
                self._metrics.ended(timing, time.monotonic(), None, "cancelled")

    def _take(self, index: int, event: Event, at: float) -> AnswerPart:
        stream, timing = self._streams[index], self._timings[index]
        stopped = stream.stopped
        try:
            part = stream.take(event)
        except AnswerFailed:
            self._metrics.ended(timing, at, None, None)
            raise
        if isinstance(event, Written):
            timing.tokens.append(at)
        if stream.stopped and not stopped and not stream.ended:
            self._engine.cancel(self._numbers[index])
        if part.finished is not None:
            self._metrics.ended(timing, at, part.finished, part.reason)
        return part

    def _put(self, index: int, number: int, event: Event) -> None:
        """The engine's thread: one wake-up for all that comes before the loop looks."""
        self._events.append((index, event, time.monotonic()))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop is closed, and with it whoever waited
                pass

    async def _until_gone(self, receive: Receive) -> None:
        # A client that closes its connection is seen here alone: nothing is sent while an answer waits.
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._wake.set()
