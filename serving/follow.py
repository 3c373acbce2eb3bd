"""Newer weights while an engine answers: looked for, loaded beside the old ones, and handed over."""

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from common.errors import RunFault


class Updated(Protocol):
    """What takes new weights: `serving.engine.Engine`."""

    def update(self, params: Any, version: str) -> None:
        """Answer new requests by these."""


class Follower:
    """Looks every `seconds` for a step newer than the one that is answered by, and hands its weights over.

    newest: the newest step there is, None where there is none. load: (parameters, version) of a step,
    verified, so that it raises for what is damaged. A step that cannot be loaded is named with its reason,
    once, and the engine goes on as it is.
    """

    def __init__(
        self,
        engine: Updated,
        step: int,
        newest: Callable[[], int | None],
        load: Callable[[int], tuple[Any, str]],
        seconds: float = 10.0,
    ) -> None:
        self._engine, self._step, self._seconds = engine, step, seconds
        self._newest, self._load = newest, load
        self._bad: set[int] = set()

    def look(self) -> bool:
        """Whether newer weights were there, and are answered by now."""
        try:
            step = self._newest()
            if step is None or step <= self._step or step in self._bad:
                return False
        except (OSError, ValueError, RunFault) as error:
            print(f"follow: {error}; looked for again in {self._seconds:g} s", file=sys.stderr)
            return False
        try:
            params, version = self._load(step)
        except (OSError, ValueError, RunFault) as error:
            self._bad.add(step)
            print(f"follow: step {step} is left out: {error}", file=sys.stderr)
            return False
        self._engine.update(params, version)
        self._step = step
        print(f"follow: answers are by {version} from now", file=sys.stderr)
        return True

    def follow(self, over: threading.Event) -> None:
        """Look again and again until it is over."""
        while not over.wait(self._seconds):
            self.look()
