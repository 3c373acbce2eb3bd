"""An engine without a model, and a server over it on loopback: what it writes follows from the request."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections import deque

from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from serving.http.server import Service, server_of
from serving.request import Finished, Load, Refused, Written

TOKENIZER = train_tokenizer([], TokenizerConfig(kind="byte"))
EOS = TOKENIZER.eos_id
VOCAB = 384  # padded: the last 127 rows are nobody's token
VERSION = "7-abcdef"


def spelling(text):
    """A reply that writes a text and ends."""
    ids = [*TOKENIZER.encode(text).tolist(), EOS]
    return lambda request, at: ids[min(at, len(ids) - 1)]


def letters(request, at):
    """A reply without an end, of the request's prompt, seed and choice."""
    return 97 + (sum(request.prompt) + 7 * request.seed + 3 * request.choice + at * at) % 26


class FakeEngine:
    """One token a step for each of `slots` requests, `queue` more wait; `gate` holds the steps."""

    version, vocab_size, failed = VERSION, VOCAB, None

    def __init__(self, reply=letters, *, slots=4, queue=64, max_len=512, pause=0.0):
        self.reply, self.slots, self.queue, self.max_len, self.pause = reply, slots, queue, max_len, pause
        self.requests, self.cancelled, self.scored = [], set(), []
        self.fault = None  # a Failed that the next step gives to all
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Condition()
        self._waiting, self._running, self._over = deque(), {}, False
        self._written = self._steps = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def full(self):
        if self.held >= self.slots + self.queue:
            return Refused("requests", "the queue is full; ask again later", 0.3)
        return None

    def submit(self, request, sink):
        with self._lock:
            if (refused := self.full()) is not None:
                raise refused
            number = len(self.requests)
            self.requests.append(request)
            self._waiting.append((number, request, sink, []))
            self._lock.notify()
            return number

    def cancel(self, number):
        with self._lock:
            self.cancelled.add(number)
            self._lock.notify()

    def score(self, tokens, top):
        self.gate.wait()
        self.scored.append(tokens)
        found = [Written(tokens[0])]
        for before, token in zip(tokens, tokens[1:], strict=False):
            found.append(_written(token, top, likeliest=token if before % 2 else (token + 1) % 256))
        return found

    def load(self):
        with self._lock:
            used = len(self._running)
            tokens = sum(len(one[1].prompt) for one in self._waiting)
            facts = (used, len(self._waiting), tokens, self.slots, 4 * self.slots, 4 * used, 0)
            return Load(*facts, 0, self._written, 0, 0, self._steps, 0, VERSION)

    def stop(self):
        self.gate.set()
        with self._lock:
            self._over = True
            self._lock.notify()
        self._thread.join()

    @property
    def held(self):
        with self._lock:
            return len(self._running) + len(self._waiting)

    def _run(self):
        while not self._over:
            self.gate.wait()
            with self._lock:
                self._lock.wait_for(lambda: self._over or self._waiting or self._running)
                while self._waiting and len(self._running) < self.slots:
                    one = self._waiting.popleft()
                    self._running[one[0]] = one
                self._steps += 1
                for one in list(self._running.values()):
                    self._step(*one)
            time.sleep(self.pause)

    def _step(self, number, request, sink, done):
        def end(event):
            del self._running[number]
            sink(number, event)

        if self.fault is not None:
            return end(self.fault)
        if number in self.cancelled:
            return end(_finished("cancelled", request, done))
        token = self.reply(request, len(done))
        if request.grammar is not None:
            allowed = request.grammar.allowed()
            assert allowed.shape == (VOCAB,)
            token = token if allowed[token] else int(allowed.argmax())
        if token in request.stop_ids and len(done) >= request.min_tokens:
            return end(_finished("stop", request, done))
        if request.grammar is not None:
            request.grammar.accept(token)
        done.append(token)
        self._written += 1
        sink(number, Written(token) if request.logprobs is None else _written(token, request.logprobs, token))
        if len(done) == request.max_tokens:
            end(_finished("length", request, done))


def _written(token, top, likeliest):
    logprob = -0.125 if token == likeliest else -2.5
    others = [(other, -3.0 - other / 1000) for other in range(200, 200 + top)]
    return Written(token, logprob, ((likeliest, -0.125), *others)[:top])


def _finished(reason, request, done):
    return Finished(reason, len(request.prompt), len(done), 2, 0.01, 0.02, 0.03, VERSION)


class Client:
    """What a test asks of the server over HTTP."""

    def __init__(self, port, service, engine):
        self.port, self.service, self.engine = port, service, engine

    def begin(self, path, body=None, headers=None):
        """A connection that has asked, to be read or closed by the test."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers or {})
        return connection

    def ask(self, path, body=None, headers=None):
        """(status, JSON or text, headers)."""
        with contextlib.closing(self.begin(path, body, headers)) as connection:
            response = connection.getresponse()
            data = response.read()
            is_json = response.headers["content-type"].startswith("application/json")
            return response.status, json.loads(data) if is_json else data.decode(), response.headers

    def complete(self, **body):
        """The answer to a completion that must be given."""
        status, answer, _ = self.ask("/v1/completions", body)
        assert status == 200, answer
        return answer

    def talk(self, text="hi", **body):
        """The answer to one turn that must be given."""
        messages = [{"role": "user", "content": text}]
        status, answer, _ = self.ask("/v1/chat/completions", {"messages": messages, **body})
        assert status == 200, answer
        return answer

    def events(self, path, body):
        """The events of a stream, DONE as None."""
        with contextlib.closing(self.begin(path, {**body, "stream": True})) as connection:
            response = connection.getresponse()
            assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
            frames = response.read().decode().split("\n\n")
        assert frames.pop() == "" and all(frame.startswith("data: ") for frame in frames)
        texts = [frame.removeprefix("data: ") for frame in frames]
        return [None if text == "[DONE]" else json.loads(text) for text in texts]


def until(true, seconds=30):
    """Wait for a thing that must come to be."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@contextlib.contextmanager
def served(engine, tokenizer=TOKENIZER, **settings):
    """A client of a server over that engine, in a thread of its own."""
    service = Service(engine, tokenizer, "tiny", **settings)
    service.ready = True
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = server_of(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        client = Client(listener.getsockname()[1], service, engine)
        client.thread = thread
        try:
            until(lambda: server.started)
            yield client
        finally:
            if isinstance(engine, FakeEngine):
                engine.gate.set()
            server.should_exit = True
            thread.join()
            engine.stop()
            service.close()
