"""Something made before it is needed, in a thread: the plan of the next epoch."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """At most one value at a time, under a number."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._value: Future[T] = Future()

    def start(self, number: int, make: Callable[[], T]) -> None:
        """Begin to make the value of a number, unless it is the one under way."""
        if number == self._number:
            return
        self._number, self._value = number, Future()
        # Of no use to a program that ends: it does not wait for this thread.
        threading.Thread(target=_run, args=(make, self._value), daemon=True).start()

    def take(self, number: int) -> T | None:
        """Wait for the value of a number and give it away; None where it was never started.

        Raises what making it raised.
        """
        if number != self._number:
            return None
        self._number = None
        return self._value.result()


def _run(make: Callable[[], T], value: "Future[T]") -> None:
    try:
        value.set_result(make())
    except BaseException as error:  # whatever it is, the one that waits must hear of it
        value.set_exception(error)
