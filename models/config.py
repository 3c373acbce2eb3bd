"""What a decoder-only transformer is made of. Every family (GPT-2, Llama, Mistral, Qwen, Gemma) is a set of these values."""

from dataclasses import dataclass, field

NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("rope", "learned", "none")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu2")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
WINDOW_KINDS = ("global", "local")


@dataclass
class ModelConfig:
    """Shape and features of the model; sizes in elements, angles in radians, initial spread as a standard deviation.

    `vocab_size=-1` takes the tokenizer's size, rounded up to a multiple of 128 so that it splits over devices.
    `window_pattern` is the repeating order of layer kinds: `["local", "global"]` is Gemma 2, `["global"]` is Llama.
    """

    name: str = "llama"
    vocab_size: int = -1
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    d_ff: int = 768
    max_seq_len: int = (
        2048  # rows of a learned position table; with RoPE only a statement of what was trained
    )
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False  # Gemma: the stored scale is the distance from one
    post_norms: bool = False  # Gemma 2 and 3: a norm after attention and after the feed-forward as well
    bias: bool = False  # GPT-2: a bias on every projection and norm
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3, Gemma 3
    position: str = "rope"
    rope_theta: float = 10000.0
    rope_local_theta: float | None = (
        None  # Gemma 3: local layers keep 10,000 while global ones take a million
    )
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int = 8192
    rope_low_freq_factor: float = 1.0  # llama3 scaling
    rope_high_freq_factor: float = 4.0  # llama3 scaling
    rope_beta_fast: float = 32.0  # yarn
    rope_beta_slow: float = 1.0  # yarn
    activation: str = "swiglu"
    window: int | None = None  # positions a local layer sees, itself included
    window_pattern: list[str] = field(default_factory=lambda: ["global"])
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    embed_scale: bool = False  # Gemma: embeddings times sqrt(d_model)
    tie_embeddings: bool = True
    zero_init: bool = False  # projections back into the residual start at zero
    init_std: float = 0.02
