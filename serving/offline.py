"""An engine without a server: requests answered in order, and the law that it stands by shown on a device."""

from collections.abc import Callable
from typing import Any

import numpy as np

from serving.engine import Engine
from serving.request import Draw, Failed, Finished, Refused, Request, Written


def complete(
    engine: Engine, requests: list[Request], during: Callable[[], None] = lambda: None
) -> list[tuple[list[Written], Finished]]:
    """The answers to some requests, by an engine whose thread was not started; offline, and in order.

    during: called between two steps. What the engine's queue has no place for waits here. Raises RuntimeError
    where an answer cannot be given, Refused where the engine takes nothing any more.
    """
    answers: dict[int, list[Any]] = {}

    def sink(number: int, event: Any) -> None:
        answers.setdefault(number, []).append(event)

    left, numbers = list(requests), list[int]()
    while left or any(not _ended(answers, number) for number in numbers):
        while left:
            try:
                numbers.append(engine.submit(left[0], sink))
            except Refused as refused:
                if refused.reason in ("failed", "draining"):
                    raise
                break
            left.pop(0)
        engine.step()
        during()
    for number in numbers:
        if isinstance(event := answers[number][-1], Failed):
            raise RuntimeError(event.message)
    return [(answers[number][:-1], answers[number][-1]) for number in numbers]


def _ended(answers: dict[int, list[Any]], number: int) -> bool:
    return number in answers and isinstance(answers[number][-1], Finished | Failed)


def show_purity(engine: Engine) -> int:
    """The answers that were compared, of an engine just warmed, after which nothing of them is left in it.

    Whether a row of a product hangs on its neighbours, or on where it stands, is for the compiler to decide,
    for each shape and each processor. So some texts are written alone, in every slot at once, and beside
    others. Raises ValueError where any bit differs.
    """
    settings, random = engine.settings, np.random.default_rng(0)
    most = min(6, engine.max_len - 9)

    def request(number: int, size: int) -> Request:
        # A few tokens that come again and again, so that what is guessed comes true at times.
        prompt = random.integers(0, engine.vocab_size, 3).tolist() * 3
        return Request(tuple(prompt[:size]), most, Draw(float(number % 2)), seed=number, logprobs=1)

    # Most of a single token, which is read by the step that writes: a chunk is alone in its program anyway.
    others = [request(number, 1) for number in range(settings.slots)]
    short, long = request(1, 1), request(2, 9)
    found = differing = 0
    for text, crowd in (
        (short, [short] * settings.slots),
        (short, [short, *others[1:]]),
        (short, [*others[1:], short]),
        (long, [*others[1:], long]),
    ):
        alone = complete(engine, [text])[0][0]
        for asked, (answer, _) in zip(crowd, complete(engine, crowd), strict=True):
            found += asked is text
            differing += asked is text and answer != alone
    engine.forget()
    if differing:
        raise ValueError(
            f"answers would depend on the load: {differing} of {found} differed from the same alone, with "
            f"slots={settings.slots} guesses={settings.guesses} chunk={settings.chunk} on this device; "
            "use others (guesses=0 first)"
        )
    return found
