"""What happened to documents in one step, counted job by job and added up: the same with any workers."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.curation.base import SPLITS, Edges

EXAMPLES = 10  # documents of each step that the report shows
EXAMPLE_CHARACTERS = 400


def _pairs() -> dict[str, list[int]]:
    return {split: [0, 0] for split in SPLITS}


@dataclass
class Tally:
    """Documents and bytes [before, after] of each split, reasons, histograms [before, after], and examples.

    `counts` are what the step adds up (kinds of PII, languages). An example is (rank, json-able); those of
    the lowest rank stay, and the rank is a hash of the document's number: a fair sample, whoever finds it.
    """

    documents: dict[str, list[int]] = field(default_factory=_pairs)
    bytes: dict[str, list[int]] = field(default_factory=_pairs)
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    counts: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def count(self, split: str, before: int, after: int | None, reason: str | None = None) -> None:
        """Count a document by its bytes; `after` is None where it was dropped, for that reason."""
        self.documents[split][0] += 1
        self.bytes[split][0] += before
        if after is None:
            self.reasons[split][str(reason)] += 1
        else:
            self.documents[split][1] += 1
            self.bytes[split][1] += after

    def measure(self, name: str, edges: Edges, values: Any, kept: Any) -> None:
        """Count values in a histogram: all of them, and those of documents that were kept."""
        values, kept = np.asarray(values, float), np.asarray(kept, bool)
        if name not in self.histograms:
            self.histograms[name] = np.zeros((2, len(edges) - 1), np.int64)
        inside = np.clip(values, edges[0], edges[-1])  # the last bin is open
        for row, chosen in enumerate((inside, inside[kept])):
            self.histograms[name][row] += np.histogram(chosen, edges)[0]

    def show(self, rank: int, example: dict[str, Any]) -> None:
        """Offer an example."""
        self.examples = heapq.nsmallest(EXAMPLES, [*self.examples, (rank, example)], key=lambda e: e[0])

    def add(self, other: "Tally") -> None:
        """Add up what another job has counted."""
        for split in SPLITS:
            for mine, theirs in ((self.documents, other.documents), (self.bytes, other.bytes)):
                mine[split] = [a + b for a, b in zip(mine[split], theirs[split], strict=True)]
            self.reasons[split] += other.reasons[split]
        self.counts += other.counts
        for name, histogram in other.histograms.items():
            self.histograms[name] = self.histograms.get(name, 0) + histogram
        for rank, example in other.examples:
            self.show(rank, example)


def rank_of(number: int) -> int:
    """Return a hash of a document's number (splitmix64): by it examples are chosen."""
    mask = (1 << 64) - 1
    value = (number + 1) * 0x9E3779B97F4A7C15 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


def shortened(text: str) -> str:
    """Return the beginning of a document, as the report shows it."""
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + " …"
