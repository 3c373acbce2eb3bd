"""What a decoder-only transformer is made of: a family (GPT-2, Llama, Gemma, ...) is a set of values."""

import difflib
from dataclasses import dataclass, field

NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("rope", "learned", "none")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu2")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
WINDOW_KINDS = ("global", "local")


@dataclass
class ModelConfig:
    """Shape and features of the model; sizes in elements, angles in radians, initial spread as a deviation.

    `vocab_size=-1` takes the tokenizer's size, rounded up to a multiple of 128 to split over devices.
    `window_pattern` is the repeating order of layer kinds: `["local", "global"]` is Gemma 2, `["global"]` is
    Llama. `max_seq_len` is the rows of a learned position table; with RoPE it only says what was trained.
    """

    name: str = "llama"  # the family, for tables and logs
    vocab_size: int = -1
    num_layers: int = 4  # decoder blocks
    d_model: int = 256  # width of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads; divides num_heads
    head_dim: int = 32  # of one head; need not be d_model / num_heads
    d_ff: int = 768  # width inside the feed-forward
    max_seq_len: int = 2048
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-6  # added to the mean square
    norm_unit_offset: bool = False  # Gemma: the stored scale is the distance from one
    post_norms: bool = False  # Gemma 2 and 3: a norm after attention and after the feed-forward as well
    bias: bool = False  # GPT-2: a bias on every projection and norm
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3, Gemma 3
    position: str = "rope"  # rope | learned | none
    rope_theta: float = 10000.0  # base of the rotation frequencies
    rope_local_theta: float | None = None  # Gemma 3: of local layers, which are then not scaled either
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
    init_std: float = 0.02  # spread of what no other rule covers

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies by a gate."""
        return self.activation in ("swiglu", "geglu")


def check_model(config: ModelConfig) -> None:
    """Raise ValueError, in one line with the remedy, for values that make no model."""
    _check_choices(config)
    _check_numbers(config)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % kv_heads:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"model.num_kv_heads={kv_heads} must divide model.num_heads={heads}; use one of {fits}"
        )
    if config.position == "rope" and config.head_dim % 2:
        raise ValueError(
            f"model.head_dim={config.head_dim} must be even for model.position=rope; "
            f"use {config.head_dim + 1}"
        )
    if "local" in config.window_pattern and config.window is None:
        raise ValueError(
            f"model.window=null but model.window_pattern={list(config.window_pattern)} has local layers; "
            "set model.window to the positions they see"
        )
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if config.rope_scaling == "llama3" and low >= high:
        raise ValueError(
            f"model.rope_low_freq_factor={low} must be below "
            f"model.rope_high_freq_factor={high}; Llama 3 has 1 and 4"
        )


def _check_choices(config: ModelConfig) -> None:
    kinds = {"norm": NORMS, "position": POSITIONS, "activation": ACTIVATIONS, "rope_scaling": ROPE_SCALINGS}
    for key, choices in kinds.items():
        if getattr(config, key) not in choices:
            near = difflib.get_close_matches(str(getattr(config, key)), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.{key}={getattr(config, key)} is not one of {', '.join(choices)}{hint}")
    pattern = list(config.window_pattern)
    if not pattern or any(kind not in WINDOW_KINDS for kind in pattern):
        raise ValueError(
            f"model.window_pattern={pattern} must list at least one of {', '.join(WINDOW_KINDS)}"
        )


SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len")
ROPE_NUMBERS = ("rope_theta", "rope_factor", "rope_original_length", "rope_low_freq_factor")
POSITIVE = (*ROPE_NUMBERS, "rope_beta_fast", "rope_beta_slow", "norm_eps", "init_std")
POSITIVE_OR_NULL = ("window", "rope_local_theta", "attention_softcap", "logit_softcap", "attention_scale")


def _check_numbers(config: ModelConfig) -> None:
    for key in SIZES + POSITIVE + POSITIVE_OR_NULL:
        value = getattr(config, key)
        if value is None and key in POSITIVE_OR_NULL:
            continue
        if not 0 < value < float("inf"):
            remedy = "; use null to switch it off" if key in POSITIVE_OR_NULL else ""
            raise ValueError(f"model.{key}={value} must be above 0{remedy or '; use a positive number'}")
    if config.vocab_size != -1 and config.vocab_size < 1:
        raise ValueError(
            f"model.vocab_size={config.vocab_size} must be positive, or -1 for the tokenizer's size"
        )
