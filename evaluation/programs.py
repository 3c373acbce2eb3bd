"""Programs that a model wrote for a document, each executed with the document's tests."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from evaluation.requests import TaskRequest
from evaluation.sandbox import check_solution

SECONDS, MEGABYTES = 10.0, 512  # that a program and its tests may take


@dataclass(frozen=True)
class Attempt:
    """The text that was written, and how its tests ended (`evaluation.sandbox.Status`)."""

    text: str
    status: str


def judge(written: Sequence[tuple[TaskRequest, str]], isolation: str) -> list[Attempt]:
    """A program for each (document, text), tested behind `isolation`, as many at a time as there are cores.

    Equal programs are executed once. Raises ValueError where this kernel has not what isolation=full needs.
    """
    sources = [(request.head + text, request.tests) for request, text in written]

    def status(source: tuple[str, str]) -> str:
        return check_solution(*source, seconds=SECONDS, megabytes=MEGABYTES, isolation=isolation).status

    distinct = list(dict.fromkeys(sources))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = dict(zip(distinct, pool.map(status, distinct), strict=True))
    return [Attempt(text, found[source]) for (_, text), source in zip(written, sources, strict=True)]
