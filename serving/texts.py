"""Texts on their way through an engine, and what is counted of them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from serving.pages import Held
from serving.request import Request, Sink
from serving.schedule import Seat

SMOOTH = 0.98  # of what a running mean keeps at each value


@dataclass(eq=False)
class Text:
    """A request on its way."""

    number: int
    request: Request
    sink: Sink
    asked: float
    version: str = ""
    held: Held | None = None
    seat: "Seat[Text] | None" = None
    cached: int = 0
    began: float = 0.0  # its prompt's first chunk
    first: float = 0.0  # its first token
    dispatched: int = 0
    written: int = 0
    cancelled: bool = False
    over: bool = False
    noted: list[tuple[int, float]] | None = None  # tokens and log-probabilities, where they are scored again

    @property
    def tokens(self) -> int:
        """Of prompt and answer, as far as they may go."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def unread(self) -> int:
        """Of the prompt, what the cache has not."""
        return len(self.request.prompt) if self.seat is None else self.seat.end - self.seat.at


@dataclass
class Queued:
    """What waits, in sums that are kept and not made: how many, their tokens, chunks and longest answers."""

    requests: int = 0
    tokens: int = 0
    chunks: int = 0
    answers: int = 0

    def add(self, text: Text, chunk: int, count: int = 1) -> None:
        """Count a text that begins to wait, or with -1 one that waits no longer."""
        self.requests += count
        self.tokens += count * text.tokens
        self.chunks += count * -(-len(text.request.prompt) // chunk)
        self.answers += count * text.request.max_tokens


@dataclass
class Pending:
    """What a step has made, still on the devices, and for whom."""

    texts: dict[int, Text]
    out: dict[str, Any]
    top: tuple[Any, Any] | None


@dataclass
class ReadyWeights:
    """Weights ready to decode, with the step and digest that name them."""

    version: str
    tree: Any = field(repr=False)


@dataclass
class Counts:
    """What has happened since the engine began."""

    prompt_tokens: int = 0
    written_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    decode_steps: int = 0
    prefill_chunks: int = 0
    guessed: int = 0
    accepted: int = 0


@dataclass
class Pace:
    """Seconds of a step and of a chunk of late, and the share of what they may that answers come to be long.

    What the engine could do, and not what it did: a single user is served as slowly as a crowd.
    """

    decode: float = 0.0
    chunk: float = 0.0
    share: float = 1.0

    def took(self, seconds: float, chunks: int) -> None:
        """A step, and so many chunks before it, were over so long after the step before."""
        if chunks == 0:
            self.decode = _mean(self.decode, seconds)
        else:
            self.chunk = _mean(self.chunk, max(0.0, seconds - self.decode) / chunks)

    def ended(self, written: int, most: int) -> None:
        """An answer has come to its end."""
        self.share = SMOOTH * self.share + (1 - SMOOTH) * written / most

    def seconds(self, texts: Collection[Text], queued: Queued, chunk: int, slots: int) -> float:
        """How long what is left of these texts, and what is queued, will take all slots together."""
        chunks = queued.chunks + sum(-(-text.unread // chunk) for text in texts)
        left = sum(max(0.0, self.share * text.request.max_tokens - text.written) for text in texts)
        tokens = self.share * queued.answers + left
        return chunks * self.chunk + tokens / slots * self.decode


def _mean(before: float, now: float) -> float:
    return now if before == 0 else SMOOTH * before + (1 - SMOOTH) * now
