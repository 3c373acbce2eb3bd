"""What text a run writes at its end, and how it is drawn."""

from dataclasses import dataclass, field

from common.checks import as_text, require


@dataclass
class SampleConfig:
    """Text generated at the end of the run; of `parse_snippets` snippets, the share that is valid Python."""

    prompts: list[str] = field(default_factory=list)  # empty: no samples
    max_new_tokens: int = 128  # for each prompt
    temperature: float = 0.8  # 0: the likeliest token each time
    top_k: int = 0  # draw from the k likeliest tokens; 0: all
    parse_snippets: int = 0  # 0: do not count

    def __post_init__(self) -> None:
        """Each value by itself."""
        self.prompts = [as_text("sample.prompts", prompt) for prompt in self.prompts]
        require(self.max_new_tokens >= 1, "sample.max_new_tokens", self.max_new_tokens, "1 or more")
        for key in ("temperature", "top_k", "parse_snippets"):
            require(getattr(self, key) >= 0, f"sample.{key}", getattr(self, key), "0 or more")


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
    guesses: int = 0  # tokens that are guessed from the text itself and read with the next one
    prefix_cache: bool = True  # keep what prompts have in common
    queue_requests: int = 256  # that may wait
    queue_tokens: int = 1 << 20  # of prompts and answers that may wait
    queue_seconds: float = 60.0  # that one that waits has to wait, as predicted

    def __post_init__(self) -> None:
        """Each value by itself."""
        for key in ("slots", "page", "chunk", "prefill_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("max_len", "pages", "guesses", "queue_requests", "queue_tokens", "queue_seconds"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.chunk % self.page == 0, "chunk", self.chunk, f"a multiple of page={self.page}")
