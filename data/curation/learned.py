"""`filter_learned`: a linear classifier of good and bad documents, trained on examples.

As in Brown et al. 2020 (appendix A), a logistic regression over hashed features, here of n-grams of words and
characters, of which chi-squared keeps those that depend most on the class, beside the features of
`data.steps.quality`. What is not trained on says how good it is: precision, recall and AUC are in the report.
"""

import hashlib
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt64

from data.curation.base import DocumentTable, Edges, Outcome, Verdict, hash64
from data.curation.config import FEATURES, FilterLearned
from data.curation.quality import features
from data.errors import DataError
from data.sources.files import read_documents

BUCKETS = 1 << 18  # of the hashed n-grams, of words and of characters each
CHARACTERS = 20_000  # of a document's beginning that are looked at
LEAST = 20  # examples of each class
SHOWN = 20  # weights of each sign in the report
NAMED = 500  # examples in which the n-grams of those weights are looked up


class Classifier:
    """Text → probability of being good. Made by `train`; picklable."""

    def __init__(self, columns: np.ndarray, scales: np.ndarray, weights: np.ndarray, bias: float):
        self.columns, self.scales, self.weights, self.bias = columns, scales, weights, bias
        self._words, self._characters = _vectorizers()
        self._spread = np.zeros(2 * BUCKETS)  # of every bucket: cheaper than picking columns of each document
        self._spread[columns] = weights[: len(columns)]

    @property
    def digest(self) -> str:
        """Sha256 of everything that decides a score."""
        parts = (self.columns.astype("<i8"), self.scales.astype("<f8"), self.weights.astype("<f8"))
        raw = b"".join(part.tobytes() for part in parts) + np.float64(self.bias).tobytes()
        return hashlib.sha256(raw).hexdigest()

    def score(self, text: str) -> float:
        """Return the probability, of one document alone: it does not depend on what else is scored."""
        row = _rows([text], self._words, self._characters)
        logit = float(np.sum(row.data * self._spread[row.indices])) + self.bias
        logit += float(np.sum(_dense(text) / self.scales * self.weights[len(self.columns) :]))
        return float(1.0 / (1.0 + np.exp(-np.clip(logit, -500.0, 500.0))))


def train(config: FilterLearned) -> tuple[Classifier, dict[str, Any]]:
    """Return the classifier and, json-able, how it does on the examples that were held out.

    Deterministic: examples are held out by a hash of their text, and the solver draws nothing. Raises
    DataError for a missing extra, an unreadable file, or too few examples.
    """
    learn = _sklearn()
    texts, labels = _examples(config)
    aside = np.array([hash64(text, f"held out {config.seed}") < config.held_out * 2**64 for text in texts])
    for name, label in (("good", 1), ("bad", 0)):
        for tested in (True, False):
            if ((labels == label) & (aside == tested)).sum() < LEAST * (config.held_out if tested else 1) / 2:
                raise DataError(
                    f"data.steps: filter_learned {name} has too few examples "
                    f"({(labels == label).sum()}); give {5 * LEAST} or more different ones"
                )
    words, characters = _vectorizers()
    hashed, dense = _rows(texts, words, characters), np.stack([_dense(text) for text in texts])
    fit, held = ~aside, aside
    count = min(config.features, int((hashed[fit].getnnz(axis=0) > 0).sum()))
    chi2 = np.nan_to_num(learn["chi2"](hashed[fit], labels[fit])[0], nan=-1.0)
    columns = np.sort(np.argsort(-chi2, kind="stable")[:count])
    scales = np.maximum(np.abs(dense[fit]).max(axis=0), 1e-9)
    scipy = importlib.import_module("scipy.sparse")
    both = scipy.hstack([hashed[:, columns], scipy.csr_matrix(dense / scales)]).tocsr()
    model = learn["LogisticRegression"](
        C=config.inverse_penalty, solver="liblinear", random_state=0, tol=1e-6
    )
    model.fit(both[fit], labels[fit])
    made = Classifier(columns, scales, model.coef_[0].astype(np.float64), float(model.intercept_[0]))
    details = _measured([made.score(text) for text in np.array(texts, object)[held]], labels[held], learn)
    details |= {"model_digest": made.digest, "examples": [int(fit.sum()), int(held.sum())], "features": count}
    return made, details | {"weights": _named(made, texts)}


class FilterLearnedStep:
    """With `min_score`: drops what scores less."""

    edges: dict[str, Edges] = {"score": np.linspace(0, 1, 41)}

    def __init__(self, config: FilterLearned):
        assert config.min_score is not None
        self.least = config.min_score
        self.model, self.details = train(config)

    def apply(self, text: str) -> Outcome:
        """Score one document."""
        score = self.model.score(text)
        return Outcome(text, "min_score" if score < self.least else None, {"score": score})


class KeepBestStep:
    """With `keep`: finds the score that this share of train reaches; it holds for both splits."""

    field = None
    names: dict[int, str] = {}  # no strata

    def __init__(self, config: FilterLearned):
        assert config.keep is not None
        self.share = config.keep
        self.model, self.details = train(config)

    def sign(self, texts: list[str], values: list[str]) -> UInt64[np.ndarray, "N 1"]:
        """Return the bits of each document's score: 8 bytes."""
        scores = np.array([self.model.score(text) for text in texts], dtype=np.float64)
        return scores.view(np.uint64).reshape(-1, 1)

    def decide(self, corpus: DocumentTable) -> Verdict:
        """Keep what reaches the score of the last train document within the share."""
        scores = np.ascontiguousarray(corpus.signatures[:, 0]).view(np.float64)
        train_scores = np.sort(scores[corpus.is_train])[::-1]
        least = (
            float(train_scores[max(1, round(self.share * len(train_scores))) - 1]) if len(train_scores) else 0
        )
        keep = scores >= least
        return Verdict(
            keep,
            ("below_share",),
            np.zeros(len(keep), np.int64),
            self.details | {"least_score": least, "bytes_per_document": 8},
            {"score": scores},
            FilterLearnedStep.edges,
            lambda row: f"score {scores[row]:.3f}",
        )


def _sklearn() -> dict[str, Any]:
    try:
        return {
            "chi2": importlib.import_module("sklearn.feature_selection").chi2,
            "HashingVectorizer": importlib.import_module("sklearn.feature_extraction.text").HashingVectorizer,
            "LogisticRegression": importlib.import_module("sklearn.linear_model").LogisticRegression,
            "metrics": importlib.import_module("sklearn.metrics"),
        }
    except ImportError:
        raise DataError(
            "data.steps: filter_learned needs scikit-learn; pip install -e '.[filters]'"
        ) from None


def _examples(config: FilterLearned) -> tuple[list[str], np.ndarray]:
    texts: list[str] = []
    labels: list[int] = []
    for label, paths in ((1, config.good), (0, config.bad)):
        found = dict.fromkeys(t for path in paths for t in read_documents(Path(path), config.text_key))
        texts += found
        labels += [label] * len(found)
    return texts, np.array(labels)


def _vectorizers() -> tuple[Any, Any]:
    """Return hashers of words (1 and 2 of them) and of characters within words (3 to 5)."""
    make = _sklearn()["HashingVectorizer"]
    common = {"n_features": BUCKETS, "alternate_sign": False, "norm": "l2", "dtype": np.float64}
    return (
        make(analyzer="word", ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **common),
        make(analyzer="char_wb", ngram_range=(3, 5), **common),
    )


def _rows(texts: list[str], words: Any, characters: Any) -> Any:
    """Return a sparse row [2 * BUCKETS] of each text: n-grams of words, then of characters."""
    cut = [text[:CHARACTERS] for text in texts]
    scipy = importlib.import_module("scipy.sparse")
    return scipy.hstack([words.transform(cut), characters.transform(cut)]).tocsr()


def _dense(text: str) -> Float[np.ndarray, " F"]:
    values = features(text[:CHARACTERS])
    counted = ("words", "lines", "sentences", "braces")  # of any size: their logarithms are comparable
    return np.array([np.log1p(values[n]) if n in counted else values[n] for n in FEATURES])


def _measured(scores: list[float], labels: np.ndarray, learn: dict[str, Any]) -> dict[str, Any]:
    metrics, said = learn["metrics"], np.array(scores) >= 0.5
    return {
        "held_out_precision": round(float(metrics.precision_score(labels, said, zero_division=0.0)), 6),
        "held_out_recall": round(float(metrics.recall_score(labels, said, zero_division=0.0)), 6),
        "held_out_auc": round(float(metrics.roc_auc_score(labels, scores)), 6),
    }


def _named(model: Classifier, texts: list[str]) -> list[list[Any]]:
    """Return [feature, weight] of the greatest of each sign; a bucket has its commonest n-gram's name."""
    order = np.argsort(model.weights, kind="stable")
    chosen = [*order[::-1][:SHOWN], *order[:SHOWN][::-1]]
    count = len(model.columns)
    wanted = {int(model.columns[place]) for place in chosen if place < count}
    names = _looked_up(wanted, texts, model)
    return [
        [
            names.get(int(model.columns[p]), "?") if p < count else FEATURES[p - count],
            round(float(model.weights[p]), 4),
        ]
        for p in chosen
    ]


def _looked_up(wanted: set[int], texts: list[str], model: Classifier) -> dict[int, str]:
    found: dict[int, Counter[str]] = {}
    step = max(1, len(texts) // NAMED)
    counts: Counter[tuple[int, str]] = Counter()
    for kind, vectorizer in enumerate((model._words, model._characters)):
        analyze = vectorizer.build_analyzer()
        for text in texts[::step]:
            counts.update((kind, gram) for gram in analyze(text[:CHARACTERS]))
        grams = [gram for k, gram in counts if k == kind]
        places = _buckets(grams, vectorizer)
        for gram, place in zip(grams, places, strict=True):
            if (column := int(place) + kind * BUCKETS) in wanted:
                found.setdefault(column, Counter())[repr(gram)] += counts[kind, gram]
    return {column: names.most_common(1)[0][0] for column, names in found.items()}


def _buckets(grams: list[str], vectorizer: Any) -> np.ndarray:
    """Return the bucket of each n-gram, by hashing each as a document of one token."""
    hasher = importlib.import_module("sklearn.feature_extraction").FeatureHasher(
        n_features=BUCKETS, input_type="string", alternate_sign=False
    )
    return hasher.transform([gram] for gram in grams).indices
