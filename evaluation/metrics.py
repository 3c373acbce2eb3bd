"""From scores to figures, each with its standard error, and two models' figures held against each other.

A figure is a ratio of sums over documents, such as right answers by documents or bits by bytes: of each
document the two terms are kept, so that errors and differences are of documents and not of tokens.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.sandbox import pass_at_k
from evaluation.score import Scored

Terms = dict[str, tuple[float, float]]  # by metric, a document's share of numerator and denominator
OF_KIND = {
    "choice": ("accuracy", "accuracy_per_char", "accuracy_per_byte", "accuracy_per_token", "bits_per_byte"),
    "bpb": ("bits_per_byte", "nats_per_token"),
    "rolling": ("bits_per_byte", "perplexity"),
    "generate": ("exact_match", "f1"),
    "program": ("pass@1", "pass@10", "pass@100"),  # of as many samples at least
}
METRICS = tuple(dict.fromkeys(name for names in OF_KIND.values() for name in names))
LOWER_IS_BETTER = ("bits_per_byte", "nats_per_token", "perplexity")


@dataclass(frozen=True)
class Figure:
    """A metric over documents, and what it would scatter by with other documents of the kind."""

    value: float
    error: float | None  # of one document nothing is known
    documents: int


def terms(scored: Scored) -> Terms:
    """What a document adds to each metric of its kind.

    accuracy: whether the right continuation is the likeliest, by the sum of its tokens; per char, byte or
    token: by that over its length. Lengths are those of a continuation without the space in front of it.
    pass@k: the chance that one of k of its programs passes the tests.
    """
    request = scored.request
    if request.kind == "generate":
        return {
            "exact_match": (float(any(same(scored.text, answer) for answer in request.answers)), 1.0),
            "f1": (max(f1(scored.text, answer) for answer in request.answers), 1.0),
        }
    if request.kind == "program":
        count, right = len(scored.samples), sum(one.status == "passed" for one in scored.samples)
        sizes = {name: int(name.removeprefix("pass@")) for name in OF_KIND["program"]}
        return {name: (pass_at_k(count, right, k), 1.0) for name, k in sizes.items() if k <= count}
    nats, tokens = scored.logprobs, scored.tokens
    gold = request.gold
    size = len(request.continuations[gold].encode())
    bits = (-nats[gold] / math.log(2), float(size))
    if request.kind == "choice":
        bare = [text.lstrip() or text for text in request.continuations]
        by = {
            "accuracy": [1] * len(bare),
            "accuracy_per_char": [len(text) for text in bare],
            "accuracy_per_byte": [len(text.encode()) for text in bare],
            "accuracy_per_token": list(tokens),
        }
        found: Terms = {}
        for name, lengths in by.items():
            values = [x / n for x, n in zip(nats, lengths, strict=True)]
            found[name] = (float(values.index(max(values)) == gold), 1.0)
        return found | {"bits_per_byte": bits}
    name = "perplexity" if request.kind == "rolling" else "nats_per_token"
    return {"bits_per_byte": bits, name: (-nats[gold], float(tokens[gold]))}


def figure(name: str, documents: Sequence[Terms]) -> Figure:
    """A metric over the documents that have it: sum(a) / sum(b), its error by the delta method.

    With b = 1 that is a mean and its usual standard error. perplexity is e to the ratio.
    """
    ab = np.array([one[name] for one in documents if name in one], np.float64).reshape(-1, 2)
    if not len(ab):
        raise ValueError(f"metric={name} is none of these documents'; they have {', '.join(documents[0])}")
    ratio = _ratio(ab)
    spread = math.fsum((a - ratio * b) ** 2 for a, b in ab)
    count = len(ab)
    scale = math.exp(ratio) if name == "perplexity" else 1.0
    error = scale * math.sqrt(spread * count / (count - 1)) / math.fsum(ab[:, 1]) if count > 1 else None
    return Figure(scale if name == "perplexity" else ratio, error, count)


def _ratio(ab: np.ndarray) -> float:
    return math.fsum(ab[:, 0]) / math.fsum(ab[:, 1])


def paired_bootstrap(
    name: str, ours: Mapping[str, Terms], theirs: Mapping[str, Terms], *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """(difference ours - theirs, and the 95 % interval of it) over documents that both have answered.

    Documents are drawn with replacement, the same ones for both: what is hard for both does not widen it.
    Raises ValueError where they share none.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise ValueError(f"metric={name}: the two results share no document; score the same tasks")
    a, b = (np.array([side[doc][name] for doc in shared]) for side in (ours, theirs))
    rng = np.random.default_rng(seed)
    last = math.exp if name == "perplexity" else float
    found = []
    for _ in range(resamples):
        drawn = rng.integers(len(shared), size=len(shared))
        x, y = a[drawn].sum(axis=0), b[drawn].sum(axis=0)
        found.append(last(x[0] / x[1]) - last(y[0] / y[1]))
    low, high = np.quantile(found, (0.025, 0.975))
    return last(_ratio(a)) - last(_ratio(b)), float(low), float(high)


def bare_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def same(text: str, answer: str) -> bool:
    """Whether a text is the answer, by its bare words; signs count where an answer has nothing else."""
    return bare_words(text) == bare_words(answer) if bare_words(answer) else text.strip() == answer.strip()


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of bare words."""
    given, wanted = bare_words(text), bare_words(answer)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else float(same(text, answer))
