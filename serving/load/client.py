"""One request to a server over HTTP/1.1 by asyncio's streams, and when each part of its answer came."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from serving.load.plan import PROBE, PlannedRequest

REFUSED = (429, 503)
LINE = 1 << 20  # bytes of a line that is no longer one


@dataclass(frozen=True)
class Target:
    """Where the server is, which of its models is asked, and with which key."""

    host: str
    port: int
    key: str | None = None
    model: str = ""

    @classmethod
    def of(cls, url: str, key: str | None = None) -> "Target":
        """From http://HOST:PORT. ValueError for anything else."""
        parts = urlsplit(url if "//" in url else f"//{url}")
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme not in ("", "http") or not parts.hostname or not port or parts.path not in ("", "/"):
            raise ValueError(f"{url} is no http://HOST:PORT; give the server's own address, without a path")
        return cls(parts.hostname, port, key)


@dataclass
class SentRequest:
    """What became of a request; times in seconds of one clock, gaps between the parts of the answer."""

    stage: int
    due: float
    sent: float = 0.0
    first: float | None = None
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    status: int = 0  # 0: no answer at all
    tokens: int = 0
    error: str | None = None
    retry_after: str | None = None

    @property
    def done(self) -> bool:
        """A whole answer."""
        return self.status == 200 and self.error is None

    @property
    def refused(self) -> bool:
        """Told to come again later."""
        return self.status in REFUSED


class Reply:
    """A response: status and headers, then its body as it comes."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self._reader, self.status, self.headers = reader, status, headers

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, a chunk at a time. Raises OSError where it is cut off."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self._reader.readline()).split(b";")[0] or b"x", 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
            elif "content-length" in self.headers:
                yield await self._reader.readexactly(int(self.headers["content-length"]))
            else:
                while part := await self._reader.read(1 << 16):
                    yield part
        except (asyncio.IncompleteReadError, ValueError):
            raise OSError("the answer is cut off") from None

    async def lines(self) -> AsyncIterator[str]:
        """The body's lines, whole, however they were split."""
        held = b""
        async for part in self.parts():
            *whole, held = (held + part).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace").strip()
        if held:
            yield held.decode("utf-8", "replace").strip()

    async def text(self) -> str:
        """The whole body."""
        return b"".join([part async for part in self.parts()]).decode("utf-8", "replace")


async def ask(target: Target, method: str, path: str, body: Any = None) -> tuple[Reply, asyncio.StreamWriter]:
    """Send a request and read the head of the answer. The caller closes the writer. Raises OSError."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=LINE)
    try:
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", f"Host: {target.host}:{target.port}", "Connection: close"]
        head += [f"Authorization: Bearer {target.key}"] if target.key else []
        head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        writer.write("\r\n".join([*head, "", ""]).encode() + content)
        await writer.drain()
        first = (await reader.readline()).split(None, 2)
        if len(first) < 2 or not first[1].isdigit():
            raise OSError("the server closed without an answer")
        headers = {}
        while line := (await reader.readline()).decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return Reply(reader, int(first[1]), headers), writer
    except BaseException:
        writer.close()
        raise


async def fetch(target: Target, path: str) -> str:
    """The body of a GET. Raises OSError where the server does not answer it with 200."""
    reply, writer = await ask(target, "GET", path)
    try:
        text = await reply.text()
    finally:
        writer.close()
    if reply.status != 200:
        raise OSError(f"GET {path} is answered with {reply.status}: {' '.join(text.split())[:200]}")
    return text


async def complete(target: Target, request: PlannedRequest, due: float, seconds: float) -> SentRequest:
    """Ask for the completion of a prompt, and note what came of it within so many seconds; never raises."""
    attempt = SentRequest(request.stage, due, sent=time.monotonic())
    try:
        async with asyncio.timeout(seconds):
            await _stream(target, request, attempt)
    except TimeoutError:
        attempt.error = f"no end within {seconds:g} s"
    except (OSError, ValueError, KeyError, TypeError) as error:
        attempt.error = f"{type(error).__name__}: {error}"[:200]
    attempt.end = time.monotonic()
    return attempt


async def _stream(target: Target, request: PlannedRequest, attempt: SentRequest) -> None:
    body = {
        "model": target.model,
        "prompt": list(request.prompt),
        "max_tokens": request.answer,
        "ignore_eos": True,  # as many tokens as were planned
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        # Probes stand for somebody else than whoever makes the load, and servers are fair by users.
        **({"user": "probe"} if request.stage == PROBE else {}),
    }
    reply, writer = await ask(target, "POST", "/v1/completions", body)
    try:
        attempt.status = reply.status
        attempt.retry_after = reply.headers.get("retry-after")
        if reply.status != 200:
            attempt.error = " ".join((await reply.text()).split())[:200]
            return
        ended, last = False, 0.0
        async for line in reply.lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if ended := data == "[DONE]":
                break
            if data:
                last = _note(attempt, json.loads(data), last)
        if not ended:
            raise OSError("the stream ended without [DONE]")
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _note(attempt: SentRequest, event: dict[str, Any], last: float) -> float:
    """Take in an event of the stream; when the last part of the answer came."""
    if error := event.get("error"):
        raise OSError(str(error)[:200])
    if usage := event.get("usage"):
        attempt.tokens = usage["completion_tokens"]
    if not event.get("choices") or (attempt.first and not event["choices"][0].get("text")):
        return last
    now = time.monotonic()
    if attempt.first is None:
        attempt.first = now
    else:
        attempt.gaps.append(now - last)
    return now
