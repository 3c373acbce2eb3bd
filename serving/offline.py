"""An engine without a server: requests answered in order, and the law that it stands by shown on a device."""

from collections.abc import Callable
from typing import Any

import numpy as np

from serving.engine import Engine
from serving.request import Draw, Finished, Request, Written


def complete(
    engine: Engine, requests: list[Request], during: Callable[[], None] = lambda: None
) -> list[tuple[list[Written], Finished]]:
    """The answers to some requests, by an engine whose thread was not started; offline, and in order.

    during: called between two steps.
    """
    answers: dict[int, list[Any]] = {}

    def sink(number: int, event: Any) -> None:
        answers.setdefault(number, []).append(event)

    numbers = [engine.submit(request, sink) for request in requests]
    while any(not isinstance(answers.get(number, [None])[-1], Finished) for number in numbers):
        engine.step()
        during()
    return [(answers[number][:-1], answers[number][-1]) for number in numbers]


def show_purity(engine: Engine) -> int:
    """The answers that were compared, of an engine just warmed, after which nothing of them is left in it.

    Whether a row of a product hangs on its neighbours, or on where it stands, is for the compiler to decide,
    for each shape and each processor. So some texts are written alone, in every slot at once, and beside
    others. Raises ValueError where any bit differs.
    """
    settings, random = engine.settings, np.random.default_rng(0)
    size = min(settings.chunk + 5, engine.max_len - 2)
    most = min(6, engine.max_len - size)

    def request(number: int, draw: Draw) -> Request:
        # Two tokens that come again and again, so that what is guessed comes true at times.
        part = random.integers(0, engine.vocab_size, max(1, min(6, size // 2))).tolist()
        prompt = (part * size)[: size - number % 3] or part[:1]
        return Request(tuple(prompt), most, draw, seed=number, logprobs=1)

    texts = [request(n, Draw(0) if n % 2 else Draw(1.0)) for n in range(2)]
    others = [request(n, Draw(1.0)) for n in range(2, 2 + settings.slots)]
    found = differing = 0
    for text in texts:
        alone = complete(engine, [text])[0][0]
        everywhere = complete(engine, [text] * settings.slots)
        beside = [complete(engine, [*others[:at], text, *others[at:]])[at] for at in (0, settings.slots - 1)]
        answers = [answer for answer, _ in (*everywhere, *beside)]
        found += len(answers)
        differing += sum(answer != alone for answer in answers)
    engine.forget()
    if differing:
        raise ValueError(
            f"answers would depend on the load: {differing} of {found} differed from the same alone, with "
            f"slots={settings.slots} guesses={settings.guesses} chunk={settings.chunk} on this device; "
            "use others (guesses=0 first)"
        )
    return found
