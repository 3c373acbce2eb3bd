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
