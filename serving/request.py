"""What is asked of the engine, and what it answers: token ids in, token ids and log-probabilities out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from common.checks import require, within

FinishReason = Literal["stop", "length", "cancelled"]
TOP = 20  # alternatives whose log-probabilities can be asked for
SEEDS = 2**32


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from its logits, in this order: penalties and bias, temperature, then the cuts.

    temperature 0 takes the likeliest. min_p: the least share of the likeliest token's probability that a
    token must have. presence, frequency: taken off a token's logit once where it has been written, and once
    each time that it has (prompts do not count). bias: added to a token's logit; -inf forbids it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        within("temperature", self.temperature, 0, 100)
        require(self.top_k >= 0, "top_k", self.top_k, "at least 0; 0 keeps all tokens")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1; 1 keeps all tokens")
        within("min_p", self.min_p, 0, 1)
        within("presence_penalty", self.presence, -2, 2)
        within("frequency_penalty", self.frequency, -2, 2)


class Grammar(Protocol):
    """What may follow, by tokens: a state of its own for each text that is written."""

    def allowed(self) -> Any:
        """Whether each token of the vocabulary may come next: bool [V]."""

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed."""


@dataclass(frozen=True)
class Request:
    """One text to be written behind a prompt of token ids.

    seed: with the prompt and the weights it decides what is drawn; several texts of one prompt have their own
    (`choice`). stop_ids end the text and are not part of it, after min_tokens at the earliest. logprobs: how
    many alternatives are wanted beside each token's own log-probability, None for none of it. client: whose
    turn it is (all clients take turns).
    """

    prompt: tuple[int, ...]
    max_tokens: int
    draw: Draw = Draw()
    seed: int = 0
    choice: int = 0
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None
    client: str = ""

    def __post_init__(self) -> None:
        """ValueError where a value is out of its range."""
        require(len(self.prompt) > 0, "prompt", "0 tokens", "at least one; begin it with the tokenizer's bos")
        within("max_tokens", self.max_tokens, 1)
        within("min_tokens", self.min_tokens, 0, self.max_tokens)
        within("seed", self.seed, 0, SEEDS - 1)
        within("choice", self.choice, 0, 127)
        if self.logprobs is not None:
            within("logprobs", self.logprobs, 0, TOP)


@dataclass(frozen=True)
class Written:
    """A token of an answer; logprob and top, (token, logprob) in descending order, where they were asked for.

    Log-probabilities are natural, float32, of the model itself: before temperature, penalties and cuts.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer: why, the tokens of the prompt, those written, and of the prompt those cached.

    Seconds: queued, from the first chunk of the prompt to the first token, and from there to the last.
    """

    reason: FinishReason
    prompt_tokens: int
    written_tokens: int
    cached_tokens: int
    queued_seconds: float
    prefill_seconds: float
    decode_seconds: float
    version: str


@dataclass(frozen=True)
class Failed:
    """The end of an answer that the engine could not give."""

    message: str


Event = Written | Finished | Failed
Sink = Callable[[int, Event], None]  # a request's number and what came of it; called by the engine's thread


class Refused(Exception):
    """A request that is not taken on now; after `retry_after` seconds it may be."""

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
class Load:
    """What the engine holds at a moment, and has counted since it began."""

    running: int
    waiting: int
    waiting_tokens: int
    slots: int
    pages: int
    pages_used: int  # held by requests
    pages_cached: int  # held by the prefix cache alone
    prompt_tokens: int
    written_tokens: int
    prefix_queries: int  # tokens of prompts that were looked for in the prefix cache
    prefix_hits: int  # those found there
    decode_steps: int
    prefill_chunks: int
    version: str
    guessed: int = 0  # tokens that were read as guesses
    accepted: int = 0  # those of them that came true
    rescored: int = 0  # answers that evaluation's program has scored again
    trainer_gap: float | None = None  # nats at most between both, of the last of these


class Answering(Protocol):
    """What a server needs of the engine: any thread may call; answers come to the sink, in order, by one."""

    max_len: int  # tokens of a prompt and its answer together
    vocab_size: int

    @property
    def version(self) -> str:
        """Of the weights that new requests get: a step and a digest."""

    @property
    def failed(self) -> str | None:
        """Why it answers no more; None while it does."""

    def submit(self, request: Request, sink: Sink) -> int:
        """A number for the request. Raises Refused where it has no place, ValueError where it never will."""

    def full(self) -> Refused | None:
        """Why no request at all has a place now; None where one may have. Costs next to nothing."""

    def cancel(self, number: int) -> None:
        """End a request soon: it is Finished with "cancelled", unless it had ended before."""

    def score(self, tokens: tuple[int, ...], top: int) -> list[Written]:
        """The tokens of a text, the first without figures, with their log-probabilities; waits for them."""

    def load(self) -> Load:
        """Its load now."""
