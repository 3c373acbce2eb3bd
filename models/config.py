"""What a decoder-only transformer is made of: each family (GPT-2, Llama, Gemma, …) is a set of these values."""

import difflib
from dataclasses import dataclass, field

NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("rope", "learned", "none")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu2")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
WINDOW_KINDS = ("global", "local")


def _choice(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}={value} is not one of {', '.join(options)}{hint}")


def _require(ok: bool, key: str, value: object, limit: str) -> None:
    # `ok` is False for nan as well: every comparison with it is.
    if not ok:
        raise ValueError(f"{key}={value} must be {limit}")


@dataclass
class ModelConfig:
    """Shape and features of the model; sizes in elements, initial spread as a standard deviation.

    `vocab_size=-1` takes the tokenizer's size, rounded up to a multiple of 128 so that devices can split it.
    `window_pattern` is the repeating order of layer kinds: `["local", "global"]` is Gemma 2.
    """

    name: str = "llama"  # the family, for tables and logs
    vocab_size: int = -1
    num_layers: int = 4  # decoder blocks
    d_model: int = 256  # width of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads; divides num_heads
    head_dim: int = 32  # of one head; need not be d_model / num_heads
    d_ff: int = 768  # width inside the feed-forward
    max_seq_len: int = 2048  # rows of a learned position table; with RoPE only a statement
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-6  # added to the mean square
    norm_unit_offset: bool = False  # Gemma: the stored scale is the distance from one
    post_norms: bool = False  # Gemma 2 and 3: a norm after attention and after the feed-forward as well
    bias: bool = False  # GPT-2: a bias on every projection and norm
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3, Gemma 3
    position: str = "rope"  # rope | learned | none
    rope_theta: float = 10000.0  # base of the rotation frequencies
    rope_local_theta: float | None = None  # Gemma 3: local layers keep 10,000, global ones take 1e6
    rope_scaling: str = "none"  # none | linear | llama3 | yarn
    rope_factor: float = 1.0  # how many times longer than rope_original_length
    rope_original_length: int = 8192  # tokens, before scaling
    rope_low_freq_factor: float = 1.0  # llama3 scaling
    rope_high_freq_factor: float = 4.0  # llama3 scaling
    rope_beta_fast: float = 32.0  # yarn
    rope_beta_slow: float = 1.0  # yarn
    activation: str = "swiglu"  # swiglu | geglu | gelu | relu2
    window: int | None = None  # positions a local layer sees, itself included
    window_pattern: list[str] = field(default_factory=lambda: ["global"])
    attention_softcap: float | None = None  # Gemma 2: 50, on attention scores
    logit_softcap: float | None = None  # Gemma 2: 30, on logits
    attention_scale: float | None = None  # None: head_dim ** -0.5
    embed_scale: bool = False  # Gemma: embeddings times sqrt(d_model)
    tie_embeddings: bool = True  # the head is the embedding table
    zero_init: bool = False  # projections back into the residual start at zero
    init_std: float = 0.02  # spread of the embeddings and of matrices whose init has no other rule

    def __post_init__(self) -> None:
        """Each value by itself; what two values must agree on is checked in `configs.schema`."""
        _choice("model.norm", self.norm, NORMS)
        _choice("model.position", self.position, POSITIONS)
        _choice("model.activation", self.activation, ACTIVATIONS)
        _choice("model.rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        for kind in self.window_pattern:
            _choice("model.window_pattern", kind, WINDOW_KINDS)
        _require(len(self.window_pattern) > 0, "model.window_pattern", [], "a list of global and local")
        for key in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len"):
            _require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        ok = self.vocab_size == -1 or self.vocab_size >= 2
        _require(ok, "model.vocab_size", self.vocab_size, "2 or more, or -1 for the tokenizer's size")
        for key in ("norm_eps", "rope_theta", "rope_original_length", "rope_beta_fast", "rope_beta_slow"):
            _require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "above 0")
        for key in ("rope_low_freq_factor", "rope_high_freq_factor", "init_std"):
            _require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "above 0")
        _require(self.rope_factor >= 1, "model.rope_factor", self.rope_factor, "1 or more")
        for key in ("window", "rope_local_theta", "attention_softcap", "logit_softcap", "attention_scale"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"model.{key}", value, "above 0, or null")
