"""`dedup_exact` and `dedup_minhash`: the first of equal, or nearly equal, documents stays.

Validation documents come first in a corpus, so a train document that repeats one is what goes: the held-out
loss then measures no text that was trained on.

Near duplicates are found as in Broder 1997 ("On the resemblance and containment of documents") and Leskovec,
Rajaraman and Ullman, *Mining of Massive Datasets*, chapter 3: documents are sets of shingles, MinHash makes
signatures, documents that agree in a band of their signatures are candidates. Each candidate's Jaccard
similarity is then computed from the shingles themselves, so a band can miss a pair but not invent one. Of a
cluster all but one member go, as in Lee et al. 2022 ("Deduplicating training data makes language models
better").
"""

import hashlib
import importlib
import itertools
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from data.curation.base import DocumentTable, Verdict
from data.curation.config import DedupExact, DedupMinhash
from data.errors import DataError

WORD = re.compile(r"\w+")
CACHED_SHINGLES = 8 << 20  # numbers of 8 bytes, of the documents compared last
COMPARED = 256  # documents of one band's bucket that a document is compared with, at most


def normalized(text: str) -> str:
    """Return the text in NFC with runs of white space as one blank."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class DedupExactStep:
    """Compares 128 bits of the sha256 of each text."""

    field = None
    names: dict[int, str] = {}  # no strata

    def __init__(self, config: DedupExact):
        self.config = config

    def sign(self, texts: list[str], values: list[str]) -> UInt64[np.ndarray, "N 2"]:
        """Return the first half of each text's sha256: 16 bytes."""
        chosen = map(normalized, texts) if self.config.normalize else texts
        raw = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in chosen)
        return np.frombuffer(raw, dtype="<u8").astype(np.uint64).reshape(-1, 2)

    def decide(self, corpus: DocumentTable) -> Verdict:
        """Keep the first document of each digest."""
        order = np.lexsort(corpus.signatures.T)  # stable: equal ones stay in the order of the corpus
        ordered = corpus.signatures[order]
        new = np.ones(len(order), bool)
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        first = np.empty(len(order), np.int64)
        first[order] = order[new][np.cumsum(new) - 1] if len(order) else order
        return _keep_first(first, corpus, "duplicate", {"bytes_per_document": 16})


class DedupMinhashStep:
    """MinHash over bands, exact Jaccard for what they propose, union-find for the clusters."""

    field = None
    names: dict[int, str] = {}  # no strata

    def __init__(self, config: DedupMinhash):
        self.config = config
        self.bands, self.rows = choose_bands(config.threshold, config.permutations, config.recall)
        _rensa()  # a missing extra is said before the corpus is read

    def shingles(self, text: str) -> list[str]:
        """Return the n-grams of the lower-cased text's words (or characters); a short text is one shingle."""
        text, n = unicodedata.normalize("NFC", text).lower(), self.config.ngram
        if self.config.unit == "character":
            text = " ".join(text.split())
            return [text[i : i + n] for i in range(max(1, len(text) - n + 1))]
        words = WORD.findall(text)
        return [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]

    def sign(self, texts: list[str], values: list[str]) -> UInt64[np.ndarray, "N K"]:
        """Return a hash of each band of each signature: 8 bytes a band are enough to find candidates."""
        sets = [self.shingles(text) for text in texts]
        count = self.bands * self.rows
        digests = _rensa().digests_from_token_sets(sets, count, self.config.seed)
        signature = np.array(digests, dtype=np.uint64).reshape(len(texts), self.bands, self.rows)
        return _mixed(signature)

    def decide(self, corpus: DocumentTable) -> Verdict:
        """Cluster the documents and keep the first of each cluster."""
        seen = _Shingles(lambda row: self._hashes(corpus.read(row)))
        clusters = Clusters(len(corpus.signatures), self.config.threshold, seen.jaccard)
        for band in range(self.bands):
            clusters.join(corpus.signatures[:, band])
        first = np.array([clusters.find(row) for row in range(len(corpus.signatures))], dtype=np.int64)
        found = [chance(s, self.bands, self.rows) for s in (self.config.threshold, 0.85, 0.9)]
        details = {
            "bands": self.bands,
            "rows": self.rows,
            "chance_to_find_at_threshold_0.85_0.9": [round(p, 6) for p in found],
            "pairs_compared": clusters.compared,
            "documents_cut_short": clusters.cut_short,
            "bytes_per_document": 8 * self.bands,
        }
        decision = _keep_first(first, corpus, "near_duplicate", details)
        decision.note = lambda row: f"Jaccard {seen.jaccard(row, int(first[row])):.3f} with the kept one"
        return decision

    def _hashes(self, text: str) -> UInt64[np.ndarray, " S"]:
        hashed = _rensa().hash_token_sets([self.shingles(text)])[0]
        return np.unique(np.array(hashed, dtype=np.uint64))


def _rensa() -> Any:
    try:
        return importlib.import_module("rensa").RMinHash
    except ImportError:
        raise DataError("data.steps: dedup_minhash needs rensa; pip install -e '.[filters]'") from None


def chance(similarity: float, bands: int, rows: int) -> float:
    """Return the probability that a pair of that Jaccard similarity meets in a band: 1 - (1 - s^r)^b."""
    return 1.0 - (1.0 - similarity**rows) ** bands


def choose_bands(threshold: float, permutations: int, recall: float) -> tuple[int, int]:
    """Return (bands, rows) with the fewest false candidates of those that find `recall` at the threshold.

    More rows make both kinds of candidates rarer. False ones only cost a comparison, missed ones are errors,
    so rows are as many as the recall allows. Leskovec et al., section 3.4.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if chance(threshold, bands, rows) >= recall:
            return bands, rows
    return permutations, 1


def _mixed(signature: UInt64[np.ndarray, "N B R"]) -> UInt64[np.ndarray, "N B"]:
    """Hash a band's rows to 64 bits (splitmix64's finalizer, row by row)."""
    with np.errstate(over="ignore"):
        mixed = np.zeros(signature.shape[:2], np.uint64)
        for row in range(signature.shape[2]):
            mixed = (mixed ^ signature[:, :, row]) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed


class _Shingles:
    """The shingles of the documents compared last, and their similarities."""

    def __init__(self, make: Callable[[int], np.ndarray]):
        self.make = make
        self.cached: OrderedDict[int, np.ndarray] = OrderedDict()
        self.size = 0

    def of(self, row: int) -> np.ndarray:
        if row in self.cached:
            self.cached.move_to_end(row)
            return self.cached[row]
        made = self.cached[row] = self.make(row)
        self.size += len(made)
        while self.size > CACHED_SHINGLES and len(self.cached) > 2:
            self.size -= len(self.cached.popitem(last=False)[1])
        return made

    def jaccard(self, one: int, other: int) -> float:
        a, b = self.of(one), self.of(other)
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common / (len(a) + len(b) - common)


class Clusters:
    """Union-find over documents; the root of a cluster is its first document."""

    def __init__(self, count: int, threshold: float, jaccard: Callable[[int, int], float]):
        self.parent = np.arange(count)
        self.threshold, self.jaccard = threshold, jaccard
        self.compared = self.cut_short = 0

    def find(self, row: int) -> int:
        """Return the first document of the cluster that `row` is in."""
        root = row
        while (above := int(self.parent[root])) != root:
            root = above
        while (above := int(self.parent[row])) != root:
            self.parent[row], row = root, above
        return root

    def join(self, keys: UInt64[np.ndarray, " N"]) -> None:
        """Compare documents with the same key and unite those that are alike."""
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        sizes = np.diff(np.concatenate([[0], cuts, [len(order)]]))
        starts = np.concatenate([[0], cuts])
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            self._bucket([int(row) for row in order[start : start + size]])

    def _bucket(self, rows: list[int]) -> None:
        """Compare each document with those before it, until one of each other cluster is like it."""
        members: dict[int, list[int]] = {}
        for row in rows:
            budget = COMPARED
            for root, others in list(itertools.islice(members.items(), COMPARED)):
                if self.find(row) == root:
                    continue
                tried = others[:budget]
                budget -= len(tried)
                if any(self._alike(row, other) for other in tried):
                    self._unite(row, root, members)
            self.cut_short += budget == 0
            members.setdefault(self.find(row), []).append(row)

    def _alike(self, row: int, other: int) -> bool:
        self.compared += 1
        return self.jaccard(row, other) >= self.threshold

    def _unite(self, row: int, root: int, members: dict[int, list[int]]) -> None:
        own = self.find(row)
        first, second = sorted((own, root))
        self.parent[second] = first
        members[first] = members.pop(root, []) + members.pop(own, [])


def _keep_first(first: Int[np.ndarray, " N"], corpus: DocumentTable, reason: str, details: dict) -> Verdict:
    """Drop every document that is not the first of its cluster; say which of train repeat a held-out one."""
    keep = first == np.arange(len(first))
    contaminated = corpus.is_train & ~corpus.is_train[first] & ~keep
    counts = {
        "clusters": int((np.bincount(first, minlength=1) > 1).sum()),
        "train_documents_like_validation": int(contaminated.sum()),
    }
    reasons = (reason, f"{reason}_of_validation")
    return Verdict(keep, reasons, contaminated.astype(np.int64), details | counts)
