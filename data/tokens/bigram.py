"""A bigram language model of the training tokens: the figure that a trained network must beat.

Interpolated with Witten and Bell's weights (1991): p(b|a) = (c(ab) + N(a) p(b)) / (c(a) + N(a)), where N(a)
counts the different followers of a, and p(b) = (c(b) + 1) / (n + V). No free parameter, so the figure is the
corpus's own.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Integer


def bigram_bits_per_byte(
    train: Iterable[Integer[np.ndarray, " T"]],
    validation: Iterable[Integer[np.ndarray, " T"]],
    *,
    vocab_size: int,
    validation_bytes: int,
    counted: Iterable[Integer[np.ndarray, " T"]] | None = None,
) -> float:
    """Return bits of all validation targets over bytes of validation text.

    train, validation: documents as [bos] t1 .. tn [eos]. `counted`, of each validation document: not 0
    where an entry is a target; None: all are.
    """
    codes, counts = _count(train, vocab_size)
    before, after = np.divmod(codes, vocab_size)
    unigram = np.bincount(after, counts, vocab_size)
    unigram = (unigram + 1) / (unigram.sum() + vocab_size)
    total = np.bincount(before, counts, vocab_size)
    followers = np.bincount(before, minlength=vocab_size)

    wanted, times = _count(validation if counted is None else _targets(validation, counted), vocab_size)
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    seen = np.where(codes[at] == wanted, counts[at], 0)
    a, b = np.divmod(wanted, vocab_size)
    with np.errstate(invalid="ignore"):  # 0/0 where a was never seen
        p = (seen + followers[a] * unigram[b]) / (total[a] + followers[a])
    p = np.where(total[a] > 0, p, unigram[b])
    return float(-(times * np.log2(p)).sum() / validation_bytes)


def _targets(
    documents: Iterable[Integer[np.ndarray, " T"]], counted: Iterable[Integer[np.ndarray, " T"]]
) -> Iterator[Integer[np.ndarray, " P"]]:
    """Yield (entry before, target) for each target that counts."""
    for ids, weights in zip(documents, counted, strict=True):
        for at in np.flatnonzero(weights):
            yield ids[at - 1 : at + 1]


def _count(documents: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted codes a * V + b of the pairs, and how often each occurs."""
    codes = [np.asarray(ids[:-1], np.int64) * vocab_size + ids[1:] for ids in documents]
    return np.unique(np.concatenate(codes), return_counts=True)
