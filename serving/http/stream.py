"""Tokens of an answer to its text, piece by piece, as far as no later token can change it. Knows no HTTP."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.request import Event, Failed, Finished, FinishReason, Written


class TextStream:
    """The text of tokens that come one by one: the same, however they are split and whenever they come.

    pieces: the bytes that each token adds (`Tokenizer.pieces`). Held back is half a character, and what may
    yet become one of the strings `stops`: the text ends before the first of them to be complete, once `least`
    tokens have been written.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = (), least: int = 0) -> None:
        self._pieces, self._stops, self._least = pieces, stops, least
        # As in `Tokenizer.decode`, what is no UTF-8 becomes U+FFFD.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._given = self._tokens = 0
        self.stopped = False  # by one of the strings

    @property
    def length(self) -> int:
        """Characters so far, held ones included: where the next token begins."""
        return self._given + len(self._held)

    def write(self, token: int) -> str:
        """The text that is certain from here on."""
        self._tokens += 1
        return self._release(self._decoder.decode(self._piece(token)), last=False)

    def finish(self) -> str:
        """What was held back; nothing behind a stop string."""
        return self._release(self._decoder.decode(b"", final=True), last=True)

    def _piece(self, token: int) -> bytes:
        # A padded vocabulary has rows that no token owns.
        return self._pieces[token] if token < len(self._pieces) else b""

    def _release(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        count = len(text) - (0 if last else _beginning(text, self._stops))
        if self._tokens >= self._least:
            found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
            if found:
                # Of several, the one that ends first: it would be found too if letters came one by one.
                self.stopped, count = True, min(found)[1]
        self._held = "" if self.stopped else text[count:]
        self._given += count
        return text[:count]


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many of the last letters are the beginning of one of the strings."""
    most = max(map(len, stops), default=1) - 1
    sizes = range(min(most, len(text)), 0, -1)
    return next((n for n in sizes if any(len(s) > n and text.endswith(s[:n]) for s in stops)), 0)


@dataclass
class AnswerPart:
    """What an answer has gained: text that is certain, its tokens and where in the text each begins.

    reason: why it has ended, None while it goes on. finished: what the engine says of the whole.
    """

    text: str = ""
    written: list[Written] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    finished: Finished | None = None

    def add(self, other: "AnswerPart") -> None:
        """Take in what came behind it."""
        self.text += other.text
        self.written += other.written
        self.offsets += other.offsets
        self.reason, self.finished = other.reason, other.finished


class AnswerFailed(Exception):
    """The engine could not give an answer; the message is one line."""


class AnswerStream:
    """The parts of one answer, from the engine's events."""

    def __init__(self, stream: TextStream, offset: int = 0) -> None:
        self._stream, self._offset = stream, offset
        self.count = 0  # tokens
        self.ended = False

    @property
    def stopped(self) -> bool:
        """A stop string has come: what the engine may still write is not wanted."""
        return self._stream.stopped

    def take(self, event: Event) -> AnswerPart:
        """What an event adds. Raises AnswerFailed where the engine has failed."""
        if isinstance(event, Failed):
            self.ended = True
            raise AnswerFailed(event.message)
        if isinstance(event, Finished):
            self.ended = True
            text = self._stream.finish()  # may complete a stop string
            if event.reason == "cancelled" and not self.stopped:
                raise AnswerFailed("the answer was cancelled by the server; ask again")
            return AnswerPart(text, reason="stop" if self.stopped else event.reason, finished=event)
        if self.stopped:
            return AnswerPart()
        self.count += 1
        at = self._offset + self._stream.length
        return AnswerPart(self._stream.write(event.token), [event], [at])
