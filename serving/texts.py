"""Texts on their way through an engine, and what is counted of them."""

from collections.abc import Iterator
from dataclasses import dataclass

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

    @property
    def tokens(self) -> int:
        """Of prompt and answer, as far as they may go."""
        return len(self.request.prompt) + self.request.max_tokens


@dataclass
class Counts:
    """What has happened since the engine began."""

    prompt_tokens: int = 0
    written_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    decode_steps: int = 0
    prefill_chunks: int = 0


@dataclass
class Pace:
    """Tokens a second of late, and the share of what they may that answers come to be long."""

    rate: float = 0.0
    share: float = 1.0

    def done(self, tokens: float, seconds: float) -> None:
        """So many tokens were read or written in so long."""
        now = tokens / max(seconds, 1e-9)
        self.rate = now if self.rate == 0 else SMOOTH * self.rate + (1 - SMOOTH) * now

    def ended(self, written: int, most: int) -> None:
        """An answer has come to its end."""
        self.share = SMOOTH * self.share + (1 - SMOOTH) * written / most

    def seconds(self, texts: Iterator[Text]) -> float:
        """How long these will take all slots together."""
        work = sum(len(text.request.prompt) + self.share * text.request.max_tokens for text in texts)
        return work / self.rate if self.rate else 0.0
