"""Requests to scores: text becomes tokens as lm-evaluation-harness cuts it, and the generator does the rest.

What stands here is on the host: which tokens are read, which of them are scored, and which belong together.
The generator gives every text the same figures whatever is scored beside it.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from data.tokens.tokenizer import Tokenizer
from evaluation.programs import Attempt, judge
from evaluation.requests import TaskRequest
from serving.sampling import Sampling, sample_keys

PROMPTS = 64  # completed at once
WRITTEN = ("generate", "program")  # kinds for which a model writes text


class Scorer(Protocol):
    """What reads and writes tokens: `serving.generator.Generator`."""

    def score(self, texts: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[Any]:
        """Log-probabilities of each text's tokens from its start on."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Any,
        *,
        max_new_tokens: int,
        stop_id: int | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt."""


@dataclass
class TaskTokens:
    """Requests as tokens; made once, and scored as often as weights change.

    Of texts [i] the tokens from starts[i] on are scored, for the continuation owners[i] = (request, number).
    prompts: of the requests that generate, by their number. cut: texts whose left part is not read.
    """

    requests: Sequence[TaskRequest]
    texts: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    cut: int = 0

    @property
    def tokens(self) -> int:
        """How many a model reads."""
        return sum(map(len, self.texts)) + sum(map(len, self.prompts.values()))


@dataclass(frozen=True)
class Scored:
    """What a model says to a request: nats and tokens of each continuation, or what it wrote."""

    request: TaskRequest
    logprobs: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    text: str = ""
    samples: tuple[Attempt, ...] = ()


def plan(requests: Sequence[TaskRequest], tokenizer: Tokenizer, *, length: int, bos: bool) -> TaskTokens:
    """What is read of each request, of at most `length` tokens at once.

    bos: whether texts begin with the tokenizer's, where a request leaves it open. Texts that are longer are
    cut from the left; a continuation that is longer itself, as rolling ones are, is scored in windows.
    """
    made = TaskTokens(requests)
    pairs = [
        (number, at, *pair)
        for number, request in enumerate(requests)
        if request.kind not in WRITTEN
        for at, pair in enumerate(request.pairs())
    ]
    split = split_tokens(tokenizer, [(context, continuation) for *_, context, continuation in pairs])
    for (number, at, *_), (context, continuation) in zip(pairs, split, strict=True):
        with_bos = _wants(requests[number], bos)
        # The first token is scored too, so something must stand before it.
        head = [tokenizer.bos_id] if with_bos or not context else []
        first = len(head) + len(context)
        made.cut += first + len(continuation) > length + 1 and requests[number].kind != "rolling"
        for text, start in windows([*head, *context, *continuation], first, length, keep_first=with_bos):
            made.texts.append(text)
            made.starts.append(start)
            made.owners.append((number, at))
    for number, request in enumerate(requests):
        if request.kind in WRITTEN:
            made.prompts[number], shortened = _prompt(request, tokenizer, length, _wants(request, bos))
            made.cut += shortened
    return made


def _wants(request: TaskRequest, bos: bool) -> bool:
    return bos if request.bos is None else request.bos


def split_tokens(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The tokens of (context, continuation), which are those of the one text that they are together.

    Spaces that end a context belong to the continuation, since to most vocabularies they are part of the next
    word. The cut lies behind as many tokens as the context has by itself, and before the last one at most.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    # A context is shared by its continuations: it is cut once.
    contexts = {context: 0 for context, _ in moved}
    for context, ids in zip(contexts, tokenizer.encode_batch(list(contexts)), strict=True):
        contexts[context] = len(ids)
    whole = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    found = []
    for (context, _), ids in zip(moved, whole, strict=True):
        at = min(contexts[context], len(ids) - 1)
        found.append((ids[:at].tolist(), ids[at:].tolist()))
    return found


def windows(
    tokens: Sequence[int], start: int, length: int, *, keep_first: bool
) -> list[tuple[list[int], int]]:
    """(text, start) in which each token from `start` on is scored once, of at most `length` tokens read.

    One, with what is too far to the left cut off, as long as the scored tokens fit. keep_first: the first
    token stays in front of what is cut.
    """
    found = []
    for at in range(start, len(tokens), length):
        end = min(at + length, len(tokens))
        begin = max(0, end - length - 1)
        text = list(tokens[begin:end])
        if keep_first and 0 < begin < at - 1:
            text[0] = tokens[0]
        found.append((text, at - begin))
    return found


def _prompt(request: TaskRequest, tokenizer: Tokenizer, length: int, bos: bool) -> tuple[list[int], bool]:
    room = length - request.max_new_tokens
    if room < 2:
        raise ValueError(
            f"task {request.task}: max_new_tokens={request.max_new_tokens} leaves no room for a question in "
            f"length={length}; use at most {max(1, length - 2)}, or a longer length"
        )
    ids = tokenizer.encode(request.contexts[0].rstrip(" ")).tolist()
    head = [tokenizer.bos_id] if bos or not ids else []
    kept = ids[max(0, len(ids) + len(head) - room) :]
    return [*head, *kept], len(kept) < len(ids)


def score(
    generator: Scorer, tokenizer: Tokenizer, planned: TaskTokens, isolation: str = "full"
) -> list[Scored]:
    """One result a request, in their order. All processes of a job call it together.

    isolation: of the programs that are written and tested (`evaluation.sandbox`).
    """
    figures = generator.score(planned.texts, planned.starts)
    sums: dict[tuple[int, int], list[float]] = {}
    for owner, found in zip(planned.owners, figures, strict=True):
        sums.setdefault(owner, []).extend(map(float, found))
    texts = _written(generator, tokenizer, planned)
    results = []
    asked = {place: planned.requests[place[0]] for place in texts}
    programs = [(asked[place], text) for place, text in texts.items() if asked[place].kind == "program"]
    tested = iter(judge(programs, isolation))
    for number, request in enumerate(planned.requests):
        if request.kind == "generate":
            results.append(Scored(request, text=texts[number, 0]))
        elif request.kind == "program":
            results.append(Scored(request, samples=tuple(islice(tested, request.draws.samples))))
        else:
            parts = [sums[number, at] for at in range(len(request.continuations))]
            results.append(Scored(request, tuple(map(math.fsum, parts)), tuple(map(len, parts))))
    return results


def _written(generator: Scorer, tokenizer: Tokenizer, planned: TaskTokens) -> dict[tuple[int, int], str]:
    """The texts of each request that generates, by (request, draw) in their order, up to the first stop."""
    requests, places = planned.requests, []
    groups: dict[tuple[int, float, int], list[tuple[int, int]]] = {}
    for n in planned.prompts:
        draws = requests[n].draws
        group = groups.setdefault((requests[n].max_new_tokens, draws.temperature, draws.seed), [])
        group += [(n, draw) for draw in range(draws.samples)]
        places += [(n, draw) for draw in range(draws.samples)]
    found = {}
    for (most, temperature, seed), members in sorted(groups.items()):
        # Alike in length: a batch goes on until its last row is done.
        members.sort(key=lambda place: len(planned.prompts[place[0]]))
        for at in range(0, len(members), PROMPTS):
            part = members[at : at + PROMPTS]
            tails = generator.complete(
                [planned.prompts[n] for n, _ in part],
                Sampling(temperature, vocab_size=tokenizer.vocab_size),
                sample_keys(seed, [_number(requests[n], draw) for n, draw in part]),
                max_new_tokens=most,
                stop_id=tokenizer.eos_id,
            )
            for (n, draw), tail in zip(part, tails, strict=True):
                text = tokenizer.decode(tail)
                ends = [text.find(stop) for stop in requests[n].stop if stop in text]
                found[n, draw] = text[: min(ends, default=len(text))]
    return {place: found[place] for place in places}


def _number(request: TaskRequest, draw: int) -> int:
    """Of a draw: the document's own, so that its texts are the same whichever others are chosen."""
    return zlib.crc32(f"{request.task}/{request.doc}/{draw}".encode()) >> 1
