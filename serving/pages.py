"""Pages of the cache: who holds which, and which hold the beginnings of prompts that may come again.

On the host alone: a page is a number here. What lies in it, `serving.programs` writes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from common.checks import require, within


@dataclass
class Held:
    """The pages of one text, in the order of its tokens, of which the first `cached` tokens are written."""

    pages: list[int]
    cached: int
    keys: list[bytes] = field(default_factory=list)  # of the prompt's whole chunks, one after another


class PagePool:
    """`count` pages of `page` tokens each; prompts share what they have in common by whole chunks.

    A chunk is what is computed at once, always from a multiple of `chunk` on, so that what a page holds is
    the same to the bit whoever has it computed. Pages that nobody holds keep what they have until their place
    is needed, the least recently held first. further: what a chunk's pages hold depends on the token behind
    it as well, so that only who goes on with the same one shares them. Raises ValueError where a chunk is no
    whole number of pages.
    """

    def __init__(
        self, count: int, page: int, chunk: int, *, share: bool = True, further: bool = False
    ) -> None:
        within("pages", count, 1)
        within("page", page, 1)
        require(chunk >= page and chunk % page == 0, "chunk", chunk, f"a multiple of page={page}")
        self.page, self.chunk, self.share, self.further = page, chunk, share, further
        self._held = [0] * count  # by how many texts
        self._free = list(range(count - 1, -1, -1))
        self._of_key: dict[bytes, list[int]] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # chunks that nobody holds, oldest first

    @property
    def count(self) -> int:
        """All pages."""
        return len(self._held)

    @property
    def used(self) -> int:
        """Pages that some text holds."""
        return sum(holders > 0 for holders in self._held)

    @property
    def cached(self) -> int:
        """Pages that are kept for prompts to come alone."""
        return self.count - self.used - len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-tokens // self.page)

    def take(self, prompt: Sequence[int], tokens: int, version: str) -> Held | None:
        """The pages of a text that will have so many tokens, or None where there are not enough now.

        What stands in the cache is of weights `version`. The last token of a prompt is never taken from
        there: it is the one behind which something is drawn.
        """
        keys = self._keys(prompt, version) if self.share else []
        found: list[int] = []
        for key in keys:
            if key not in self._of_key:
                break
            found += self._of_key[key]
        cached = len(found) * self.page
        hits = keys[: cached // self.chunk]
        fresh = self.needed(tokens) - len(found)
        spare = sum(len(self._of_key[key]) for key in self._idle if key not in set(hits))
        if fresh > len(self._free) + spare:
            return None
        for page in found:
            self._held[page] += 1
        for key in hits:
            self._idle.pop(key, None)
        while len(self._free) < fresh:
            self._forget(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(fresh)]
        for page in pages:
            self._held[page] += 1
        return Held(found + pages, cached, keys)

    def written(self, held: Held, tokens: int) -> None:
        """The prompt's first `tokens` tokens stand in the cache: their whole chunks can be shared."""
        each = self.chunk // self.page
        for number, key in enumerate(held.keys[: tokens // self.chunk]):
            pages = held.pages[number * each : (number + 1) * each]
            # Of two that computed the same at once the first one's are kept.
            if key not in self._of_key and not any(page in self._key_of for page in pages):
                self._of_key[key] = pages
                self._key_of.update(dict.fromkeys(pages, key))

    def release(self, held: Held) -> None:
        """Give the pages of a text back; each may be given once."""
        assert all(self._held[page] > 0 for page in held.pages)
        # From its end on: of a prompt the end is forgotten before the beginning, without which it is useless.
        for page in reversed(held.pages):
            self._held[page] -= 1
            if self._held[page] > 0:
                continue
            key = self._key_of.get(page)
            if key is None:
                self._free.append(page)
            elif not any(self._held[other] for other in self._of_key[key]):
                self._idle[key] = None
        held.pages = []

    def forget(self) -> None:
        """Drop what is kept for prompts to come; held pages stay with those that hold them."""
        for key in list(self._idle):
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        self._idle.pop(key)
        for page in self._of_key.pop(key):
            del self._key_of[page]
            self._free.append(page)

    def _keys(self, prompt: Sequence[int], version: str) -> list[bytes]:
        """Of each whole chunk before the last token: a digest of the weights and of all that decides it."""
        tokens = np.asarray(prompt, np.int32)
        digest, keys = hashlib.blake2b(version.encode(), digest_size=16), []
        for end in range(self.chunk, len(tokens), self.chunk):
            digest.update(tokens[end - self.chunk : end].tobytes())
            key = digest.copy()
            key.update(tokens[end : end + self.further].tobytes())
            keys.append(key.digest())
        return keys
