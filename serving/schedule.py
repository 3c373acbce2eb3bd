"""Whose turn it is: texts wait, get a slot, have their prompts read chunk by chunk, and are written.

On the host alone, without a clock: the same calls give the same order.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")
Turn = Literal["decode", "prefill"]


@dataclass
class Seat(Generic[Item]):
    """A text in a slot, of whose prompt tokens `at` .. `end` are still to be read."""

    slot: int
    item: Item
    at: int
    end: int


class Turns(Generic[Item]):
    """`slots` texts at a time; those that wait are taken in turn of their clients, a client's in order.

    A step writes a token of every text that is ready, and after every `every` of those one chunk of one
    prompt is read, in the order of their slots being given: whatever arrives, the gap between two tokens is
    at most one decode and one chunk (where every=1).
    """

    def __init__(self, slots: int, chunk: int, every: int = 1) -> None:
        self.chunk, self.every = chunk, every
        self._free = list(range(slots - 1, -1, -1))
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()  # the client whose turn it is, first
        self._reading: deque[Seat[Item]] = deque()
        self._writing: dict[int, Seat[Item]] = {}
        self._since = 0  # decodes since the last chunk

    @property
    def waiting(self) -> Iterator[Item]:
        """Texts without a slot."""
        return (item for queue in self._waiting.values() for item in queue)

    @property
    def seats(self) -> Iterator[Seat[Item]]:
        """Texts with a slot."""
        yield from self._reading
        yield from self._writing.values()

    @property
    def writing(self) -> dict[int, Seat[Item]]:
        """By their slots, texts whose prompts are read."""
        return self._writing

    def add(self, item: Item, client: str) -> None:
        """Let a text wait."""
        self._waiting.setdefault(client, deque()).append(item)

    def drop(self, item: Item, client: str) -> None:
        """Let it wait no longer."""
        self._waiting[client].remove(item)
        if not self._waiting[client]:
            del self._waiting[client]

    def admit(self, place: Callable[[Item], tuple[int, int] | None]) -> list[Seat[Item]]:
        """Give slots to those that wait, as many as there are.

        place: which tokens of the prompt are still to be read, or None where the text has no room now: then
        nobody overtakes it, so that a long one is not left waiting by short ones.
        """
        seated = []
        while self._free and self._waiting:
            client, queue = next(iter(self._waiting.items()))
            if (span := place(queue[0])) is None:
                break
            seat = Seat(self._free.pop(), queue.popleft(), *span)
            self._waiting.move_to_end(client)
            if not queue:
                del self._waiting[client]
            seated.append(seat)
            if seat.at < seat.end:
                self._reading.append(seat)
            else:
                self._writing[seat.slot] = seat
        return seated

    def turn(self) -> Turn | None:
        """What is done next; None where there is nothing to do."""
        if not self._reading:
            self._since = 0
            return "decode" if self._writing else None
        if self._writing and self._since < self.every:
            self._since += 1
            return "decode"
        self._since = 0
        return "prefill"

    def read(self) -> tuple[Seat[Item], int, int]:
        """(seat, first token, behind the last) of the chunk whose turn it is; it counts as read from now."""
        seat = self._reading[0]
        begin = seat.at
        seat.at = min(begin + self.chunk, seat.end)
        if seat.at == seat.end:
            self._writing[seat.slot] = self._reading.popleft()
        return seat, begin, seat.at

    def leave(self, seat: Seat[Item]) -> None:
        """Free its slot."""
        if self._writing.pop(seat.slot, None) is None:
            self._reading.remove(seat)
        self._free.append(seat.slot)
