"""`sample`: a share of the train documents, of every stratum the same to within one document."""

import numpy as np
from jaxtyping import Bool, Int, UInt64

from data.curation.base import DocumentTable, Verdict, hash64
from data.curation.config import StratifiedSample

SHOWN = 100  # strata that the report lists; it counts the rest


class SampleStep:
    """Ranks documents by a hash of (seed, text): the choice stays when others come and go."""

    def __init__(self, config: StratifiedSample):
        self.config = config
        self.names: dict[int, str] = {}

    @property
    def field(self) -> str | None:
        """Where the stratum stands."""
        return self.config.by

    def sign(self, texts: list[str], values: list[str]) -> UInt64[np.ndarray, "N 2"]:
        """Return (rank, stratum) of each document: 16 bytes."""
        salt = f"sample {self.config.seed}"
        hashes = {value: hash64(self.stratum(value)) for value in set(values)}
        self.names |= {number: self.stratum(value) for value, number in hashes.items()}
        rows = [(hash64(text, salt), hashes[value]) for text, value in zip(texts, values, strict=True)]
        return np.array(rows, dtype=np.uint64).reshape(-1, 2)

    def stratum(self, value: str) -> str:
        """Return the name of the stratum of a record with that field."""
        if self.config.by != "path":
            return value
        return "/".join(value.split("/")[: self.config.depth])

    def decide(self, corpus: DocumentTable) -> Verdict:
        """Keep validation whole and the lowest ranks of each stratum of train."""
        keep = ~corpus.is_train
        rows = np.flatnonzero(corpus.is_train)
        ranks, strata = corpus.signatures[rows].T
        keys, stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)
        quotas = _quotas(sizes, self.config.fraction)
        keep[rows[_lowest(ranks, stratum, quotas)]] = True
        largest = np.argsort(-sizes, kind="stable")[:SHOWN]
        named = {self.names.get(int(keys[s]), ""): [int(sizes[s]), int(quotas[s])] for s in largest}
        details = {"strata": named, "strata_in_all": len(sizes)}
        return Verdict(keep, ("not_sampled",), np.zeros(len(keep), np.int64), details)


def _quotas(sizes: Int[np.ndarray, " S"], fraction: float) -> Int[np.ndarray, " S"]:
    """Share out round(fraction × all) documents, each stratum's within one of fraction × its size.

    The largest remainders round up, as in Hamilton's method; ties go to the stratum that comes first.
    """
    exact = sizes * fraction
    quotas = np.floor(exact).astype(np.int64)
    missing = round(float(sizes.sum() * fraction)) - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return np.minimum(quotas, sizes)


def _lowest(
    ranks: UInt64[np.ndarray, " N"], stratum: Int[np.ndarray, " N"], quotas: Int[np.ndarray, " S"]
) -> Bool[np.ndarray, " N"]:
    """Mark the `quotas[s]` lowest ranks of each stratum; of equal ones the first."""
    order = np.lexsort((ranks, stratum))
    starts = np.searchsorted(stratum[order], np.arange(len(quotas)))
    place = np.arange(len(order)) - starts[stratum[order]]
    chosen = np.zeros(len(order), bool)
    chosen[order] = place < quotas[stratum[order]]
    return chosen
