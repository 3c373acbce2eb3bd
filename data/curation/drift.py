"""How far a new corpus has moved from an old one, in tokens and in features of documents, against chance.

Every figure comes with its floor: what the same statistic is between two samples of the old corpus, of the
same size as those of old and new. Samples are of whole documents, since tokens of one document go together.

Letters: D documents, V vocabulary, N tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from data.errors import DataError
from data.tokens.store import TokenStore

BINS = 10  # of the population stability index: deciles of the old corpus
SPLITS = 20  # pairs of samples that floors are made of
FLOOR = 0.95  # the share of floors that chance stays below
SMOOTHING = 0.5  # occurrences added to every token (Jeffreys)
SMALLEST = 20  # documents of a sample, below which nothing can be said
# What is called drift: so much more than two samples of the old corpus differ by, and more than their floor.
LIMITS = {"js_bits": 0.01, "ks": 0.1, "psi": 0.1, "bytes_per_token": 0.05, "new_token_share": 0.005}


@dataclass(frozen=True)
class StoreSample:
    """Some of a store's documents: counts by document and token, and features of each document."""

    store: TokenStore
    index: Int[np.ndarray, " D"]  # increasing

    def counts(self, chosen: Int[np.ndarray, " K"]) -> Float[np.ndarray, " V"]:
        """Occurrences of each token in documents `chosen` of this sample; framing is left out."""
        ids = [self.ids(document) for document in self.index[chosen]]
        return np.bincount(np.concatenate(ids), minlength=len(self.store.token_bytes)).astype(float)

    def ids(self, document: int) -> Integer[np.ndarray, " T"]:
        """A document's tokens without its frame."""
        return self.store.document(int(document))[1:]


def features(sample: StoreSample) -> dict[str, Float[np.ndarray, " D"]]:
    """Of each document: tokens, bytes a token, the share of different tokens, and of its commonest one."""
    store, rows = sample.store, []
    for document in sample.index:
        ids = sample.ids(document)
        tokens = max(len(ids), 1)
        head = min(tokens, 256)  # shares depend on the length, so they are of a document's first tokens
        _, head_times = np.unique(ids[:head], return_counts=True)
        most = head_times.max() if len(head_times) else 0
        rows.append((len(ids), store.token_bytes[ids].sum() / tokens, len(head_times) / head, most / head))
    names = ("tokens", "bytes_per_token", "distinct_share", "commonest_share")
    return dict(zip(names, np.array(rows, float).T, strict=True))


def jensen_shannon(p: Float[np.ndarray, " V"], q: Float[np.ndarray, " V"]) -> float:
    """Jensen–Shannon divergence of two count vectors, in bits: 0 the same, 1 nothing in common (Lin 1991)."""
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    return float((_relative(p, m) + _relative(q, m)) / 2)


def kullback_leibler(p: Float[np.ndarray, " V"], q: Float[np.ndarray, " V"]) -> float:
    """KL(p || q) of two count vectors in bits, SMOOTHING added to every count."""
    p, q = p + SMOOTHING, q + SMOOTHING
    return float(_relative(p / p.sum(), q / q.sum()))


def _relative(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    return float((p[there] * np.log2(p[there] / q[there])).sum())


def log_odds(old: Float[np.ndarray, " V"], new: Float[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """z-scores of each token's log-odds in new over old, with the pooled counts as the prior.

    Monroe, Colaresi and Quinn (2008), "Fightin' Words", equations 16, 20 and 22: positive where the new one
    has more. The prior counts as many tokens as the vocabulary has.
    """
    prior = old + new + 1e-9
    prior = prior / prior.sum() * len(prior)
    total = prior.sum()

    def logit(counts: np.ndarray) -> np.ndarray:
        return np.log((counts + prior) / (counts.sum() + total - counts - prior))

    variance = 1 / (new + prior) + 1 / (old + prior)
    return (logit(new) - logit(old)) / np.sqrt(variance)


def kolmogorov_smirnov(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " M"]) -> tuple[float, float]:
    """The two-sample statistic, the largest gap between the two cumulative shares, and its p-value.

    The p-value is the asymptotic series with Stephens's (1970) correction.
    """
    a, b = np.sort(a), np.sort(b)
    everything = np.concatenate([a, b])
    gaps = np.searchsorted(a, everything, side="right") / len(a)
    gaps = gaps - np.searchsorted(b, everything, side="right") / len(b)
    gap = float(np.abs(gaps).max())
    root = np.sqrt(len(a) * len(b) / (len(a) + len(b)))
    x = (root + 0.12 + 0.11 / root) * gap
    if x < 0.3:  # the series alternates without end there, and its value is 1 to five digits
        return gap, 1.0
    k = np.arange(1, 101)
    return gap, float(np.clip(2 * ((-1.0) ** (k - 1) * np.exp(-2 * (k * x) ** 2)).sum(), 0, 1))


def stability_index(old: Float[np.ndarray, " N"], new: Float[np.ndarray, " M"]) -> float:
    """Population stability index over the deciles of old: the sum of (q - p) ln(q / p).

    Customarily below 0.1 is stable and above 0.25 has shifted. An empty bin counts as half a document.
    """
    edges = np.unique(np.quantile(old, np.linspace(0, 1, BINS + 1)[1:-1]))

    def shares(values: np.ndarray) -> np.ndarray:
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        return np.maximum(counts, 0.5) / len(values)

    p, q = shares(old), shares(new)
    return float(((q - p) * np.log(q / p)).sum())


def sample(store: TokenStore, documents: int, seed: int) -> StoreSample:
    """At most `documents` of a store's documents, drawn without replacement."""
    if store.num_documents < SMALLEST:
        raise DataError(
            f"{store.path} has {store.num_documents} documents; a comparison needs {SMALLEST} or more"
        )
    drawn = np.random.default_rng(seed).permutation(store.num_documents)[:documents]
    return StoreSample(store, np.sort(drawn))


def against_floor(
    statistic: Callable[[str, np.ndarray, np.ndarray], float], old_size: int, new_size: int, seed: int
) -> dict[str, Any]:
    """A statistic between old and new, and between samples of old, all of the same number of documents.

    `statistic(which, a, b)`: `which` is "old" or "new", where documents `b` come from; `a` are of old.
    Returns value (mean over pairs of samples), floor (what chance stays below), and both lists.
    """
    size = min(old_size // 2, new_size)
    rng = np.random.default_rng(seed)
    values, floors = [], []
    for _ in range(SPLITS):
        order, other = rng.permutation(old_size), rng.permutation(new_size)[:size]
        floors.append(statistic("old", order[:size], order[size : 2 * size]))
        values.append(statistic("new", order[:size], other))
    return {
        "value": float(np.mean(values)),
        "floor": float(np.quantile(floors, FLOOR)),
        "documents": size,
        "values": values,
        "floors": floors,
    }


def compare(old: StoreSample, new: StoreSample, *, seed: int = 0, top: int = 20) -> dict[str, Any]:
    """Everything that two samples of the same tokenizer tell, json-able but for the features' arrays.

    tokens: js and kl with floors, movers; features: of each, the means, ks and psi with floors; coverage:
    bytes a token, and the share of new tokens that the old sample does not have.
    """
    if not np.array_equal(old.store.token_bytes, new.store.token_bytes):
        raise DataError(
            f"{old.store.path} and {new.store.path} are of different tokenizers; prepare both with the same"
        )
    everything = {"old": np.arange(len(old.index)), "new": np.arange(len(new.index))}
    counts_old, counts_new = old.counts(everything["old"]), new.counts(everything["new"])
    samples = {"old": old, "new": new}
    sizes = (len(old.index), len(new.index), seed)

    def tokens_by(measure: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, Any]:
        found = against_floor(lambda which, a, b: measure(old.counts(a), samples[which].counts(b)), *sizes)
        return {**found, "whole": measure(counts_old, counts_new)}

    scores = log_odds(counts_old, counts_new)
    order = np.argsort(scores)
    return {
        "tokens": {
            "js_bits": tokens_by(jensen_shannon),
            "kl_bits": tokens_by(lambda a, b: kullback_leibler(b, a)),
            "risen": _movers(order[::-1][:top], scores, counts_old, counts_new),
            "fallen": _movers(order[:top], scores, counts_old, counts_new),
        },
        "features": _compare_features(old, new, sizes),
        "coverage": {
            "old_bytes_per_token": float(old.store.token_bytes @ counts_old / counts_old.sum()),
            "new_bytes_per_token": float(old.store.token_bytes @ counts_new / counts_new.sum()),
            "new_token_share": float(counts_new[counts_old == 0].sum() / counts_new.sum()),
            "new_token_kinds": int(((counts_old == 0) & (counts_new > 0)).sum()),
        },
    }


def _movers(chosen: np.ndarray, scores: np.ndarray, old: np.ndarray, new: np.ndarray) -> list[dict[str, Any]]:
    """Tokens with their z-scores and occurrences in a million."""
    shares = old / old.sum() * 1e6, new / new.sum() * 1e6
    return [
        {"id": int(i), "z": float(scores[i]), "old_ppm": float(shares[0][i]), "new_ppm": float(shares[1][i])}
        for i in chosen
    ]


def _compare_features(old: StoreSample, new: StoreSample, sizes: tuple[int, int, int]) -> dict[str, Any]:
    a, b = features(old), features(new)
    found = {}
    for name in a:
        both = {"old": a[name], "new": b[name]}

        def by(measure: Callable[[np.ndarray, np.ndarray], float], both: dict = both) -> dict[str, Any]:
            value = against_floor(lambda which, i, j: measure(both["old"][i], both[which][j]), *sizes)
            return {**value, "whole": measure(both["old"], both["new"])}

        found[name] = {
            "old_mean": float(a[name].mean()),
            "new_mean": float(b[name].mean()),
            "ks": by(lambda x, y: kolmogorov_smirnov(x, y)[0]),
            "ks_p": kolmogorov_smirnov(a[name], b[name])[1],
            "psi": by(stability_index),
            "old": a[name],
            "new": b[name],
        }
    return found


def findings(report: dict[str, Any]) -> list[str]:
    """One line for each figure of `compare` that has drifted, empty where none has."""
    lines = []
    if _exceeds(report["tokens"]["js_bits"], LIMITS["js_bits"]):
        risen = ", ".join(repr(token.get("text", token["id"])) for token in report["tokens"]["risen"][:3])
        lines.append(
            f"tokens: {_above_floor(report['tokens']['js_bits'])} bits of Jensen-Shannon, risen: {risen}"
        )
    for name, found in report["features"].items():
        for measure in ("ks", "psi"):
            if _exceeds(found[measure], LIMITS[measure]):
                means = f"mean {found['old_mean']:.3g} -> {found['new_mean']:.3g}"
                lines.append(f"{name}: {measure} {_above_floor(found[measure])}, {means}")
                break
    coverage = report["coverage"]
    ratio = coverage["new_bytes_per_token"] / coverage["old_bytes_per_token"]
    if abs(ratio - 1) > LIMITS["bytes_per_token"]:
        lines.append(f"tokenizer: {ratio - 1:+.1%} bytes a token")
    if coverage["new_token_share"] > LIMITS["new_token_share"]:
        lines.append(f"vocabulary: {coverage['new_token_share']:.1%} of new tokens never occur in old")
    return lines


def _exceeds(found: dict[str, Any], limit: float) -> bool:
    return found["value"] > found["floor"] and found["value"] - float(np.median(found["floors"])) > limit


def _above_floor(found: dict[str, Any]) -> str:
    return f"{found['value']:.3g} (chance: {found['floor']:.3g})"
