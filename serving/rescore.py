"""How far what an engine writes lies from what evaluation says of the same text: some are scored again."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.texts import Text

EVERY = 100  # answers, of which one is scored again
HELD = 4  # that wait for it at most; older ones are dropped


@dataclass
class Rescored:
    """Answers that wait to be scored again, how many have been, and the last one's gap.

    gap: the largest difference, in nats, between a token's log-probability as it was written (by pages, step
    by step) and by one pass over the text, as evaluation and the trainer make it; None before the first.
    """

    gap: float | None = None
    answers: int = 0
    waiting: deque[Text] = field(default_factory=lambda: deque(maxlen=HELD))

    def begin(self, text: Text) -> None:
        """Let a text note what is written, where it is one that will be scored again."""
        if text.number % EVERY == 1:
            text.noted = []

    def end(self, text: Text) -> None:
        """Let an answer that came to its end wait, where it is such a one."""
        if text.noted:
            self.waiting.append(text)

    def score(self, logprobs: Callable[[Text, tuple[int, ...]], list[float] | None]) -> bool:
        """Score an answer that waits, if there is any; whether there was.

        logprobs: of the tokens of a text behind its first, by the text's own weights; None where those are
        gone.
        """
        if not self.waiting:
            return False
        text = self.waiting.popleft()
        assert text.noted is not None
        tokens, written = zip(*text.noted, strict=True)
        found = logprobs(text, (*text.request.prompt, *tokens))
        if found is not None:
            again = found[-len(written) :]
            self.gap = max(abs(a - b) for a, b in zip(written, again, strict=True))
            self.answers += 1
        return True
