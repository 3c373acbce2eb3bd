"""An engine behind HTTP, as OpenAI's clients, vLLM's tools, Prometheus and Kubernetes speak to it."""

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data.tokens.tokenizer import Tokenizer
from serving.grammar import ANY_OBJECT, GrammarCompiler, TokenGrammar
from serving.http.answers import Answers, ClientGone
from serving.http.api import (
    Limits,
    check,
    count_answers,
    form_of,
    logprobs_of,
    messages_of,
    prompts_of,
    requests_of,
    stops_of,
)
from serving.http.call import Call, EventStream, as_json
from serving.http.metrics import Metrics
from serving.http.replies import TokenNames
from serving.http.stream import AnswerFailed, AnswerPart, AnswerStream, TextStream
from serving.http.wire import (
    AnswerBody,
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)
from serving.request import Answering, Refused, Written

LONG = 4096  # letters of prompts from which on they are cut into tokens beside the event loop
ANSWERS = ("/v1/completions", "/v1/chat/completions")
MOST_BYTES = 32 * 2**20  # of a request
MOST_SCORED = 256  # prompts that wait to be scored: more are refused
SECURITY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
ResultT = TypeVar("ResultT")


class Service:
    """What all requests share: the engine and its tokenizer, and whether new work is taken on.

    add_bos: whether prompts of text begin with the tokenizer's bos. ready: set once the engine is warm;
    draining: set when the server is to end, so that what runs is finished and nothing new begins.
    """

    def __init__(
        self,
        engine: Answering,
        tokenizer: Tokenizer,
        name: str,
        *,
        add_bos: bool = True,
        api_key: str | None = None,
        page: int = 0,
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.names, self.metrics = TokenNames(tokenizer), Metrics(engine, name, page)
        ends = {tokenizer.eos_id} | ({tokenizer.chat.stop_id} if tokenizer.chat else set())
        rows = min(engine.vocab_size, tokenizer.vocab_size)
        self.limits = Limits(engine.max_len, rows, frozenset(ends))
        self.ready = self.draining = False
        self.open = 0  # requests for answers that are under way
        self._add_bos, self._api_key, self._made = add_bos, api_key, int(time.time())
        self._threads = ThreadPoolExecutor(2, "cambrian-tokenize")
        # One at a time: the devices have answers to write meanwhile.
        self._scorer, self._scoring = ThreadPoolExecutor(1, "cambrian-score"), 0
        self._grammars: GrammarCompiler | None = None

    def close(self) -> None:
        """Let its threads go."""
        self._threads.shutdown()
        self._scorer.shutdown()

    # -- what is there

    async def health(self, request: HttpRequest) -> Response:
        """Alive, whether or not it takes requests; 500 where only a new start will help."""
        if self.engine.failed is not None:
            raise ApiError(f"the engine has failed ({self.engine.failed}); start the server again", 500)
        return as_json({"status": "ok"})

    async def is_ready(self, request: HttpRequest) -> Response:
        """Whether new requests belong here."""
        self._check_open()
        return as_json({"status": "ready", "version": self.engine.version})

    async def metrics_page(self, request: HttpRequest) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def version_page(self, request: HttpRequest) -> Response:
        """The code's version and the weights'."""
        try:
            ours = version("cambrian")
        except PackageNotFoundError:  # a clone that was never installed
            ours = "unknown"
        return as_json({"version": ours, "weights": self.engine.version})

    async def chat_page(self, request: HttpRequest) -> Response:
        """A page to talk to the model by."""
        text = Path(__file__).with_name("chat.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": SECURITY})

    async def models(self, request: HttpRequest) -> Response:
        """The one model that is served."""
        self._check_key(request)
        entry = {"id": self.name, "object": "model", "created": self._made, "owned_by": "cambrian"}
        entry |= {"max_model_len": self.engine.max_len, "chat": self.tokenizer.chat is not None}
        if (wanted := request.path_params.get("model")) is None:
            return as_json({"object": "list", "data": [entry]})
        self._check_model(wanted)
        return as_json(entry)

    async def tokenize(self, request: HttpRequest) -> Response:
        """Token ids of a text or of a conversation."""
        self._check_key(request)
        body = read_body(await _read(request), TokenizeBody)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("prompt or messages must be given, and not both", param="prompt")
        if body.messages is not None:
            ids = await self._off_loop(MOST_BYTES, self._chat_ids, body.messages)
        else:
            text = body.prompt or ""
            (ids,) = await self._off_loop(len(text), self._text_ids, [text], body.add_special_tokens)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": self.engine.max_len, "tokens": ids}
        found["token_strs"] = [self.names(token) for token in ids] if body.return_token_strs else None
        return as_json(found)

    async def detokenize(self, request: HttpRequest) -> Response:
        """The text of token ids."""
        self._check_key(request)
        body = read_body(await _read(request), DetokenizeBody)
        self._check_model(body.model)
        with _refusals():
            self.limits.check_ids("tokens", body.tokens)
        return as_json({"prompt": await self._off_loop(len(body.tokens), self.tokenizer.decode, body.tokens)})

    # -- answers

    async def completions(self, request: HttpRequest) -> Any:
        """POST /v1/completions."""
        body = await self._body(request, CompletionBody)
        with _refusals():
            given = prompts_of(body)
            count_answers(body, len(given))
        ids = [one for one in given if isinstance(one, tuple)]
        if not ids:
            letters = sum(map(len, given))
            ids = await self._off_loop(letters, self._text_ids, given, body.add_special_tokens)
        return await self._answer(request, body, ids, given)

    async def chat(self, request: HttpRequest) -> Any:
        """POST /v1/chat/completions."""
        body = await self._body(request, ChatBody)
        with _refusals():
            count_answers(body, 1)
        ids = await self._off_loop(MOST_BYTES, self._chat_ids, body.messages)
        return await self._answer(request, body, [ids], [])

    async def _body(self, request: HttpRequest, kind: type[Any]) -> Any:
        self._check_open()
        self._check_key(request)
        body = read_body(await _read(request), kind)
        self._check_model(body.model)
        with _refusals():
            check(body)
        return body

    async def _answer(
        self,
        request: HttpRequest,
        body: AnswerBody,
        prompts: Sequence[tuple[int, ...]],
        shown: Sequence[str | tuple[int, ...]],
    ) -> Any:
        """A response, whole or in events, when the engine has taken on all that was asked."""
        grammars: list[Any] = [None] * count_answers(body, len(prompts))
        if form_of(body) is not None:
            grammars = await self._off_loop(MOST_BYTES, self._grammars_of, body, len(grammars))
        with _refusals():
            asked = requests_of(body, prompts, self.limits, _client(request, body), grammars)
        echo = bool(getattr(body, "echo", None))
        heads = [self._shown(one) for one in shown] if echo else []
        pieces, stops, n = self.names.pieces, stops_of(body), body.n or 1
        streams = [
            AnswerStream(TextStream(pieces, stops, one.min_tokens), len(heads[index // n]) if echo else 0)
            for index, one in enumerate(asked)
        ]
        call = Call(self, body, prompts, Answers(self.engine, self.metrics, streams, request.receive))
        try:
            with _refusals():
                call.answers.submit(asked)
                for prompt, head in zip(prompts, heads, strict=False):
                    call.answers.check()
                    call.echoes.append(await self._echo(prompt, head, logprobs_of(body)))
            return EventStream(call) if body.stream else as_json(await call.whole())
        except Refused as refused:
            raise self._refused(refused) from None
        except ClientGone:
            return Response(status_code=499)  # read by nobody
        except AnswerFailed as error:
            raise ApiError(str(error), 500) from None
        finally:
            if not call.streaming:
                call.close()

    async def _echo(self, prompt: tuple[int, ...], text: str, logprobs: int | None) -> AnswerPart:
        """A prompt as the beginning of its answer, scored where that is asked."""
        part = AnswerPart(text)
        if logprobs is not None:
            part.written = await self._score(prompt, logprobs)
            stream = TextStream(self.names.pieces)
            for token in prompt:
                part.offsets.append(stream.length)
                stream.write(token)
        return part

    async def _score(self, prompt: tuple[int, ...], logprobs: int) -> list[Written]:
        if self._scoring >= MOST_SCORED:
            raise Refused("scores", f"{self._scoring} prompts wait to be scored; ask again later", 1.0)
        self._scoring += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._scorer, self.engine.score, prompt, logprobs)
        finally:
            self._scoring -= 1

    def _shown(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _text_ids(self, texts: Sequence[str], special: bool | None) -> list[tuple[int, ...]]:
        head = [self.tokenizer.bos_id] if (self._add_bos if special is None else special) else []
        return [(*head, *ids.tolist()) for ids in self.tokenizer.encode_batch(texts)]

    def _chat_ids(self, messages: Sequence[Any]) -> tuple[int, ...]:
        if self.tokenizer.chat is None:
            raise ApiError(f"{self.name} was not taught conversations; use /v1/completions", param="messages")
        return tuple(self.tokenizer.chat.prompt(messages_of(messages)))

    def _grammars_of(self, body: AnswerBody, count: int) -> list[TokenGrammar]:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.limits.stop_ids, self.engine.vocab_size)
        wanted, form = body.structured_outputs, body.response_format
        if wanted is not None and wanted.regex is not None:
            made = self._grammars.regex(wanted.regex)
        elif wanted is not None and wanted.grammar is not None:
            made = self._grammars.lark(wanted.grammar)
        elif wanted is not None:
            made = self._grammars.json_schema(wanted.json)
        else:
            schema = form.json_schema.schema if form and form.json_schema else ANY_OBJECT
            made = self._grammars.json_schema(schema)
        return [made.fresh() for _ in range(count)]

    async def _off_loop(self, letters: int, work: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Short texts at once, long ones in a thread, so that other answers go on meanwhile."""
        with _refusals():
            if letters < LONG:
                return work(*arguments)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # -- who may ask, and when

    def turned_away(self, scope: Scope) -> ApiError | None:
        """Why a request for answers is refused by its head alone; None where it is to be read."""
        if scope["method"] != "POST" or not self._has_key(HttpRequest(scope)):
            return None  # which has another answer
        if not self.ready or (refused := self.engine.full()) is None:
            return None
        return self._refused(refused)

    def _refused(self, refused: Refused) -> ApiError:
        self.metrics.refused(refused.reason)
        return _unavailable(str(refused), refused.retry_after, refused.reason)

    def _check_open(self) -> None:
        if self.draining:
            raise _unavailable("the server is about to end; ask another one", 5, "draining")
        if self.engine.failed is not None:
            raise _unavailable("the engine has failed; ask another server", 60, "failed")
        if not self.ready:
            raise _unavailable("the model is being prepared; ask again", 5, "starting")

    def _has_key(self, request: HttpRequest) -> bool:
        key = self._api_key
        return key is None or hmac.compare_digest(_bearer(request).encode(), key.encode())

    def _check_key(self, request: HttpRequest) -> None:
        if self._has_key(request):
            return
        raise ApiError(
            "the Authorization header holds no valid key; send Bearer and the server's",
            401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _check_model(self, wanted: str | None) -> None:
        if wanted not in (None, self.name):
            message = f"model={wanted} is not served here; use {self.name}"
            raise ApiError(message, 404, param="model", code="model_not_found")


class DrainingServer(uvicorn.Server):
    """Ends after a signal when the last answer has been given; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM, Ctrl-C."""
        self.force_exit = self.should_exit = self._service.draining
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to end."""
        self.should_exit |= self._service.draining and self._service.open == 0
        return await super().on_tick(counter)


def server_of(service: Service) -> DrainingServer:
    """A server of that service, to be run on sockets that are open already."""
    config = uvicorn.Config(application(service), log_level="warning", access_log=False, lifespan="off")
    return DrainingServer(config, service)


class Door:
    """An application of which the overload is kept away: nothing is read of requests that have no place.

    To say no must cost little, or the refused take from the served what they were refused for.
    """

    def __init__(self, service: Service, app: ASGIApp) -> None:
        self._service, self._app = service, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through (ASGI)."""
        app = self._app
        if scope["type"] == "http" and scope["path"] in ANSWERS:
            if (error := self._service.turned_away(scope)) is not None:
                app = as_json(error.body(), error.status, error.headers)
        await app(scope, receive, send)


def application(service: Service) -> ASGIApp:
    """The routes, and every refusal as JSON."""
    routes = [
        Route("/", service.chat_page),
        Route("/health", service.health),
        Route("/ready", service.is_ready),
        Route("/metrics", service.metrics_page),
        Route("/version", service.version_page),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.models),
        Route(ANSWERS[0], service.completions, methods=["POST"]),
        Route(ANSWERS[1], service.chat, methods=["POST"]),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[..., Awaitable[Response]]] = {
        ApiError: _refuse,
        HTTPException: _no_route,
        Exception: _fault,
    }
    return Door(service, Starlette(routes=routes, exception_handlers=handlers))


async def _refuse(request: HttpRequest, error: ApiError) -> Response:
    return as_json(error.body(), error.status, error.headers)


async def _no_route(request: HttpRequest, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return as_json(ApiError(message, error.status_code).body(), error.status_code, error.headers)


async def _fault(request: HttpRequest, error: Exception) -> Response:
    return as_json(ApiError(f"a fault of the server ({type(error).__name__}); see its log", 500).body(), 500)


def _unavailable(message: str, seconds: float, reason: str) -> ApiError:
    wait = str(max(1, math.ceil(min(seconds, 3600))))
    return ApiError(message, 503, code=reason, headers={"Retry-After": wait})


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What was asked wrongly, as the client's error."""
    try:
        yield
    except ValueError as error:
        raise ApiError.of(error) from None


async def _read(request: HttpRequest) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise ApiError(f"the body is longer than {MOST_BYTES} bytes; ask for less at once", 413)
    return bytes(data)


def _bearer(request: HttpRequest) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _client(request: HttpRequest, body: AnswerBody) -> str:
    """Whose turn it is: a key has many users, where they say who they are or come from several addresses."""
    address = request.client.host if request.client else ""
    return f"{_bearer(request)}\0{body.user or address}"
