"""A server of OpenAI's completions that has no model: slots, a queue and a pace, in the test's own loop."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

TEXT = "ab"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class FakeServer:
    """`slots` answers at once, a token in `pace` seconds; `queue` requests wait, all others get 503."""

    slots: int = 4
    queue: int = 8
    pace: float = 0.001
    fail: str = ""  # cut: the stream ends in its middle; error: an error in it; hang: nothing ever comes
    running: int = 0
    waiting: int = 0
    most: int = 0  # answers at once
    bodies: list[dict] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["FakeServer"]:
        self._room = asyncio.Semaphore(self.slots)
        self._answers: set[asyncio.Task] = set()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self
            for task in self._answers:
                task.cancel()
            await asyncio.gather(*self._answers, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answers.add(task)
        try:
            await self._respond(reader, writer)
        except OSError:
            pass  # the client has gone
        finally:
            self._answers.discard(task)
            writer.close()

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readline()).split()[1].decode()
        headers = {}
        while line := (await reader.readline()).decode().strip():
            headers[line.partition(":")[0].lower()] = line.partition(":")[2].strip()
        body = await reader.readexactly(int(headers["content-length"]))
        if path == "/v1/models":
            plain(writer, 200, json.dumps({"data": [{"id": "fake", "max_model_len": 256}]}))
        elif path == "/metrics":
            plain(writer, 200, self._metrics())
        elif path != "/v1/completions":
            plain(writer, 404, "{}")
        elif self.waiting >= self.queue:
            plain(writer, 503, '{"error": {"message": "full"}}', "Retry-After: 1\r\n")
        else:
            await self._answer(json.loads(body), writer)
        await writer.drain()

    async def _answer(self, body: dict, writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        self.waiting += 1
        async with self._room:
            self.waiting -= 1
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self._stream(body["max_tokens"], writer)
            finally:
                self.running -= 1

    async def _stream(self, tokens: int, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        for i in range(tokens):
            await asyncio.sleep(3600 if self.fail == "hang" else self.pace)
            if self.fail and i == tokens // 2:
                if self.fail == "error":
                    event(writer, json.dumps({"error": {"message": "gone"}}))
                return
            choice = {"text": TEXT, "finish_reason": None}
            event(writer, json.dumps({"choices": [choice]}))
            await writer.drain()
        event(writer, json.dumps({"choices": [{"text": "", "finish_reason": "length"}]}))
        event(writer, json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}))
        event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def _metrics(self) -> str:
        pages = min(1.0, self.running / self.slots)
        return (
            "# HELP vllm:num_requests_running those under way\n"
            f'vllm:num_requests_running{{model_name="fake"}} {self.running}\n'
            f'vllm:num_requests_waiting{{model_name="fake"}} {self.waiting}\n'
            f'vllm:kv_cache_usage_perc{{model_name="fake"}} {pages}\n'
        )


def plain(writer: asyncio.StreamWriter, status: int, text: str, more: str = "") -> None:
    head = f"HTTP/1.1 {status} -\r\nContent-Length: {len(text.encode())}\r\n{more}\r\n"
    writer.write(head.encode() + text.encode())


def event(writer: asyncio.StreamWriter, text: str) -> None:
    data = f"data: {text}\n\n".encode()
    # In two chunks: a line's end need not be a chunk's.
    for part in (data[:7], data[7:]):
        writer.write(b"%x\r\n%s\r\n" % (len(part), part))
