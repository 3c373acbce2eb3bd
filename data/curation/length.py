"""`filter_length`: documents of a sensible size."""

import numpy as np

from data.curation.base import Edges, Outcome
from data.curation.config import FilterLength, Number

BYTES_PER_TOKEN = 4  # an estimate: no tokenizer has been trained yet
EDGES = np.concatenate([[0], np.logspace(0, 7, 57)])  # eight bins a decade


class FilterLengthStep:
    """Measures characters, words and (estimated) tokens."""

    edges: dict[str, Edges] = {"characters": EDGES, "words": EDGES, "tokens": EDGES}

    def __init__(self, config: FilterLength):
        self.bounds = {
            unit: (getattr(config, f"min_{unit}"), getattr(config, f"max_{unit}")) for unit in self.edges
        }

    def apply(self, text: str) -> Outcome:
        """Drop a document for the first bound that it breaks."""
        values = {
            "characters": float(len(text)),
            "words": float(len(text.split())),
            "tokens": len(text.encode()) / BYTES_PER_TOKEN,
        }
        return Outcome(text, first_broken(values, self.bounds), values)


def first_broken(
    values: dict[str, float], bounds: dict[str, tuple[Number | None, Number | None]]
) -> str | None:
    """Return `min_NAME` or `max_NAME` of the first bound that a value breaks, or None."""
    for name, (least, most) in bounds.items():
        if least is not None and values[name] < least:
            return f"min_{name}"
        if most is not None and values[name] > most:
            return f"max_{name}"
    return None
