"""Newer weights while an engine answers: looked for, loaded beside the old ones, and handed over."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from common.errors import RunFault


class Updated(Protocol):
    """What takes new weights: `serving.engine.Engine`."""

    def update(self, params: Any, version: str) -> None:
        """Answer new requests by these."""


@dataclass(frozen=True)
class Followed:
    """The step that is answered by and when it was saved (seconds since 1970), and the newest there is.

    The newest may be damaged: then answers stay behind it until there is another.
    """

    step: int
    saved: float
    newest: int


class Follower:
    """Looks every `seconds` for a step newer than the one that is answered by, and hands its weights over.

    step, saved: what is answered by, and when it was saved. newest: the newest step there is, None where
    there is none. load: (parameters, version, when they were saved) of a step, verified, so that it raises
    for what is damaged. A step that cannot be loaded is named with its reason, once, and the engine goes on
    as it is. `followed` is where it stands.
    """

    def __init__(
        self,
        engine: Updated,
        step: int,
        saved: float,
        newest: Callable[[], int | None],
        load: Callable[[int], tuple[Any, str, float]],
        seconds: float = 10.0,
    ) -> None:
        self._engine, self._seconds = engine, seconds
        self._newest, self._load = newest, load
        self.followed = Followed(step, saved, step)
        self._bad: set[int] = set()

    def look(self) -> bool:
        """Whether newer weights were there, and are answered by now."""
        try:
            step = self._newest()
            if step is None or step <= self.followed.step:
                return False
            self.followed = replace(self.followed, newest=step)
            if step in self._bad:
                return False
        except (OSError, ValueError, RunFault) as error:
            print(f"follow: {error}; looked for again in {self._seconds:g} s", file=sys.stderr)
            return False
        try:
            params, version, saved = self._load(step)
        except (OSError, ValueError, RunFault) as error:
            self._bad.add(step)
            print(f"follow: step {step} is left out: {error}", file=sys.stderr)
            return False
        self._engine.update(params, version)
        self.followed = Followed(step, saved, step)
        print(f"follow: answers are by {version} from now", file=sys.stderr)
        return True

    def follow(self, over: threading.Event) -> None:
        """Look again and again until it is over."""
        while not over.wait(self._seconds):
            self.look()
