"""The engine: requests come and go, and what each is answered depends on the weights and on itself alone.

One thread steps; any may submit. Every step dispatches one program and reads what the one before it has made,
so that the host's work and the devices' go side by side. Shapes never change, slots share nothing, prompts
are read in chunks from fixed places on, and nobody is ever taken out again to make room: that is why a row
cannot see its neighbours, and not that anything was done about it afterwards.
"""

import threading
import time
from typing import Any

import jax
import numpy as np

from common.checks import require, within
from models.ops import Ops
from models.transformer import Model, Tree
from parallel.axes import Layout
from serving.pages import PagePool
from serving.programs import STOPS, Programs
from serving.request import Failed, Finished, FinishReason, Load, Refused, Request, Sink, Written
from serving.rescore import Rescored
from serving.schedule import Seat, Turns
from serving.settings import ServeConfig
from serving.texts import Counts, Pace, Pending, Queued, ReadyWeights, Text


class Engine:
    """`serving.request.Answering` over a model on the mesh where its weights lie.

    model, ops, layout: as `serving.generator.Generator` takes them. vocab_size: tokens that the tokenizer
    has, where the model's table is padded. Raises ValueError for sizes that cannot be.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        ops: Ops,
        settings: ServeConfig,
        layout: Layout | None = None,
        *,
        version: str = "0",
        vocab_size: int | None = None,
    ) -> None:
        config = model.config
        self.max_len = settings.max_len or config.max_seq_len
        within("max_len", self.max_len, 2, config.max_seq_len if config.position == "learned" else 1 << 20)
        self.vocab_size = vocab_size or config.vocab_size
        within("vocab_size", self.vocab_size, 1, config.vocab_size)
        self.settings = settings
        each = -(-self.max_len // settings.page)
        pages = settings.pages or settings.slots * each
        require(pages >= each, "pages", pages, f"at least {each}, what max_len={self.max_len} needs")
        # A state that grows with no token cannot be shared by its pages.
        arrays = [a for a in jax.tree.leaves(model.cache_arrays(settings.page)) if "length" not in a.axes]
        if arrays and settings.guesses:
            raise ValueError(
                f"guesses={settings.guesses} cannot be taken back from the state of {config.mixer_pattern}; "
                "use guesses=0"
            )
        further = settings.speculate == "mtp"
        if further and not config.mtp_depth:
            raise ValueError(
                f"speculate=mtp needs a layer for further tokens, and {config.name} has none "
                "(model.mtp=null); use speculate=ngram"
            )
        share = settings.prefix_cache and not arrays
        self._pool = PagePool(pages, settings.page, settings.chunk, share=share, further=further)
        self._programs = Programs(
            model,
            ops,
            layout,
            slots=settings.slots,
            max_len=self.max_len,
            page=settings.page,
            chunk=settings.chunk,
            pages=pages,
            vocab_size=self.vocab_size,
            guesses=settings.guesses,
            packed=settings.packed,
            cache_bits=settings.cache_bits,
            further=further,
            device=next(iter(jax.tree.leaves(params)[0].devices())),
        )
        self._schedule: Turns[Text] = Turns(settings.slots, settings.chunk, settings.prefill_every)
        self._params: Any = params
        self._weights = [ReadyWeights(version, None)]
        self._state: Any = None
        self._bias = np.zeros((settings.slots, config.vocab_size), np.float32)
        self._bias[:, self.vocab_size :] = -np.inf
        self._bias_there: Any = None
        self._pending: list[Pending] = []
        self._texts: dict[int, Text] = {}
        self._next, self._queued, self._counts, self._pace = 0, Queued(), Counts(), Pace()
        self._rescored = Rescored()
        self._lock, self._work = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._ending = self._draining = False
        self._error: BaseException | None = None
        self._mended: float | None = None  # when a step was last over
        self._chunks = 0  # dispatched since

    # -- any thread ------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        """Of the weights that new requests get."""
        return self._weights[-1].version

    @property
    def failed(self) -> str | None:
        """Why it answers no more; None while it does."""
        return None if self._error is None else f"{type(self._error).__name__}: {self._error}"

    @property
    def compiled(self) -> int:
        """Executables that there are."""
        return self._programs.compiled

    def warm(self) -> None:
        """Compile and run every program: afterwards nothing is compiled again."""
        self._weights[-1].tree = weights = self._programs.ready(self._params)
        self._params = None  # before there is a state: nothing else needs as much memory
        self._state = self._programs.warm(weights)

    def submit(self, request: Request, sink: Sink) -> int:
        """Let a request wait for its turn; its number. As `serving.request.Answering` says."""
        self._check(request)
        with self._lock:
            if self._error is not None:
                raise Refused("failed", f"the engine has failed: {self._error}", 60.0)
            if self._draining:
                raise Refused("draining", "the server is about to end and takes no more requests", 5.0)
            if (refused := self._no_room(len(request.prompt) + request.max_tokens)) is not None:
                raise refused
            self._next += 1
            text = Text(self._next, request, sink, time.monotonic())
            self._texts[text.number] = text
            self._rescored.begin(text)
            self._queued.add(text, self.settings.chunk)
            self._schedule.add(text, request.client)
        self._work.set()
        return text.number

    def full(self) -> Refused | None:
        """As `serving.request.Answering` says."""
        with self._lock:
            return self._no_room(2)  # a token and its answer

    def cancel(self, number: int) -> None:
        """End a request soon, unless it has ended."""
        with self._lock:
            if (text := self._texts.get(number)) is not None:
                text.cancelled = True
        self._work.set()

    def update(self, params: Tree, version: str) -> None:
        """Answer new requests by these weights; those that run keep theirs to their end."""
        weights = ReadyWeights(version, self._programs.ready(params))
        with self._lock:
            self._weights.append(weights)
            self._let_go()  # of the old ones at once, where nobody runs

    def forget(self) -> None:
        """Count from nothing, with an empty prefix cache; for an engine in which nobody writes."""
        self._counts, self._pace, self._rescored = Counts(), Pace(), Rescored()
        self._pool.forget()

    def score(self, tokens: tuple[int, ...], top: int) -> list[Written]:
        """As `serving.request.Answering` says."""
        within("tokens", len(tokens), 1, self.max_len)
        own, values, names = self._scores(self._weights[-1].tree, tokens)
        found = [Written(tokens[0])]
        for at, token in enumerate(tokens[1:]):
            pairs = zip(names[at, :top].tolist(), values[at, :top].tolist(), strict=True)
            found.append(Written(token, float(own[at]), tuple(pairs)))
        return found

    def _scores(self, weights: Tree, tokens: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        text = np.zeros((1, self.max_len), np.int32)
        text[0, : len(tokens)] = tokens
        return tuple(map(np.asarray, self._programs.score(weights, text, np.int32(len(tokens)))))

    def rescore(self) -> bool:
        """Score an answer again that waits for it (`serving.rescore`); whether there was one."""

        def logprobs(text: Text, tokens: tuple[int, ...]) -> list[float] | None:
            trees = [weights.tree for weights in self._weights if weights.version == text.version]
            return self._scores(trees[0], tokens)[0][: len(tokens) - 1].tolist() if trees else None

        return self._rescored.score(logprobs)

    def load(self) -> Load:
        """As `serving.request.Answering` says."""
        with self._lock:
            counts, pool = self._counts, self._pool
            return Load(
                running=sum(1 for _ in self._schedule.seats),
                waiting=self._queued.requests,
                waiting_tokens=self._queued.tokens,
                slots=self.settings.slots,
                pages=pool.count,
                pages_used=pool.used,
                pages_cached=pool.cached,
                version=self.version,
                rescored=self._rescored.answers,
                trainer_gap=self._rescored.gap,
                **vars(counts),
            )

    def start(self) -> None:
        """Step in a thread of its own until `stop`."""
        if self._state is None:
            self.warm()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self, seconds: float = float("inf")) -> bool:
        """Take nothing more, and wait for what is there; whether it came to its end."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._texts and self._error is None and time.monotonic() < end:
            time.sleep(0.01)
        return not self._texts

    def stop(self) -> None:
        """End the thread; what was not answered is cancelled."""
        with self._lock:
            self._draining = self._ending = True
            for text in self._texts.values():
                text.cancelled = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()

    def _check(self, request: Request) -> None:
        size = len(request.prompt)
        ids = (*request.prompt, *request.stop_ids, *request.draw.bias)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ValueError(f"a token is outside 0..{self.vocab_size - 1}, the model's vocabulary")
        if size + request.max_tokens > self.max_len:
            raise ValueError(
                f"max_tokens={request.max_tokens} behind a prompt of {size} tokens exceeds the server's "
                f"max_len={self.max_len}; ask for at most {max(0, self.max_len - size)}"
            )
        within("stop_token_ids", len(request.stop_ids), 0, STOPS)
        need = self._pool.needed(size + request.max_tokens)
        within("pages of the request", need, 0, self._pool.count)

    def _no_room(self, tokens: int) -> Refused | None:
        """Why so many tokens more may not wait now. Sums are kept: a full queue costs no more than none."""
        queued, limits = self._queued, self.settings
        if not queued.requests:
            return None
        running = [seat.item for seat in self._schedule.seats]
        wait = self._pace.seconds(running, queued, limits.chunk, limits.slots)
        for key, value, limit in (
            ("queue_requests", queued.requests + 1, limits.queue_requests),
            ("queue_tokens", queued.tokens + tokens, limits.queue_tokens),
            ("queue_seconds", round(wait, 1), limits.queue_seconds),
        ):
            if value > limit:
                return Refused(key, f"{key}={value} would be above {limit}; come again later", max(1.0, wait))
        return None

    # -- the engine's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._work.clear()
                if not self.step():
                    if self._ending:
                        return
                    if not self._work.wait(0.5):
                        self.rescore()  # nobody is here
        except BaseException as error:  # whoever waits for an answer is told, and health says so
            with self._lock:
                self._error = error
                for text in list(self._texts.values()):
                    self._texts.pop(text.number)
                    text.sink(text.number, Failed(f"{type(error).__name__}: {error}"))
            raise

    def step(self) -> bool:
        """Dispatch one program and read what the one before has made; whether there was anything to do."""
        waited = bool(self._pending)
        with self._lock:
            bound = any(seat.item.request.grammar is not None for seat in self._schedule.seats)
        if bound:
            self._read()  # what may follow hangs on what has been written
        with self._lock:
            self._end_cancelled()
            self._admit()
            turn = self._schedule.turn()
        made = self._decode() if turn == "decode" else []
        if waited:
            self._read()
            # Between two of these lie a step and the chunks before it, unless there was nothing to do.
            now, chunks = time.monotonic(), self._chunks
            if self._mended is not None:
                self._pace.took(now - self._mended, chunks)
            self._mended, self._chunks = now, 0
        self._pending = made
        if turn == "prefill":
            self._prefill()
            self._chunks += 1
        elif not made:
            self._mended = None
        return turn is not None or waited

    def _admit(self) -> None:
        for seat in self._schedule.admit(self._seat):
            text = seat.item
            text.seat, text.began = seat, time.monotonic()
            self._queued.add(text, self.settings.chunk, -1)
            if seat.at == seat.end:
                self._place(seat)

    def _seat(self, text: Text) -> tuple[int, int] | None:
        """Pages for a text, and which tokens of its prompt are to be read; None where there are no pages."""
        prompt, version = text.request.prompt, self.version
        held = self._pool.take(prompt, text.tokens, version)
        if held is None:
            return None
        text.held, text.version, text.cached = held, version, held.cached
        self._counts.prefix_queries += len(prompt)
        self._counts.prefix_hits += held.cached
        return held.cached, len(prompt) - 1

    def _prefill(self) -> None:
        """Dispatch the chunk whose turn it is."""
        with self._lock:
            seat, begin, end = self._schedule.read()
            text = seat.item
        assert text.held is not None
        further, row = self._programs.further, self._programs.row(text.held.pages)
        tokens = np.zeros(self.settings.chunk + further, np.int32)
        # Behind a chunk of it a prompt has at least one token more.
        tokens[: end - begin + further] = text.request.prompt[begin : end + further]
        weights = self._tree(text.version)
        args = np.int32(seat.slot), row, tokens, np.int32(begin), np.int32(end - begin)
        self._state = self._programs.prefill(weights, self._state, *args)
        with self._lock:
            self._counts.prefill_chunks += 1
            self._counts.prompt_tokens += end - begin
            self._pool.written(text.held, end)
            if end == seat.end:
                self._place(seat)

    def _place(self, seat: Seat[Text]) -> None:
        """Let a slot write, its prompt being read."""
        text = seat.item
        assert text.held is not None
        self._put(seat.slot, text.request, text.held.pages)
        self._bias_of(seat)

    def _put(self, slot: int, request: Request | None, pages: list[int]) -> None:
        self._state = self._programs.place(self._state, np.int32(slot), self._programs.values(request, pages))

    def _bias_of(self, seat: Seat[Text]) -> None:
        """Of a slot, what is added to its logits: by request, by grammar, and for rows that no token owns."""
        request = seat.item.request
        row = np.zeros(self._bias.shape[1], np.float32)
        row[self.vocab_size :] = -np.inf
        for token, value in request.draw.bias.items():
            row[token] += value
        if request.grammar is not None:
            row[: self.vocab_size][~np.asarray(request.grammar.allowed())[: self.vocab_size]] = -np.inf
        if not np.array_equal(row, self._bias[seat.slot]):
            # Another array: what was given away may be read still.
            self._bias, self._bias_there = self._bias.copy(), None
            self._bias[seat.slot] = row

    def _decode(self) -> list[Pending]:
        """Dispatch a token of every text that is ready, by each of the weights that any of them has."""
        with self._lock:
            # One whose last token is on its way has left already, as the devices know.
            seats = {
                slot: seat
                for slot, seat in self._schedule.writing.items()
                if seat.item.dispatched < seat.item.request.max_tokens
            }
        if self._bias_there is None:
            self._bias_there = self._programs.put_bias(self._bias)
        made = []
        for version in sorted({seat.item.version for seat in seats.values()}):
            texts = {slot: seat.item for slot, seat in seats.items() if seat.item.version == version}
            for text in texts.values():
                text.dispatched += 1
            mine = np.zeros(self.settings.slots, bool)
            mine[list(texts)] = True
            weights = self._tree(version)
            self._state, out = self._programs.decode(weights, self._state, self._bias_there, mine)
            wanted = any(text.request.logprobs for text in texts.values())
            top = self._programs.top(out.pop("logits"), out.pop("total")) if wanted else None
            made.append(Pending(texts, out, top))
        self._counts.decode_steps += bool(made)
        return made

    def _tree(self, version: str) -> Tree:
        return next(weights.tree for weights in self._weights if weights.version == version)

    def _read(self) -> None:
        """Wait for what has been dispatched, and tell everybody what came of it."""
        pending, self._pending = self._pending, []
        for made in pending:
            names = ("token", "logprob", "ran", "guessed")
            token, logprob, ran, guessed = (np.asarray(made.out[name]) for name in names)
            top = None if made.top is None else tuple(map(np.asarray, made.top))
            with self._lock:
                self._counts.guessed += int(guessed.sum())
                self._counts.accepted += int(ran[:, 1:].sum())
                for slot, text in made.texts.items():
                    for at in np.flatnonzero(ran[slot]):
                        if not text.over:
                            alternatives = None if top is None else (top[0][slot, at], top[1][slot, at])
                            self._wrote(text, int(token[slot, at]), float(logprob[slot, at]), alternatives)

    def _wrote(self, text: Text, token: int, logprob: float, top: tuple[Any, Any] | None) -> None:
        request = text.request
        text.first = text.first or time.monotonic()
        self._counts.written_tokens += 1
        text.written += 1
        if token in request.stop_ids:
            text.written -= 1
            return self._finish(text, "stop")
        pairs: tuple[tuple[int, float], ...] = ()
        if top is not None and request.logprobs:
            values, names = (part[: request.logprobs].tolist() for part in top)
            pairs = tuple(zip(names, values, strict=True))
        if text.noted is not None:
            text.noted.append((token, logprob))
        if request.grammar is not None:
            try:
                request.grammar.accept(token)
            except ValueError as error:  # nothing was allowed any more: this text's end, and nobody else's
                self._stop_slot(text)
                return self._end(text, Failed(str(error)))
        text.sink(text.number, Written(token, None if request.logprobs is None else logprob, pairs))
        if text.written == request.max_tokens:
            return self._finish(text, "length")
        if request.grammar is not None and text.seat is not None:
            self._bias_of(text.seat)
        return None

    def _end_cancelled(self) -> None:
        for text in [text for text in self._texts.values() if text.cancelled]:
            if text.seat is None:
                self._schedule.drop(text, text.request.client)
                self._queued.add(text, self.settings.chunk, -1)
            self._stop_slot(text)
            self._finish(text, "cancelled")

    def _stop_slot(self, text: Text) -> None:
        """Let a text's slot write no more, where it has one."""
        if text.seat is not None:
            self._put(text.seat.slot, None, [])

    def _finish(self, text: Text, reason: FinishReason) -> None:
        now = time.monotonic()
        if text.seat is not None:
            self._pace.ended(text.written, text.request.max_tokens)
            self._rescored.end(text)
        began, first = text.began or now, text.first or now
        self._end(
            text,
            Finished(
                reason,
                prompt_tokens=len(text.request.prompt),
                written_tokens=text.written,
                cached_tokens=text.cached,
                queued_seconds=began - text.asked,
                prefill_seconds=first - began,
                decode_seconds=now - first,
                version=text.version or self.version,
            ),
        )

    def _end(self, text: Text, event: Finished | Failed) -> None:
        """Let go of all that a text holds, and say how it ended."""
        text.over = True
        del self._texts[text.number]
        if text.seat is not None and text.held is not None:
            self._schedule.leave(text.seat)
            self._pool.release(text.held)
        self._let_go()
        text.sink(text.number, event)

    def _let_go(self) -> None:
        """Drop weights that nobody uses any more, and what the cache has of them."""
        used = {seat.item.version for seat in self._schedule.seats} | {self.version}
        if any(weights.version not in used for weights in self._weights):
            self._weights = [weights for weights in self._weights if weights.version in used]
            self._pool.forget()
