"""`filter_language`: documents in the languages that were asked for."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data.curation.base import Edges, Outcome
from data.curation.config import FilterLanguage
from data.errors import DataError

CHARACTERS = 4096  # of a document's beginning that are looked at


class FilterLanguageStep:
    """Asks py3langid (Lui and Baldwin 2012, 97 languages; the model lies in the package)."""

    edges: dict[str, Edges] = {"probability": np.linspace(0, 1, 41)}

    def __init__(self, config: FilterLanguage):
        self.config = config
        self._classify: Callable[[str], tuple[str, float]] | None = None
        _check(config.keep, _langid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_classify": None}  # workers load their own

    def apply(self, text: str) -> Outcome:
        """Drop a document in another language, or in one that is told with too little certainty."""
        if self._classify is None:
            self._classify = _identifier(_langid()).classify
        language, probability = self._classify(text[:CHARACTERS])
        probability = min(1.0, float(probability))
        reason = None
        if language not in self.config.keep:
            reason = f"language_{language}"
        elif probability < self.config.min_probability:
            reason = "min_probability"
        return Outcome(text, reason, {"probability": probability}, {language: 1})


def _langid() -> Any:
    try:
        return importlib.import_module("py3langid.langid")
    except ImportError:
        raise DataError("data.steps: filter_language needs py3langid; pip install -e '.[filters]'") from None


def _identifier(langid: Any) -> Any:
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _check(keep: tuple[str, ...], langid: Any) -> None:
    known = sorted(set(_identifier(langid).labels))
    unknown = [code for code in keep if code not in known]
    if unknown:
        raise DataError(
            f"data.steps: filter_language keep={unknown[0]} is no language of py3langid; "
            f"use {' '.join(known)}"
        )
