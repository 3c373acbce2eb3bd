"""`filter_quality`: simple numbers that tell prose from boilerplate, each with its thresholds.

Sources: Rae et al. 2021 (Gopher, appendix A.1.1), Raffel et al. 2020 (C4, section 2.2), Penedo et al. 2023
(RefinedWeb, appendix G) and 2024 (FineWeb, section 3.6). They are made for English web text: stop words and
punctuation say little of code, and nothing of languages without blanks between words.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.curation.base import Edges, Outcome
from data.curation.config import FEATURES, FilterQuality
from data.curation.length import first_broken

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
TERMINAL = (".", "!", "?", '"', "'", "”", "’", "…", "。", "！", "？")
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
SHORT = 30  # characters of a short line
SENTENCE = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)")
WORD = re.compile(r"\w+")

SHARE = np.linspace(0, 1, 41)
COUNT = np.concatenate([[0], np.logspace(0, 6, 49)])
EDGES: dict[str, Edges] = {
    **{name: SHARE for name in FEATURES},
    **{name: COUNT for name in ("words", "lines", "sentences")},
    "mean_word_length": np.linspace(0, 20, 41),
    "symbols_per_word": np.linspace(0, 0.5, 41),
    "stop_words": np.arange(10) - 0.5,
    "braces": np.arange(22) - 0.5,
}


class FilterQualityStep:
    """Drops a document for the first feature that is out of its bounds; reports all features."""

    edges = EDGES

    def __init__(self, config: FilterQuality):
        self.bounds = config.limits()

    def apply(self, text: str) -> Outcome:
        """Compute the features and compare them with the bounds."""
        values = features(text)
        return Outcome(text, first_broken(values, self.bounds), values)


def features(text: str) -> dict[str, float]:
    """Return every feature of a document; shares lie between 0 and 1, and are 0 where there is nothing.

    words: runs without white space; mean_word_length: their characters; symbols_per_word: `#` and ellipses a
    word; alphabetic_words: share with a letter; stop_words: how many of eight occur; unique_words: share of
    distinct ones; lines: not blank; sentences: ends of them; bullet_lines, ellipsis_lines, punctuated_lines:
    shares of lines that begin or end so; short_lines: share under 30 characters; duplicate_lines and
    duplicate_line_characters: share of lines that were there before, and of their characters;
    duplicate_paragraphs; top_bigram: share of characters in the commonest pair of words; duplicate_5grams:
    share of words in a repeated run of five; digits: share of characters; uppercase: share of letters;
    braces: how many `{`.
    """
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return {**_of_words(text, words), **_of_lines(text, lines), **_of_characters(text)}


def _of_words(text: str, words: list[str]) -> dict[str, float]:
    count = len(words) or 1
    plain = [word.lower() for word in WORD.findall(text)]
    characters = sum(map(len, words))
    distinct = set(plain)
    return {
        "words": float(len(words)),
        "mean_word_length": characters / count,
        "symbols_per_word": (text.count("#") + text.count("...") + text.count("…")) / count,
        "alphabetic_words": sum(any(map(str.isalpha, word)) for word in words) / count,
        "stop_words": float(len(STOP_WORDS & distinct)),
        "unique_words": len(distinct) / (len(plain) or 1),
        "sentences": float(len(SENTENCE.findall(text))),
        "top_bigram": _top_bigram(plain),
        "duplicate_5grams": _repeated(plain, 5),
    }


def _of_lines(text: str, lines: list[str]) -> dict[str, float]:
    count = len(lines) or 1
    paragraphs = [part for part in map(str.strip, text.split("\n\n")) if part]
    repeated, repeated_characters = _duplicates(lines)
    return {
        "lines": float(len(lines)),
        "bullet_lines": sum(line.startswith(BULLETS) for line in lines) / count,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / count,
        "punctuated_lines": sum(line.endswith(TERMINAL) for line in lines) / count,
        "short_lines": sum(len(line) < SHORT for line in lines) / count,
        "duplicate_lines": repeated,
        "duplicate_line_characters": repeated_characters,
        "duplicate_paragraphs": _duplicates(paragraphs)[0],
    }


def _of_characters(text: str) -> dict[str, float]:
    counts = Counter(text)  # far fewer characters than places
    letters = sum(n for character, n in counts.items() if character.isalpha()) or 1
    upper = sum(n for character, n in counts.items() if character.isupper())
    digits = sum(n for character, n in counts.items() if character.isdigit())
    return {
        "digits": digits / (len(text) or 1),
        "uppercase": upper / letters,
        "braces": float(counts["{"]),
    }


def _duplicates(parts: Sequence[str]) -> tuple[float, float]:
    """Return the share of parts that stood before, and of their characters."""
    seen: set[str] = set()
    again = characters = 0
    for part in parts:
        if part in seen:
            again += 1
            characters += len(part)
        seen.add(part)
    return again / (len(parts) or 1), characters / (sum(map(len, parts)) or 1)


def _top_bigram(words: list[str]) -> float:
    """Return the share of the words' characters that lie in the commonest pair, 0 where none comes twice."""
    if len(words) < 3:
        return 0.0
    pair, count = Counter(zip(words, words[1:], strict=False)).most_common(1)[0]
    if count < 2:
        return 0.0
    return min(1.0, count * (len(pair[0]) + len(pair[1])) / sum(map(len, words)))


def _repeated(words: list[str], n: int) -> float:
    """Return the share of words that lie in a run of n that stood before."""
    seen: set[tuple[str, ...]] = set()
    covered = end = 0
    for place, gram in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
        if gram in seen:
            covered += place + n - max(place, end)
            end = place + n
        seen.add(gram)
    return covered / (len(words) or 1)
