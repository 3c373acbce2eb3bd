"""Answers on the wire: tokens by name, log-probabilities, choices, usage."""

import time
from typing import Any

from data.tokens.tokenizer import Tokenizer
from serving.http.api import logprobs_of
from serving.http.stream import AnswerPart
from serving.http.wire import AnswerBody, ChatBody
from serving.request import Written

LEAST = -9999.0  # JSON has no minus infinity


class TokenNames:
    """Tokens as an answer shows them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pieces = tokenizer.pieces()
        self._specials = tokenizer.specials_by_id

    def __call__(self, token: int) -> str:
        """A token's text; what is no text by itself by its bytes, so that no two tokens are called alike."""
        if token in self._specials:
            return self._specials[token]
        piece = self.bytes(token)
        try:
            return piece.decode() if piece else f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        return self.pieces[token] if token < len(self.pieces) else b""


def completion_logprobs(names: TokenNames, part: AnswerPart, count: int) -> dict[str, Any]:
    """Tokens, their log-probabilities, and the alternatives by name, the token itself always among them."""
    return {
        "tokens": [names(one.token) for one in part.written],
        "token_logprobs": [_finite(one.logprob) for one in part.written],
        "top_logprobs": [_alternatives(names, one, count) for one in part.written],
        "text_offset": part.offsets,
    }


def _alternatives(names: TokenNames, one: Written, count: int) -> dict[str, float | None] | None:
    if one.logprob is None:  # the first of a text has nothing before it
        return None
    named: dict[str, float | None] = {}
    for token, logprob in (*one.top[:count], (one.token, one.logprob)):
        named.setdefault(names(token), _finite(logprob))
    return named


def chat_logprobs(names: TokenNames, part: AnswerPart, count: int) -> dict[str, Any]:
    """The same for a conversation."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": names(token), "logprob": _finite(logprob), "bytes": list(names.bytes(token))}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*top) for top in one.top[:count]]}
        for one in part.written
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def choice_of(
    body: AnswerBody, index: int, part: AnswerPart, names: TokenNames, *, first: bool
) -> dict[str, Any]:
    """What a part adds to a choice, or a whole choice where nothing is streamed. first: it begins one."""
    chat, count = isinstance(body, ChatBody), logprobs_of(body)
    shown: dict[str, Any] = {"index": index}
    if chat:
        role = {"role": "assistant"} if first else {}
        shown["delta" if body.stream else "message"] = {**role, "content": part.text}
    else:
        shown["text"] = part.text
    figures = chat_logprobs if chat else completion_logprobs
    shown["logprobs"] = None if count is None else figures(names, part, count)
    shown["finish_reason"] = part.reason
    if body.return_token_ids:
        shown["token_ids"] = [one.token for one in part.written]
    return shown


def usage_of(prompt: int, written: int, cached: int = 0) -> dict[str, Any]:
    """Tokens that were read and written."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def envelope(
    ident: str,
    kind: str,
    model: str,
    version: str,
    choices: list[dict[str, Any]],
    usage: dict[str, Any] | None,
) -> dict[str, Any]:
    """What lies around choices; version: of the weights that wrote them."""
    shown = {"id": ident, "object": kind, "created": int(time.time()), "model": model}
    return {**shown, "system_fingerprint": version, "choices": choices, "usage": usage}
