"""What a decoder-only transformer is made of: a family (GPT-2, Llama, Gemma, ...) is a set of values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.checks import choice, require

NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("rope", "learned", "none")
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu2", "clamped_swiglu")
ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")
# Which kinds of stretching a key is of, and what it is for the others.
OF_KINDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "attention_factor": (("yarn", "longrope"), None),
    "truncate": (("yarn",), True),
    "short_factor": (("longrope",), []),
    "long_factor": (("longrope",), []),
}
WINDOW_KINDS = ("global", "local", "nope")  # nope: global, and not rotated
BIASES = ("o", "mlp", "norm", "experts")  # places of their own; with experts the router has one too
SCORES = ("softmax", "sigmoid")
DISPATCHES = ("dropless", "capacity")
FEED_FORWARDS = ("experts", "mlp")
# Token mixers are known by their files, which load JAX and are not read for a config.
MIXERS = tuple(sorted(p.stem for p in Path(__file__).with_name("mixers").glob("[!_]*.py")))
VOCAB_MULTIPLE = 128  # so that tables split over devices and fill matrix units


def padded_vocab(size: int) -> int:
    """The vocabulary that `vocab_size=-1` stands for: a tokenizer's size, rounded up to a multiple of 128."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass
class MoEConfig:
    """A mixture of experts in place of the feed-forward: each token goes through a few of many.

    Balance may be kept by a loss (`load_balance_weight`), by a bias that only selection sees
    (`bias_update_rate`; Wang et al. 2024, arXiv:2408.15664), or by both. A capacity is places of an expert
    for a row of the batch, as a multiple of what an even spread needs.
    """

    num_experts: int = 8
    experts_per_token: int = 2  # chosen for each token
    d_expert: int = 256  # width inside one expert
    num_shared_experts: int = 0  # that every token goes through too: one feed-forward of their joint width
    first_dense_layers: int = 0  # layers that keep a feed-forward of width d_ff (DeepSeek)
    layer_pattern: list[str] = field(default_factory=lambda: ["experts"])  # repeats: experts | mlp (Qwen)
    score: str = "softmax"  # softmax (Mixtral) | sigmoid (DeepSeek-V3), of the router's logits
    normalize_gates: bool = True  # the chosen experts' scores are made to sum to one
    gate_scale: float = 1.0  # times the gates, after that
    num_groups: int = 1  # experts in groups, of which only some are open to a token (DeepSeek: nodes)
    groups_per_token: int = 1
    load_balance_weight: float = 0.01  # of the load-balance loss, summed over layers; 0: off
    router_z_weight: float = 0.0  # of log²(sum exp router logits), summed over layers
    bias_update_rate: float = 0.0  # step of the selection bias after each update; 0: none is made
    selection_bias: bool = False  # have one with bias_update_rate=0 too: imported, and held still
    shared_gate: bool = False  # Qwen2-MoE: the shared experts times a sigmoid of the token's own
    dispatch: str = "dropless"  # dropless: every choice is computed | capacity: those past it are dropped
    capacity_factor: float = 1.25  # 1: room for an even spread and no more

    def __post_init__(self) -> None:
        check_moe(self)


@dataclass
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one small latent."""

    q_lora_rank: int | None = None  # width of the queries' latent; null: queries straight from the stream
    kv_lora_rank: int = 512  # width of the latent that keys and values share, and that decoding caches
    qk_nope_head_dim: int = 128  # of a query or key head: the part that is not rotated
    qk_rope_head_dim: int = 64  # the part that is; its key is one for all heads
    v_head_dim: int = 128
    norm_eps: float | None = None  # of the latents' norms; null: model.norm_eps

    def __post_init__(self) -> None:
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            _check_count(f"model.mla.{key}", getattr(self, key))
        if self.q_lora_rank is not None:
            _check_count(
                "model.mla.q_lora_rank", self.q_lora_rank, "a positive number, or null for no latent"
            )
        if self.norm_eps is not None:
            _check_positive("model.mla.norm_eps", self.norm_eps, "null for model.norm_eps")
        if self.qk_rope_head_dim % 2:
            size = self.qk_rope_head_dim
            raise ValueError(f"model.mla.qk_rope_head_dim={size} must be even; use {size + 1}")


@dataclass
class DeltaConfig:
    """The gated delta rule (Gated DeltaNet, arXiv:2412.06464), of `gated_delta` layers."""

    num_key_heads: int = 16  # query and key heads
    num_value_heads: int = 32  # states; a multiple of num_key_heads
    key_head_dim: int = 128
    value_head_dim: int = 128
    conv_width: int = 4  # tokens that the short convolution sees, itself included
    chunk: int = 64  # positions that training computes at once; a power of two

    def __post_init__(self) -> None:
        for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_width"):
            _check_count(f"model.delta.{key}", getattr(self, key))
        keys, values, chunk = self.num_key_heads, self.num_value_heads, self.chunk
        if values % keys:
            fits = [n for n in range(1, values + 1) if values % n == 0]
            raise ValueError(
                f"model.delta.num_key_heads={keys} must divide model.delta.num_value_heads={values}; "
                f"use one of {fits}"
            )
        require(chunk >= 1 and chunk & (chunk - 1) == 0, "model.delta.chunk", chunk, "a power of two; use 64")


@dataclass
class RopeScaling:
    """Rotary positions stretched over texts `factor` times as long as the `original_length` before.

    Of longrope's two lists a model takes the long one where `model.max_seq_len` is above `original_length`,
    and the short one else, for texts of any length: numbers hang neither on a text's length nor on what it
    is padded to, and no cache has to be made again in the middle of a text.
    """

    kind: str = "linear"  # linear | llama3 | yarn (arXiv:2309.00071) | longrope (arXiv:2402.13753)
    factor: float = 1.0  # how many times longer
    original_length: int = 8192  # tokens, before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn and longrope, on the waves; null: as `amplitude` says
    truncate: bool = True  # yarn: the ramp's ends are whole planes
    short_factor: list[float] = field(default_factory=list)  # longrope: how much slower each plane turns
    long_factor: list[float] = field(default_factory=list)  # the same, of models for longer texts

    def __post_init__(self) -> None:
        choice("model.rope_scaling.kind", self.kind, ROPE_SCALINGS)
        for key in ("factor", "original_length", "low_freq_factor", "beta_fast", "beta_slow"):
            _check_positive(f"model.rope_scaling.{key}", getattr(self, key))
        if self.attention_factor is not None:
            _check_positive("model.rope_scaling.attention_factor", self.attention_factor, "null for its own")
        for key, (kinds, default) in OF_KINDS.items():
            if self.kind not in kinds and getattr(self, key) != default:
                raise ValueError(
                    f"model.rope_scaling.{key} is of {' and '.join(kinds)}, not of {self.kind}; leave it out"
                )
        if self.kind == "longrope":
            self._check_planes()
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and not low < high:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={low} must be below "
                f"model.rope_scaling.high_freq_factor={high}; Llama 3 has 1 and 4"
            )

    def _check_planes(self) -> None:
        ok = self.original_length > 1  # its logarithm divides
        require(ok, "model.rope_scaling.original_length", self.original_length, "above 1; use 4096")
        for key in ("short_factor", "long_factor"):
            values = getattr(self, key)
            count, wanted = len(values), len(self.short_factor)
            if not count or count != wanted:
                raise ValueError(
                    f"model.rope_scaling.{key} has {count} numbers, and short_factor {wanted}; "
                    "longrope needs one a plane in each"
                )
            for value in values:
                _check_positive(f"model.rope_scaling.{key}", value)

    @property
    def amplitude(self) -> float:
        """The factor on rotated vectors, which makes up for what softmax loses over longer texts."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1.0 + math.log(max(self.factor, 1.0)) / math.log(self.original_length))


@dataclass
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437) by extra layers after the last."""

    depth: int = 1  # further tokens
    weight: float = 0.1  # of their mean loss, beside that of the next token
    normed_stream: bool = True  # read behind the final norm, as published weights are; false: as old runs did

    def __post_init__(self) -> None:
        _check_count("model.mtp.depth", self.depth, "1, or model.mtp=null for none")
        ok = 0 <= self.weight < float("inf")
        require(ok, "model.mtp.weight", self.weight, "0 or more, such as 0.1")


@dataclass
class MultipliersConfig:
    """What the stream is multiplied by on its way (Granite 3): constants, no parameters."""

    embedding: float = 1.0  # embeddings, as they enter the stream
    residual: float = 1.0  # what attention and the feed-forward add to it
    logits: float = 1.0  # logits are divided by this

    def __post_init__(self) -> None:
        for key in ("embedding", "residual", "logits"):
            _check_positive(f"model.multipliers.{key}", getattr(self, key), "1.0 to switch it off")


@dataclass
class ModelConfig:
    """Shape and features of the model; sizes in elements, angles in radians, initial spread as a deviation.

    `vocab_size=-1` takes the tokenizer's size, rounded up by `padded_vocab`.
    `window_pattern` is the repeating order of layer kinds: `["local", "global"]` is Gemma 2, `["global"]` is
    Llama; it may list every layer. A `nope` layer is global, and neither queries nor keys are rotated in it.
    `max_seq_len` is the rows of a learned position table; with RoPE it only says what was trained, but for
    longrope, which by it takes one of its two lists.
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
    post_norms: bool | str = False  # true: norms after both halves too (Gemma 2) | only: none before (OLMo 2)
    bias: bool = False  # GPT-2: a bias on every projection and norm
    qkv_bias: bool = False  # Qwen 2
    biases: list[str] = field(default_factory=list)  # further ones: o | mlp | norm | experts
    qk_norm: bool | str = False  # Qwen 3, Gemma 3: true, a head at a time | OLMo 2: joint, over all heads
    position: str = "rope"  # rope | learned | none
    rope_theta: float = 10000.0  # base of the rotation frequencies
    rope_local_theta: float | None = None  # Gemma 3: of local layers, which are then not scaled either
    rope_fraction: float = 1.0  # the first share of a head that rotates; Qwen3-Next: 0.25
    rope_scaling: RopeScaling | None = None  # stretched over longer texts; null: as trained
    activation: str = "swiglu"  # swiglu | geglu | gelu | relu2 | clamped_swiglu (GPT-OSS)
    window: int | None = None  # positions a local layer sees, itself included
    window_pattern: list[str] = field(default_factory=lambda: ["global"])
    mixer_pattern: list[str] | None = None  # the repeating order of token mixers; null: attention throughout
    attention_softcap: float | None = None  # Gemma 2: 50, on attention scores
    logit_softcap: float | None = None  # Gemma 2: 30, on logits
    attention_sinks: bool = False  # GPT-OSS: one learned logit a head, which takes weight and gives nothing
    output_gate: bool = False  # Qwen3-Next: attention's output times the sigmoid of a further projection
    attention_scale: float | None = None  # None: head_dim ** -0.5
    embed_scale: bool = False  # Gemma: embeddings times sqrt(d_model)
    multipliers: MultipliersConfig | None = None  # of embeddings, residuals, logits (Granite); null: none
    tie_embeddings: bool = True  # the head is the embedding table
    zero_init: bool = False  # projections back into the residual start at zero
    init_std: float = 0.02  # spread of what no other rule covers
    moe: MoEConfig | None = None  # a mixture of experts instead of one feed-forward; null: dense
    mla: MLAConfig | None = None  # latent attention instead of grouped heads; null: grouped heads
    delta: DeltaConfig | None = None  # sizes of the gated delta rule; null: no layer has it
    mtp: MTPConfig | None = None  # DeepSeek-V3: predict further tokens as well; null: the next one alone

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies by a gate."""
        return self.activation in ("swiglu", "geglu", "clamped_swiglu")

    def has_bias(self, place: str) -> bool:
        """Whether the projections (or norms) of a place have biases: qkv, or one of `BIASES`."""
        return self.bias or place in self.biases or (place == "qkv" and self.qkv_bias)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The repeating order of what mixes the tokens in a layer; attention is latent with `mla`."""
        latent = {"attention": "latent"} if self.mla else {}
        return tuple(latent.get(name, name) for name in self.mixer_pattern or ["attention"])

    @property
    def mtp_depth(self) -> int:
        """Further tokens that are predicted; 0 for none."""
        return self.mtp.depth if self.mtp else 0


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
    rotated = config.head_dim * config.rope_fraction
    if config.position == "rope" and (not 0 < config.rope_fraction <= 1 or rotated % 2):
        raise ValueError(
            f"model.rope_fraction={config.rope_fraction} of model.head_dim={config.head_dim} must be an even "
            "number of elements, at most all; use 1.0"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope" and 2 * len(scaling.short_factor) != rotated:
        raise ValueError(
            f"model.rope_scaling.short_factor has {len(scaling.short_factor)} numbers, and "
            f"model.head_dim={config.head_dim} with model.rope_fraction={config.rope_fraction} "
            f"{rotated / 2:g} planes; give one a plane"
        )
    if "local" in config.window_pattern and config.window is None:
        raise ValueError(
            f"model.window=null but model.window_pattern={list(config.window_pattern)} has local layers; "
            "set model.window to the positions they see"
        )
    _check_norms_and_biases(config)
    _check_parts(config)


EARLIER = {"rope_scaling": ("rope_", RopeScaling), "mtp": ("mtp_", MTPConfig)}
# What runs had before there was a key for it, where that is not the key's default.
UNTOLD = {"mtp": {"normed_stream": False}}


def regrouped(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config that any version stored, its keys as they are named now.

    Of keys that have come into being since only those of `UNTOLD` are filled in: others had their default.
    """
    now = dict(model)
    for group, (prefix, kind) in EARLIER.items():
        names = [f.name for f in fields(kind) if f"{prefix}{f.name}" in model]
        values = {name: now.pop(f"{prefix}{name}") for name in names}
        if group == "rope_scaling" and values:
            values["kind"] = now.pop("rope_scaling", "none")
        if values:
            off = values.get("kind") == "none" or values.get("depth") == 0
            now[group] = None if off else values
    for group, had in UNTOLD.items():
        if isinstance(now.get(group), Mapping):
            now[group] = had | dict(now[group])
    return now


def check_moe(moe: MoEConfig) -> None:
    """Raise ValueError, in one line with the remedy, for values that make no mixture."""
    for key, choices in (("score", SCORES), ("dispatch", DISPATCHES)):
        choice(f"model.moe.{key}", getattr(moe, key), choices)
    for key in ("num_experts", "experts_per_token", "d_expert", "num_groups", "groups_per_token"):
        _check_count(f"model.moe.{key}", getattr(moe, key))
    for key in ("num_shared_experts", "first_dense_layers", *MOE_WEIGHTS):
        value = getattr(moe, key)
        require(0 <= value < float("inf"), f"model.moe.{key}", value, "0 (off) or more")
    for key in ("capacity_factor", "gate_scale"):
        _check_positive(f"model.moe.{key}", getattr(moe, key))
    for name in moe.layer_pattern:
        choice("model.moe.layer_pattern", name, FEED_FORWARDS)
    if moe.first_dense_layers and "mlp" in moe.layer_pattern:
        raise ValueError(
            f"model.moe.first_dense_layers={moe.first_dense_layers} and mlp in model.moe.layer_pattern both "
            "say which layers are dense; use model.moe.first_dense_layers=0 and list every layer"
        )
    experts, groups, chosen = moe.num_experts, moe.num_groups, moe.groups_per_token
    if experts % groups:
        fits = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ValueError(f"model.moe.num_groups={groups} must divide model.moe.num_experts={experts}: {fits}")
    if chosen > groups:
        raise ValueError(
            f"model.moe.groups_per_token={chosen} is more than model.moe.num_groups={groups}; "
            f"use at most {groups}"
        )
    is_open = experts // groups * chosen
    if moe.experts_per_token > is_open:
        raise ValueError(
            f"model.moe.experts_per_token={moe.experts_per_token} is more than the {is_open} "
            "experts open to a token; lower it, or raise model.moe.num_experts or model.moe.groups_per_token"
        )


def _check_norms_and_biases(config: ModelConfig) -> None:
    """Norms and biases against each other, and against what the model has."""
    for key, more in (("post_norms", "only"), ("qk_norm", "joint")):
        value = getattr(config, key)
        require(value in (False, True, more), f"model.{key}", value, f"false, true or {more}")
    for place in config.biases:
        choice("model.biases", place, BIASES)
    if "norm" in config.biases and config.norm != "layernorm":
        raise ValueError(
            f"model.biases has norm, and model.norm={config.norm} has none; use model.norm=layernorm"
        )
    if "experts" in config.biases and (config.moe is None or config.moe.dispatch != "dropless"):
        raise ValueError("model.biases has experts, which needs model.moe with model.moe.dispatch=dropless")
    if "nope" in config.window_pattern and config.position != "rope":
        raise ValueError(f"model.window_pattern has nope, and model.position={config.position}; use global")


def _check_parts(config: ModelConfig) -> None:
    """Experts, latent attention and further tokens against the rest of the model."""
    moe, mla = config.moe, config.mla
    if moe is not None and moe.first_dense_layers >= config.num_layers:
        raise ValueError(
            f"model.moe.first_dense_layers={moe.first_dense_layers} leaves no layer of "
            f"model.num_layers={config.num_layers} with experts; use at most {config.num_layers - 1}, "
            "or model.moe=null"
        )
    if moe is not None and "experts" not in moe.layer_pattern[: config.num_layers]:
        raise ValueError(
            f"model.moe.layer_pattern={list(moe.layer_pattern)} leaves no layer of "
            f"model.num_layers={config.num_layers} with experts; use [experts], or model.moe=null"
        )
    if moe is not None and "mlp" in moe.layer_pattern and config.mtp is not None:
        raise ValueError(
            "model.moe.layer_pattern with mlp cannot be had with model.mtp; use model.mtp=null, or "
            "model.moe.first_dense_layers"
        )
    if moe is not None and config.bias:
        raise ValueError("model.bias=true has no biases for experts; use model.bias=false with model.moe")
    if config.mtp_depth >= config.max_seq_len:
        raise ValueError(
            f"model.mtp.depth={config.mtp_depth} must be below model.max_seq_len={config.max_seq_len}; use 1"
        )
    if config.mtp is not None and config.multipliers is not None:
        raise ValueError("model.multipliers cannot be had with model.mtp; use model.mtp=null")
    if moe is not None and moe.shared_gate and not moe.num_shared_experts:
        raise ValueError(
            "model.moe.shared_gate=true needs shared experts; use model.moe.num_shared_experts=1, or false"
        )
    if mla is None:
        return
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        raise ValueError("model.rope_scaling.kind=longrope cannot be had with model.mla; use yarn")
    if "nope" in config.window_pattern:
        raise ValueError("model.window_pattern has nope layers, which model.mla has not; use global")
    if "o" in config.biases:
        raise ValueError("model.biases has o, which model.mla has not; leave it out")
    size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if config.head_dim != size:
        raise ValueError(
            f"model.head_dim={config.head_dim} must be model.mla.qk_nope_head_dim + qk_rope_head_dim; "
            f"use {size}"
        )
    if config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"model.num_kv_heads={config.num_kv_heads} must be model.num_heads={config.num_heads}: "
            "with model.mla each head has keys of its own"
        )
    plain: dict[str, Any] = {"position": "rope", "qk_norm": False, "qkv_bias": False, "bias": False}
    plain |= {"rope_fraction": 1.0, "output_gate": False, "attention_sinks": False}
    for key, wanted in plain.items():
        value = getattr(config, key)
        if value != wanted:
            raise ValueError(
                f"model.{key}={str(value).lower()} cannot be had with model.mla; "
                f"use model.{key}={str(wanted).lower()}"
            )


def _check_count(key: str, value: int, remedy: str = "a positive number") -> None:
    require(value >= 1, key, value, f"above 0; use {remedy}")


def _check_positive(key: str, value: float | int, remedy: str = "a positive number") -> None:
    require(0 < value < float("inf"), key, value, f"above 0; use {remedy}")


MOE_WEIGHTS = ("load_balance_weight", "router_z_weight", "bias_update_rate")


def _check_choices(config: ModelConfig) -> None:
    kinds = {"norm": NORMS, "position": POSITIONS, "activation": ACTIVATIONS}
    for key, choices in kinds.items():
        choice(f"model.{key}", getattr(config, key), choices)
    pattern = list(config.window_pattern)
    if not pattern or any(kind not in WINDOW_KINDS for kind in pattern):
        raise ValueError(
            f"model.window_pattern={pattern} must list at least one of {', '.join(WINDOW_KINDS)}"
        )
    for name in config.mixer_pattern or ():
        choice("model.mixer_pattern", name, MIXERS)
    if config.mixer_pattern is not None and not config.mixer_pattern:
        raise ValueError(f"model.mixer_pattern=[] must list at least one of {', '.join(MIXERS)}, or be null")
    for name, group in (("latent", "mla"), ("gated_delta", "delta")):
        if name in config.mixers and getattr(config, group) is None:
            raise ValueError(
                f"model.mixer_pattern has {name} layers but model.{group}=null; give model.{group} its sizes"
            )


SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len")
POSITIVE = ("rope_theta", "norm_eps", "init_std")
POSITIVE_OR_NULL = ("window", "rope_local_theta", "attention_softcap", "logit_softcap", "attention_scale")


def _check_numbers(config: ModelConfig) -> None:
    for key in SIZES + POSITIVE + POSITIVE_OR_NULL:
        value = getattr(config, key)
        if value is None and key in POSITIVE_OR_NULL:
            continue
        _check_positive(
            f"model.{key}",
            value,
            "null to switch it off" if key in POSITIVE_OR_NULL else "a positive number",
        )
    if config.vocab_size != -1 and config.vocab_size < 1:
        raise ValueError(
            f"model.vocab_size={config.vocab_size} must be positive, or -1 for the tokenizer's size"
        )
