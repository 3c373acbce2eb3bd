"""From a body on the wire to requests for the engine. Raises ValueError (ApiError) in one line by the key."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.checks import require, within
from serving.http.wire import AnswerBody, ApiError, ChatBody, ChatMessage, CompletionBody
from serving.request import TOP, Draw, Grammar, Request

ANSWERS = 128  # of one request: prompts times n
STOPS, STOP_LETTERS = 16, 256  # OpenAI takes four, lm_eval sends six and more
FEW = 16  # tokens that a completion has where nobody says how many
# Keys that clients send with what they always mean: other values are not served.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{"priority": (0,), "best_of": (1,), "repetition_penalty": (1.0,), "skip_special_tokens": (True,)},
}


def prompts_of(body: CompletionBody) -> list[str] | list[tuple[int, ...]]:
    """A request's prompts: all texts, or all token ids. Raises ValueError for a mixture or for none."""
    given: Any = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if given and all(isinstance(item, int) for item in given):
        return [tuple(given)]
    require(len(given) > 0, "prompt", "[]", "a text, a list of texts, token ids, or a list of such lists")
    kinds = {type(item) for item in given}
    require(len(kinds) == 1, "prompt", "a mixture", "all texts, all token ids, or all lists of token ids")
    return given if kinds == {str} else [tuple(ids) for ids in given]


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Turns as a chat template reads them. Raises ValueError where there is none."""
    require(len(messages) > 0, "messages", "[]", "at least one turn")
    turns = []
    for turn in messages:
        parts = turn.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        turns.append({"role": turn.role, "content": content} | ({"name": turn.name} if turn.name else {}))
    return turns


@dataclass(frozen=True)
class Limits:
    """What a model can be asked: tokens of prompt and answer together, ids, and those that end a text."""

    max_len: int
    vocab_size: int
    stop_ids: frozenset[int]

    def check_ids(self, key: str, ids: Sequence[int]) -> None:
        """Raise ValueError for an id that is no token's."""
        for token in ids:
            require(
                0 <= token < self.vocab_size, key, token, f"from 0 to {self.vocab_size - 1}, a token's id"
            )


def check(body: AnswerBody) -> None:
    """Raise ValueError for what contradicts itself, or is known and not served."""
    for key, values in NEUTRAL.items():
        value = getattr(body, key)
        require(value is None or value in values, key, value, f"left out or {values[0]}; no other is served")
    told = body.stream_options is not None
    require(bool(body.stream) or not told, "stream_options", "given", "left out, or beside stream=true")
    stops = stops_of(body)
    require(len(stops) <= STOPS, "stop", f"{len(stops)} strings", f"at most {STOPS}")
    for stop in stops:
        limit = f"of 1 to {STOP_LETTERS} letters"
        require(0 < len(stop) <= STOP_LETTERS, "stop", f"a string of {len(stop)} letters", limit)
    if (kind := form_of(body)) is not None:
        require(
            not body.ignore_eos, "ignore_eos", "true", f"left out beside {kind}, which says where it ends"
        )
        require(not body.min_tokens, "min_tokens", body.min_tokens, f"left out beside {kind}")
    if isinstance(body, ChatBody):
        count = body.top_logprobs
        ok = count is None or bool(body.logprobs)
        require(ok, "top_logprobs", count, "left out, or beside logprobs=true")
        both = {body.max_tokens, body.max_completion_tokens} - {None}
        require(len(both) < 2, "max_tokens", body.max_tokens, "left out beside max_completion_tokens")


def stops_of(body: AnswerBody) -> list[str]:
    """The strings that end a text."""
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def form_of(body: AnswerBody) -> str | None:
    """The key by which a form is asked for, None for any text. Raises ValueError for two, or half a one."""
    wanted, other = body.response_format, body.structured_outputs
    told = wanted is not None and wanted.type != "text"
    require(not (told and other is not None), "structured_outputs", "given", "without response_format")
    if wanted is not None and wanted.type == "json_schema":
        require(wanted.json_schema is not None, "response_format.json_schema", None, "given with this type")
    if other is not None:
        count = sum(getattr(other, key) is not None for key in other.__struct_fields__)
        require(count == 1, "structured_outputs", f"{count} keys", "one of json, regex, grammar")
        return "structured_outputs"
    return "response_format" if told else None


def logprobs_of(body: AnswerBody) -> int | None:
    """How many alternatives are wanted beside each token's own log-probability; None: nothing of it."""
    if isinstance(body, ChatBody):
        key, count = "top_logprobs", (body.top_logprobs or 0) if body.logprobs else None
    else:
        key, count = "logprobs", getattr(body, "logprobs", None)
    within(key, count, 0, TOP)
    return count


def requests_of(
    body: AnswerBody,
    prompts: Sequence[tuple[int, ...]],
    limits: Limits,
    client: str,
    grammars: Sequence[Grammar | None],
) -> list[Request]:
    """The texts to be written, n for each prompt in order; none where max_tokens is 0.

    grammars: one an answer, each with a state of its own. Raises ValueError in one line for what the model
    cannot do.
    """
    limits.check_ids("stop_token_ids", body.stop_token_ids or [])
    limits.check_ids("logit_bias", list(body.logit_bias or {}))
    draw = _draw(body)
    seed = int.from_bytes(os.urandom(4)) if body.seed is None else body.seed
    logprobs, stop_ids = logprobs_of(body), frozenset(body.stop_token_ids or ())
    stop_ids |= frozenset() if body.ignore_eos else limits.stop_ids
    found: list[Request] = []
    for prompt in prompts:
        limits.check_ids("prompt", prompt)
        length = _length(body, len(prompt), limits.max_len)
        for choice in range((body.n or 1) if length else 0):
            # Who scores a text by an echo counts on one token behind it, even where that would end the text.
            only_scored = getattr(body, "echo", None) and logprobs is not None and length == 1
            found.append(
                Request(
                    prompt=prompt,
                    max_tokens=length,
                    draw=draw,
                    seed=seed,
                    choice=choice,
                    stop_ids=frozenset() if only_scored else stop_ids,
                    min_tokens=body.min_tokens or 0,
                    logprobs=logprobs,
                    grammar=grammars[len(found)],
                    client=client,
                )
            )
    return found


def count_answers(body: AnswerBody, prompts: int) -> int:
    """Answers to so many prompts. Raises ValueError where they are too many for one request."""
    n = 1 if body.n is None else body.n
    within("n", n, 1, ANSWERS)
    limit = f"fewer: for {prompts} prompts it makes {n * prompts} answers of one request, at most {ANSWERS}"
    require(n * prompts <= ANSWERS, "n", n, limit)
    return n * prompts


def _draw(body: AnswerBody) -> Draw:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_k": 0 if body.top_k == -1 else body.top_k,  # vLLM's way to say all
        "top_p": body.top_p,
        "min_p": body.min_p,
        "presence": body.presence_penalty,
        "frequency": body.frequency_penalty,
        "bias": body.logit_bias,
    }
    return Draw(**{key: value for key, value in given.items() if value is not None})


def _length(body: AnswerBody, prompt: int, max_len: int) -> int:
    """Tokens that an answer may have."""
    chat, echo = isinstance(body, ChatBody), bool(getattr(body, "echo", None))
    key, given = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        key, given = "max_completion_tokens", body.max_completion_tokens
    room = max_len - prompt
    if given is None:
        given = room if chat else min(FEW, max(room, 1))
        given = max(given, 1)
    if given == 0:
        require(echo, key, 0, "1 or more; 0 goes with echo=true")
    within(key, given, 0)
    if given > room:
        message = f"{key}={given} after a prompt of {prompt} tokens exceeds max_len={max_len}; "
        remedy = f"use at most {room}" if room > 0 else f"use a prompt of at most {max_len - 1} tokens"
        raise ApiError(message + remedy, param=key, code="context_length_exceeded")
    return given
