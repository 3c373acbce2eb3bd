"""OpenAI's completions and chat on the wire: bodies, keys that are not known, and errors.

What cannot be served is refused by its name (`ApiError`): nothing that a client asks for is ignored.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from common.checks import did_you_mean

UNKNOWN = re.compile(r"unknown field `(?P<key>.*?)`(?: - at `\$\.?(?P<path>.*)`)?$")
PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
KEY = re.compile(r"(?P<key>[a-z_]+)[\w.\[\]]*=")


class ApiError(Exception):
    """A request that is refused, as OpenAI's clients read it."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @classmethod
    def of(cls, error: ValueError) -> "ApiError":
        """The refusal of a value: its message begins with the key."""
        match = KEY.match(str(error))
        return cls(" ".join(str(error).split()), param=match["key"] if match else None)

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """A null is a key that is not there."""


class StreamOptions(_Body):
    """Whether a stream says how many tokens there were, at its end or in every event."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(_Body):
    """A schema and what it is called."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Body):
    """vLLM's way to ask for a form: one of the three."""

    json: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None


class AnswerBody(_Body):
    """What completions and chat both take."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[int, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    best_of: int | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None


class CompletionBody(AnswerBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class ContentPart(_Body):
    """A piece of a message; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[ContentPart]
    name: str | None = None


class ChatBody(AnswerBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(_Body):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


BodyT = TypeVar("BodyT", bound=_Body)
NESTED: dict[str, type[_Body]] = {
    **{"stream_options": StreamOptions, "response_format": ResponseFormat, "content": ContentPart},
    **{"structured_outputs": StructuredOutputs, "json_schema": JsonSchema, "messages": ChatMessage},
}


def read_body(data: bytes, kind: type[BodyT]) -> BodyT:
    """The JSON of a request as that body. Raises ApiError with the place of what is wrong."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        if unknown := UNKNOWN.search(str(error)):
            key, path = unknown["key"], unknown["path"] or ""
            inner = re.sub(r"\[.*?\]", "", path).rpartition(".")[2]
            known = NESTED.get(inner, kind).__struct_fields__
            where = f"{path}.{key}" if path else key
            message = f"{where} is no key of this server; {did_you_mean(key, known)}"
            raise ApiError(message, param=where, code="unknown_key") from None
        match = PLACE.match(str(error))
        assert match is not None
        place = match["path"] or None
        raise ApiError(f"{place or 'the body'}: {match['what']}", param=place, code="wrong_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the body is not JSON in UTF-8 ({error}); mend it", code="invalid_json") from None
