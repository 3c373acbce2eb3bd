"""One request for answers under way, and what is sent of it: in one piece, or in server-sent events."""

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.http.answers import Answers, ClientGone
from serving.http.api import logprobs_of
from serving.http.replies import TokenNames, choice_of, envelope, usage_of
from serving.http.stream import AnswerFailed, AnswerPart
from serving.http.wire import AnswerBody, ApiError, ChatBody
from serving.request import Answering, FinishReason

DONE = b"data: [DONE]\n\n"


class Serving(Protocol):
    """What a call needs of the service: the model, and the count of calls that are under way."""

    engine: Answering
    names: TokenNames
    name: str
    open: int


class Call:
    """One request for answers under way, and its answer in either form."""

    def __init__(
        self,
        service: Serving,
        body: AnswerBody,
        prompts: Sequence[tuple[int, ...]],
        answers: Answers,
    ) -> None:
        service.open += 1
        self.answers, self._service, self._body = answers, service, body
        self._prompts, self._n = prompts, body.n or 1
        chat = isinstance(body, ChatBody)
        kind = "chat.completion" if chat else "text_completion"
        self._object = f"{kind}.chunk" if chat and body.stream else kind
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._version = service.engine.version
        self.echoes: list[AnswerPart] = []  # of the prompts, where they are wanted
        self.streaming = False  # then whoever sends the answer closes the call
        self._tokens, self._cached = 0, 0

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        found = self._heads()
        async for parts in self.answers.parts():
            for index, part in parts.items():
                self._count(index, part)
                found[index].add(part)
        choices = [self._choice(index, part, first=True) for index, part in enumerate(found)]
        return self._envelope(choices, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes, in server-sent events."""
        options, begun = self._body.stream_options, set[int]()
        every = bool(options and options.continuous_usage_stats)
        try:
            if self.echoes:
                yield self._chunks(dict(enumerate(self._heads())), begun, every)
            async for parts in self.answers.parts():
                for index, part in parts.items():
                    self._count(index, part)
                yield self._chunks(parts, begun, every)
            if options and options.include_usage:
                yield _event(self._envelope([], self._usage()))
        except ClientGone:
            return
        except AnswerFailed as error:
            yield _event(ApiError(str(error), 500).body())
        yield DONE

    def close(self) -> None:
        """Leave nothing running."""
        self.answers.close()
        self._service.open -= 1

    def _heads(self) -> list[AnswerPart]:
        """What each choice begins with; it is all that there is where nothing is to be written."""
        none = [AnswerPart() for _ in self._prompts]
        reason: FinishReason | None = None if self.answers.count else "length"
        return [
            AnswerPart(one.text, [*one.written], [*one.offsets], reason)
            for one in (self.echoes or none)
            for _ in range(self._n)
        ]

    def _count(self, index: int, part: AnswerPart) -> None:
        self._tokens += len(part.written)
        if part.finished is not None:
            self._version = part.finished.version
            self._cached += part.finished.cached_tokens * (index % self._n == 0)

    def _usage(self) -> dict[str, Any]:
        return usage_of(sum(map(len, self._prompts)), self._tokens, self._cached)

    def _chunks(self, parts: dict[int, AnswerPart], begun: set[int], usage: bool) -> bytes:
        """Events of what has come; a token whose text is held back makes none unless it is asked for."""
        chunks = []
        silent = logprobs_of(self._body) is None and not self._body.return_token_ids
        for index, part in parts.items():
            if part.text or part.reason or not silent:
                choice = self._choice(index, part, first=index not in begun)
                begun.add(index)
                chunks.append(_event(self._envelope([choice], self._usage() if usage else None)))
        return b"".join(chunks)

    def _choice(self, index: int, part: AnswerPart, *, first: bool) -> dict[str, Any]:
        choice = choice_of(self._body, index, part, self._service.names, first=first)
        if first and self._body.return_token_ids:
            choice["prompt_token_ids"] = self._prompts[index // self._n]
        return choice

    def _envelope(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return envelope(self._id, self._object, self._service.name, self._version, choices, usage)


class EventStream:
    """A response in server-sent events; whoever leaves, the engine hears of it."""

    def __init__(self, call: Call) -> None:
        self._call = call
        call.streaming = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it (ASGI)."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would keep the events back
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self._call.events():
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._call.close()


def as_json(value: Any, status: int = 200, headers: Any = None) -> Response:
    """A response in one piece."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
