"""What an engine is asked to be: sizes and limits, which no run has."""

from dataclasses import dataclass

from common.checks import choice, require

SPECULATE = ("ngram", "mtp")


def check_cache_bits(bits: int | None) -> None:
    """Raise ValueError for a number of bits that no cache is kept in."""
    require(bits in (None, 8), "cache_bits", bits, "8, or null: as they are computed")


@dataclass(frozen=True)
class ServeConfig:
    """How many texts an engine writes at a time, of what length, and how many may wait.

    A step has all slots in it, taken or not: more of them serve more users at once, and each one slower.
    """

    slots: int = 8  # texts that are written at a time
    max_len: int = 0  # tokens of a prompt and its answer; 0: the model's own length
    page: int = 64  # tokens of a page of the cache
    chunk: int = 128  # tokens of a prompt that are read at once
    pages: int = 0  # of the cache; 0: as many as all slots need for the longest texts
    prefill_every: int = 1  # decodes between two chunks
    guesses: int = 0  # tokens that are guessed and read with the next one
    speculate: str = (
        "ngram"  # ngram: guessed from the text itself | mtp: by the model's layer for further ones
    )
    prefix_cache: bool = True  # keep what prompts have in common
    packed: bool = False  # quantized weights stay so in memory, and every product dequantizes its own
    cache_bits: int | None = None  # 8: of keys and values int8 levels and scales; null: as they are computed
    queue_requests: int = 256  # that may wait
    queue_tokens: int = 1 << 20  # of prompts and answers that may wait
    queue_seconds: float = 60.0  # that one that waits has to wait, as predicted

    def __post_init__(self) -> None:
        """Each value by itself."""
        for key in ("slots", "page", "chunk", "prefill_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("max_len", "pages", "guesses", "queue_requests", "queue_tokens", "queue_seconds"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        choice("speculate", self.speculate, SPECULATE)
        check_cache_bits(self.cache_bits)
        needed = self.speculate == "ngram" or self.guesses > 0
        require(needed, "guesses", self.guesses, f"1 or more with speculate={self.speculate}")
        require(self.chunk % self.page == 0, "chunk", self.chunk, f"a multiple of page={self.page}")
