"""What is asked of an engine that is planned: the words of scripts/plan.py beside `serve=true`."""

from dataclasses import dataclass, replace

from common.checks import require, within
from models.config import ModelConfig
from models.grid import BITS
from serving.settings import ServeConfig


@dataclass(frozen=True)
class ServingQuestion:
    """What an engine is to do: its sizes, its texts, and what it promises."""

    slots: int = 0  # texts that are written at a time; 0: as many as fit, up to 512
    max_len: int = 0  # tokens of a prompt and its answer; 0: the model's own length
    page: int = 64  # tokens of a page of the cache
    chunk: int = 128  # tokens of a prompt that are read at once, a multiple of page
    context: int = 0  # tokens of each text while a token is timed; 0: max_len, the longest
    prompt: int = 0  # tokens of a prompt that is timed; 0: half of max_len
    weight_bits: int | None = None  # of projections and tables, a scale an output, read so; null: not rounded
    cache_bits: int | None = None  # 8: keys and values as int8 levels and scales; null: as they are computed
    slo_ttft: float | None = None  # seconds to the first token, every other slot writing
    slo_gap: float | None = None  # seconds between two tokens

    def __post_init__(self) -> None:
        """Each value by itself; sizes as the engine refuses them."""
        within("slots", self.slots, 0)
        sizes = {key: getattr(self, key) for key in ("max_len", "page", "chunk", "cache_bits")}
        ServeConfig(slots=max(1, self.slots), **sizes)
        for key in ("context", "prompt"):
            within(key, getattr(self, key), 0)
        bits = self.weight_bits
        require(bits is None or bits in BITS, "weight_bits", bits, f"one of {', '.join(map(str, BITS))}")
        for key in ("slo_ttft", "slo_gap"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "above 0")

    def settled(self, model: ModelConfig) -> "ServingQuestion":
        """With every 0 but that of slots replaced by what it stands for. ValueError for what cannot be."""
        longest = self.max_len or model.max_seq_len
        within("max_len", longest, 2, model.max_seq_len if model.position == "learned" else 1 << 20)
        within("context", self.context, 0, longest)
        within("prompt", self.prompt, 0, longest - 1)
        prompt = self.prompt or max(1, longest // 2)
        return replace(self, max_len=longest, context=self.context or longest, prompt=prompt)
