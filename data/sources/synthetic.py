"""Synthetic documents: text of a small random language, any amount of it, the same on every machine.

Document i is a pure function of (seed, i), by integer arithmetic alone. A language has WORDS words of Zipf
frequencies (Zipf 1949). A word is followed by one of its own FOLLOWERS successors two times in three, by one
of the document's TOPIC words one time in eight, else by any word: so a model gains from the previous word,
and, within a document, from what it has seen before. Sentences end with a full stop.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from data.config import DataConfig
from data.sources.array_record import PLAIN, text_record, write_prepared
from data.sources.documents import Say, silent

WORDS, FOLLOWERS, TOPIC = 8192, 8, 4
LONGEST = 640  # words of the longest document; the shortest has a quarter: about 2 KB on average
BLOCK, TOGETHER = 4096, 512  # documents that are sorted by length, and that are made together
HELD_OUT = 20  # every 20th document is held out, 5 %


class SyntheticSource:
    """`data.source=synthetic`: `data.synthetic_documents` documents; `data.name=7` is another language."""

    directory = None
    text_key = "text"
    splits = {"train": "train", "validation": "validation"}

    def __init__(self, config: DataConfig, say: Say = silent):
        self.seed = int(config.name or 0)
        self.count = config.synthetic_documents

    def inputs(self) -> dict[str, Any]:
        """The seed and the count say it all."""
        return {"source": "synthetic", "version": 1, "seed": self.seed, "documents": self.count}

    def check(self) -> None:
        """Nothing: what is made here is sound."""

    def freeze(self) -> None:
        """Nothing: what was built is held to its manifest."""

    def build(self, aside: Path) -> dict[str, int]:
        """Write both splits, in order."""
        language = Language(self.seed)
        every = np.arange(self.count)
        held_out = every % HELD_OUT == HELD_OUT - 1
        splits = {"train": every[~held_out], "validation": every[held_out]}
        records = {name: _records(language, one) for name, one in splits.items()}
        write_prepared(aside, "synthetic", records, PLAIN)  # compressing would take half of the time
        return {}


def _records(language: "Language", indices: Int64[np.ndarray, " N"]) -> Iterator[bytes]:
    for first in range(0, len(indices), BLOCK):
        yield from map(text_record, language.documents(indices[first : first + BLOCK]))


class Language:
    """The words of a seed, and who follows whom."""

    def __init__(self, seed: int):
        self.seed = seed
        draws = _random(seed, 0, np.arange(WORDS * (FOLLOWERS + 1)))
        weights = np.uint64(1 << 40) // (np.arange(WORDS, dtype=np.uint64) + np.uint64(2))
        cumulative = np.cumsum(weights, dtype=np.uint64)
        # Zipf's law by a table of 65536 draws: one look instead of a search.
        steps = np.arange(1 << 16, dtype=np.uint64) * (cumulative[-1] >> np.uint64(16))
        self.zipf = np.searchsorted(cumulative, steps, side="right")
        words = [_word(draw, rank) for rank, draw in enumerate(draws[:WORDS].tolist())]
        self.words = np.array(words, dtype=object)
        self.followers = self._anything(draws[WORDS:])

    def documents(self, indices: Int64[np.ndarray, " N"]) -> list[bytes]:
        """Return the UTF-8 text of each document."""
        span = np.uint64(LONGEST - LONGEST // 4)
        lengths = LONGEST // 4 + (_random(self.seed, 1, indices) % span).astype(np.int64)
        texts: list[bytes] = [b""] * len(indices)
        by_length = np.argsort(lengths, kind="stable")
        for first in range(0, len(indices), TOGETHER):  # of like length: few steps are taken for nothing
            some = by_length[first : first + TOGETHER]
            words = self.words[self._walk(indices[some], int(lengths[some[-1]]))]
            for place, row, length in zip(some.tolist(), words, lengths[some].tolist(), strict=True):
                texts[place] = b" ".join(row[:length].tolist())
        return texts

    def _walk(self, indices: Int64[np.ndarray, " N"], steps: int) -> Int64[np.ndarray, "N T"]:
        """Return the word ids of documents that all take their steps together."""
        draws = _random(self.seed, 2, np.arange(steps)[:, None] + indices * 1024)
        kind = draws.astype(np.int64) & 31  # of 32, 21 follow, 4 are of the topic, 7 are any word
        ids = self._anything(draws)
        topic = ids[(draws >> np.uint64(50)).astype(np.int64) % TOPIC, np.arange(len(indices))]
        np.copyto(ids, topic, where=(kind >= 21) & (kind < 25))
        place = GEOMETRIC[(draws >> np.uint64(40)).astype(np.int64) & 127]
        follows = kind < 21
        next_word = np.empty_like(ids[0])
        for t in range(1, steps):
            place[t] += ids[t - 1] * FOLLOWERS
            self.followers.take(place[t], out=next_word, mode="clip")  # by default, `out` is written twice
            np.copyto(ids[t], next_word, where=follows[t])
        return np.ascontiguousarray(ids.T)

    def _anything(self, draws: UInt64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        return self.zipf[(draws >> np.uint64(8)).astype(np.int64) & 0xFFFF]


# Of seven random bits, how many ones come before the first zero: half the time 0, a quarter 1, …
GEOMETRIC = np.array([next(i for i in range(8) if not n >> i & 1) for n in range(128)])


def _random(seed: int, stream: int, counters: Int64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Return 64 random bits for each counter: SplitMix64 (Steele et al. 2014) at that place."""
    start = np.uint64((seed * 0x632BE59BD9B4E019 + stream * 0xD1342543DE82EF95) % 2**64)
    z = (counters.astype(np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _word(draw: int, rank: int) -> bytes:
    """Return a word of one to four syllables, frequent ones short; one in ten ends a sentence."""
    letters = []
    for _ in range(1 + rank.bit_length() // 4):
        draw, consonant = divmod(draw, 20)
        draw, vowel = divmod(draw, 5)
        letters.append("bcdfghjklmnpqrstvwxz"[consonant] + "aeiou"[vowel])
    return ("".join(letters) + ("." if draw % 10 == 0 else "")).encode()
