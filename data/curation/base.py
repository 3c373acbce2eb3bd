"""What a step is: one that decides on each document alone, or one that must have seen them all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt64

SPLITS = ("validation", "train")  # the order of a corpus: what is held out comes first, so it is kept
Edges = np.ndarray  # of a histogram's bins, ascending


@dataclass(slots=True)
class Outcome:
    """What a step makes of a document: the text to go on with, or the reason why it is dropped.

    `values` are put into histograms, `counts` are added up.
    """

    text: str
    reason: str | None = None
    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@runtime_checkable
class LocalStep(Protocol):
    """Decides on a document by its text alone, in a worker process: picklable, and pure."""

    @property
    def edges(self) -> dict[str, Edges]:
        """Value → edges of the bins in which it is counted."""

    def apply(self, text: str) -> Outcome:
        """Judge or change one document."""


@dataclass(frozen=True)
class DocumentTable:
    """All documents that reach a global step, validation first: row i of everything is document i."""

    signatures: UInt64[np.ndarray, "N K"]
    is_train: Bool[np.ndarray, " N"]
    read: Callable[[int], str]  # the text of document i, as the steps before have left it


@dataclass
class Verdict:
    """Which documents a global step keeps, and why not the others.

    `reason` is an index into `reasons` of each document that is dropped. `details` is json-able and goes into
    the report; `values` are counted in a histogram by `edges`; `note` says of a dropped document, by its
    row, what an example shows beside the text.
    """

    keep: Bool[np.ndarray, " N"]
    reasons: tuple[str, ...]
    reason: Int[np.ndarray, " N"]
    details: dict[str, Any] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    edges: dict[str, Edges] = field(default_factory=dict)
    note: Callable[[int], str] = lambda row: ""


@runtime_checkable
class GlobalStep(Protocol):
    """Decides when it has a signature of every document; the signatures are made in worker processes."""

    @property
    def field(self) -> str | None:
        """The field of the records that `sign` wants beside the texts."""

    names: dict[int, str]  # of strata by their hash; filled with what the workers send, before `decide`

    def sign(self, texts: list[str], values: list[str]) -> UInt64[np.ndarray, "N K"]:
        """Return a row for each text; `values` are the fields of their records."""

    def decide(self, corpus: DocumentTable) -> Verdict:
        """Look at all documents."""


def hash64(value: str | bytes, salt: str = "") -> int:
    """Return 64 bits that depend on the value and the salt alone."""
    import hashlib

    raw = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=salt.encode()[:64]).digest(), "little")
