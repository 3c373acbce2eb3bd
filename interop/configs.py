"""`config.json` of Hugging Face's layout to and from a ModelConfig.

Whatever key changes the mathematics and is not understood is refused by its name: a conversion that ignores
one gives another model, and nothing says so. So a key is read here, or it is on the list of those that change
nothing. Both spellings of rotary settings are read, those of transformers 4 and of 5; what is written is the
former, which both understand.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from common.checks import did_you_mean
from interop import families
from interop.families import Rules
from models.config import DeltaConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeScaling

# Keys that say nothing of the function from tokens to logits: dropout is for training, and so are the
# coefficients of routers' losses; the rest is about files, caches and how a text is begun and ended.
HARMLESS = set(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path bos_token_id eos_token_id
    pad_token_id sep_token_id unk_token_id decoder_start_token_id use_cache initializer_range
    attention_dropout
    hidden_dropout attn_pdrop embd_pdrop resid_pdrop residual_dropout embedding_dropout hidden_dropout_prob
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise pretraining_tp
    cache_implementation gradient_checkpointing summary_type summary_use_proj summary_activation
    summary_first_dropout summary_proj_to_labels task_specific_params n_ctx auto_map ep_size output_attentions
    output_hidden_states return_dict is_encoder_decoder chunk_size_feed_forward id2label label2id
    use_mla attn_implementation _attn_implementation problem_type tokenizer_class
    reorder_and_upcast_attn initializer_factor
    _sliding_window_pattern
    """.split()
)
COMMON = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
}
GPT2 = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_embd": "d_model",
    "n_head": "num_heads",
    "n_positions": "max_seq_len",
    "layer_norm_epsilon": "norm_eps",
}
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "gelu",
    "relu2": "relu2",
}


class Keys:
    """The keys of a config.json, each of which must be asked for, or be harmless."""

    def __init__(self, values: Mapping[str, Any]):
        self.values, self.asked = dict(values), set(HARMLESS)

    def get(self, name: str, default: Any = None) -> Any:
        """A value, where null is as good as absent."""
        self.asked.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuse a value that changes what is computed; the first of those allowed is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            shown = " or ".join(str(one).lower() for one in allowed)
            raise ValueError(f"config.json: {name}={value} is not supported; only {shown} is")

    def check_all_read(self) -> None:
        """Refuse what nobody has asked for: it may change what is computed."""
        strange = sorted(name for name in self.values if name not in self.asked)
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise ValueError(
                f"config.json: {strange[0]}={self.values[strange[0]]!r}{more} is not understood, and may "
                "change what the model computes"
            )


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model_type is: how its config is read, what its parameters are called, and how it is written."""

    name: str  # model_type
    architecture: str
    rules: Callable[[ModelConfig], Rules]
    features: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # of ModelConfig, whatever the file says
    read: Callable[[Keys, dict[str, Any]], None] = lambda keys, model: None
    tied: bool = False  # where the file says nothing
    eps: float = 1e-6  # the same
    head_dim: int | None = None  # the same
    activation: str = "silu"  # the same


def read_config(values: Mapping[str, Any]) -> tuple[ModelConfig, Family]:
    """The model that a config.json describes, and its family. ValueError, by key, else."""
    text = values.get("text_config")
    if isinstance(text, Mapping):  # a model of images too, whose text part is what we take
        values = {"model_type": f"{values.get('model_type')}_text", **text}
    name = str(values.get("model_type"))
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type={name} is not supported; {did_you_mean(name, FAMILIES)}")
    family, keys = FAMILIES[name], Keys(values)
    keys.must_be("quantization_config", None)
    keys.must_be("use_bidirectional_attention", False)
    model: dict[str, Any] = {"name": name}
    for theirs, ours in (GPT2 if name == "gpt2" else COMMON).items():
        value = keys.get(theirs)
        if value is not None:
            model[ours] = value
    model["tie_embeddings"] = bool(keys.get("tie_word_embeddings", family.tied))
    if name != "gpt2":
        _read_decoder(keys, family, model)
    model |= family.features
    family.read(keys, model)
    if model.pop("rope", True) and model.get("position", "rope") == "rope":
        _read_rope(keys, model)
    keys.check_all_read()
    return ModelConfig(**model), family


def _read_decoder(keys: Keys, family: Family, model: dict[str, Any]) -> None:
    heads = model["num_heads"]
    model["num_kv_heads"] = keys.get("num_key_value_heads", heads)
    model["head_dim"] = keys.get("head_dim", family.head_dim or model["d_model"] // heads)
    model["norm_eps"] = keys.get("rms_norm_eps", keys.get("norm_epsilon", family.eps))
    name = keys.get("hidden_activation", keys.get("hidden_act", family.activation))
    keys.get("hidden_act")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act={name} is not supported; use one of {', '.join(ACTIVATIONS)}"
        )
    model["activation"] = ACTIVATIONS[name]


def _read_rope(keys: Keys, model: dict[str, Any]) -> None:
    """Base and stretching of the rotation: `rope_theta` and `rope_scaling`, or `rope_parameters`."""
    found = keys.get("rope_parameters", {})
    fraction = keys.get("partial_rotary_factor", found.get("partial_rotary_factor"))
    default = model.pop("fraction", 1.0)
    model["rope_fraction"] = float(default if fraction is None else fraction)
    if model["rope_fraction"] != 1.0 and model["name"] not in ("qwen3_next", "glm4_moe"):
        # Others cut the pairs elsewhere, or turn them in another order.
        raise ValueError(f"config.json: partial_rotary_factor={fraction} is not supported; only 1 is")
    if "full_attention" in found:  # by kind of layer, as Gemma 3 has it
        local = found.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"config.json: rope_type={local['rope_type']} of sliding layers is not supported"
            )
        model["rope_local_theta"] = local.get("rope_theta", 10000.0)
        found = found["full_attention"]
    scaling = dict(keys.get("rope_scaling", found) or {})
    theta = keys.get(
        "rope_theta", scaling.pop("rope_theta", found.get("rope_theta", model.pop("theta", 10000.0)))
    )
    model.pop("theta", None)
    model["rope_theta"] = float(theta)
    if (local := keys.get("rope_local_base_freq")) is not None:
        model["rope_local_theta"] = float(local)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    scaling.pop("partial_rotary_factor", None)
    if kind == "default":
        return
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"config.json: rope_type={kind} is not supported; use linear, llama3 or yarn")
    names = {"factor": "factor", "original_max_position_embeddings": "original_length"}
    names |= {name: name for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")}
    length = model.get("max_seq_len", 2048)
    values = {names[key]: value for key, value in scaling.items() if key in names and value is not None}
    if kind == "yarn":
        values.setdefault("original_length", length)
        _check_yarn(scaling, float(values["factor"]), model)
    model["rope_scaling"] = RopeScaling(kind=kind, **values)


def _check_yarn(scaling: Mapping[str, Any], factor: float, model: dict[str, Any]) -> None:
    """Our YaRN multiplies waves by 0.1 ln(factor) + 1, or with latent attention scores by its square."""

    def stretch(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    if scaling.get("truncate", True) is not True:
        raise ValueError("config.json: rope_scaling.truncate=false is not supported; only true is")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if model.get("mla"):
        if not all_dim or mscale != all_dim:
            raise ValueError(
                f"config.json: rope_scaling.mscale={mscale}, mscale_all_dim={all_dim} must be equal and set"
            )
        wanted = model["head_dim"] ** -0.5 * (stretch(all_dim) / stretch(1.0)) ** 2
        model["attention_scale"] = None if all_dim == 1.0 else wanted
        return
    given = scaling.get("attention_factor")
    if given is None and mscale and all_dim:
        given = stretch(mscale) / stretch(all_dim)
    if given is not None and not math.isclose(given, stretch(1.0), rel_tol=1e-6):
        raise ValueError(
            f"config.json: rope_scaling gives the waves a factor of {given:.6g}, and only "
            f"{stretch(1.0):.6g} is supported"
        )


# -- families ------------------------------------------------------------------------------------------------


def _windows(keys: Keys, model: dict[str, Any]) -> None:
    """`layer_types` or one window for all layers."""
    size, kinds = keys.get("sliding_window"), keys.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": "local", "full_attention": "global"}
        if not set(kinds) <= set(known):
            raise ValueError(
                f"config.json: layer_types has {sorted(set(kinds) - set(known))[0]}; not supported"
            )
        pattern = [known[kind] for kind in kinds]
        period = next(
            n for n in range(1, len(pattern) + 1) if (pattern[:n] * len(pattern))[: len(pattern)] == pattern
        )
        model["window_pattern"] = pattern[:period]
        model["window"] = size if "local" in pattern else None
    elif size is not None:
        model["window"], model["window_pattern"] = size, ["local"]


def _llama(keys: Keys, model: dict[str, Any]) -> None:
    both = {bool(keys.get(name, False)) for name in ("attention_bias", "mlp_bias")}
    if len(both) > 1:
        raise ValueError("config.json: attention_bias without mlp_bias, or the other way, is not supported")
    model["bias"] = both.pop()


def _qwen(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("attention_bias", False)
    used, size = keys.get("use_sliding_window", False), keys.get("sliding_window")
    first, kinds = keys.get("max_window_layers"), keys.get("layer_types")
    if used and size is not None and kinds is None and first is not None:
        count = model["num_layers"]
        keys.values["layer_types"] = [
            "sliding_attention" if n >= first else "full_attention" for n in range(count)
        ]
    elif not used:
        keys.values.pop("layer_types", None)
        keys.values.pop("sliding_window", None)
    _windows(keys, model)


def _qwen_moe(keys: Keys, model: dict[str, Any]) -> None:
    _qwen(keys, model)
    keys.must_be("decoder_sparse_step", 1)
    if keys.get("mlp_only_layers", []):
        raise ValueError("config.json: mlp_only_layers is not supported; only [] is")
    # Files of transformers 5 call it by the other name.
    count = keys.get("num_experts", keys.get("num_local_experts", 128))
    model["moe"] = MoEConfig(
        num_experts=count,
        experts_per_token=keys.get("num_experts_per_tok", 8),
        d_expert=keys.get("moe_intermediate_size", 768),
        normalize_gates=bool(keys.get("norm_topk_prob", False)),
    )


def _mistral(keys: Keys, model: dict[str, Any]) -> None:
    _windows(keys, model)


def _mixtral(keys: Keys, model: dict[str, Any]) -> None:
    _windows(keys, model)
    model["moe"] = MoEConfig(
        num_experts=keys.get("num_local_experts", 8),
        experts_per_token=keys.get("num_experts_per_tok", 2),
        d_expert=model["d_ff"],
    )
    model["theta"] = 1e6


def _gemma(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("attention_bias", False)
    if (scalar := keys.get("query_pre_attn_scalar")) is not None:
        model["attention_scale"] = float(scalar) ** -0.5
    model["attention_softcap"] = keys.get("attn_logit_softcapping")
    model["logit_softcap"] = keys.get("final_logit_softcapping")
    every = keys.get("sliding_window_pattern", 6 if model["name"] == "gemma3_text" else 2)
    if keys.get("layer_types") is None and model["name"] != "gemma":
        kinds = [
            "full_attention" if (n + 1) % every == 0 else "sliding_attention"
            for n in range(model["num_layers"])
        ]
        keys.values["layer_types"] = kinds
    _windows(keys, model)


def _gemma3(keys: Keys, model: dict[str, Any]) -> None:
    _gemma(keys, model)
    model.setdefault("rope_local_theta", 10000.0)
    model["theta"] = 1e6


def _gpt2(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("scale_attn_by_inverse_layer_idx", False)
    keys.must_be("scale_attn_weights", True)
    keys.must_be("add_cross_attention", False)
    name = keys.get("activation_function", "gelu_new")
    if name not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"config.json: activation_function={name} is not supported; only gelu_new is")
    heads = model["num_heads"]
    model |= {"num_kv_heads": heads, "head_dim": model["d_model"] // heads}
    model["d_ff"] = keys.get("n_inner", 4 * model["d_model"])
    model.setdefault("norm_eps", 1e-5)


def _latent(keys: Keys, model: dict[str, Any]) -> None:
    nope, rope = keys.get("qk_nope_head_dim", 128), keys.get("qk_rope_head_dim", 64)
    keys.must_be("attention_bias", False)
    keys.must_be("mlp_bias", False)
    keys.must_be("rope_interleave", True)
    model["mla"] = MLAConfig(
        q_lora_rank=keys.get("q_lora_rank"),
        kv_lora_rank=keys.get("kv_lora_rank", 512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=keys.get("v_head_dim", 128),
        norm_eps=1e-6,  # of the latents, whatever rms_norm_eps says
    )
    # What a file calls head_dim is the rotated part.
    model["head_dim"], model["num_kv_heads"] = nope + rope, model["num_heads"]
    keys.asked.add("qk_head_dim")


def _deepseek(keys: Keys, model: dict[str, Any]) -> None:
    _latent(keys, model)
    _deepseek_experts(keys, model)
    if depth := keys.get("num_nextn_predict_layers", 0):
        model["mtp"] = MTPConfig(depth=depth)


def _deepseek_experts(keys: Keys, model: dict[str, Any], score: str = "sigmoid") -> None:
    keys.must_be("scoring_func", score)
    keys.must_be("topk_method", "noaux_tc" if score == "sigmoid" else "greedy")
    keys.must_be("moe_layer_freq", 1)
    grouped, open_groups = keys.get("n_group", 1), keys.get("topk_group", 1)
    dense = keys.get("first_k_dense_replace", 0)
    if dense >= model["num_layers"]:
        return
    model["moe"] = MoEConfig(
        num_experts=keys.get("n_routed_experts", 256),
        experts_per_token=keys.get("num_experts_per_tok", 8),
        d_expert=keys.get("moe_intermediate_size", 2048),
        num_shared_experts=keys.get("n_shared_experts", 0),
        first_dense_layers=dense,
        score=score,
        normalize_gates=bool(keys.get("norm_topk_prob", score == "sigmoid")),
        gate_scale=float(keys.get("routed_scaling_factor", 1.0)),
        num_groups=grouped if score == "sigmoid" else 1,
        groups_per_token=open_groups if score == "sigmoid" else 1,
        selection_bias=score == "sigmoid",
    )


def _deepseek_v2(keys: Keys, model: dict[str, Any]) -> None:
    # The best expert of a group decides there, and the sum of two here: only ungrouped files are the same.
    keys.must_be("topk_method", "greedy")
    _latent(keys, model)
    _deepseek_experts(keys, model, "softmax")


def _dots(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("attention_bias", False)
    kinds, size = keys.get("layer_types"), keys.get("sliding_window")
    if kinds is not None or size is None:  # else it says from which layer on there are windows
        keys.asked.add("max_window_layers")
    _windows(keys, model)
    _deepseek_experts(keys, model)


def _starcoder2(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("use_bias", True)
    keys.must_be("norm_type", "layer_norm")
    keys.must_be("mlp_type", "default")
    _windows(keys, model)
    model["activation"] = "gelu"


def _phi3(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("attention_bias", False)
    keys.must_be("mlp_bias", False)
    keys.get("original_max_position_embeddings")  # of longrope alone, which is refused
    _windows(keys, model)


def _seed_oss(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("attention_out_bias", False)
    keys.must_be("mlp_bias", False)
    model["qkv_bias"] = bool(keys.get("attention_bias", True))


def _ernie(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("use_bias", False)


def _glm4_moe(keys: Keys, model: dict[str, Any]) -> None:
    model["qkv_bias"] = bool(keys.get("attention_bias", False))
    model["qk_norm"] = bool(keys.get("use_qk_norm", False))
    model["fraction"] = 0.5
    _deepseek_experts(keys, model)
    if depth := keys.get("num_nextn_predict_layers", 0):
        model["mtp"] = MTPConfig(depth=depth)


def _qwen3_next(keys: Keys, model: dict[str, Any]) -> None:
    keys.must_be("attention_bias", False)
    layers = model["num_layers"]
    count = keys.get("num_experts", keys.get("num_local_experts", 512))
    if sorted(keys.get("mlp_only_layers", [])) != list(range(layers)) and count:
        raise ValueError(
            f"config.json: num_experts={count} needs a gate on the shared expert, which is not supported; "
            "only num_experts=0 is"
        )
    every = keys.get("full_attention_interval", 4)
    default = ["full_attention" if (n + 1) % every == 0 else "linear_attention" for n in range(layers)]
    names = {"linear_attention": "gated_delta", "full_attention": "attention"}
    kinds = [names[kind] for kind in keys.get("layer_types", default)]
    period = next(n for n in range(1, layers + 1) if (kinds[:n] * layers)[:layers] == kinds)
    model["mixer_pattern"], model["fraction"] = kinds[:period], 0.25
    model["delta"] = DeltaConfig(
        num_key_heads=keys.get("linear_num_key_heads", 16),
        num_value_heads=keys.get("linear_num_value_heads", 32),
        key_head_dim=keys.get("linear_key_head_dim", 128),
        value_head_dim=keys.get("linear_value_head_dim", 128),
        conv_width=keys.get("linear_conv_kernel_dim", 4),
    )
    # Of experts, which there are none of.
    keys.asked |= {"decoder_sparse_step", "moe_intermediate_size", "shared_expert_intermediate_size"}
    keys.asked |= {"num_experts_per_tok", "norm_topk_prob", "num_local_experts"}


GEMMA = {"norm_unit_offset": True, "embed_scale": True}
POST = {**GEMMA, "post_norms": True}
LAYERNORM = {"norm": "layernorm", "bias": True}
_ALL = (
    Family("llama", "LlamaForCausalLM", families.llama, read=_llama),
    Family("mistral", "MistralForCausalLM", families.llama, read=_mistral),
    Family("qwen2", "Qwen2ForCausalLM", families.llama, {"qkv_bias": True}, _qwen),
    Family("qwen3", "Qwen3ForCausalLM", families.llama, {"qk_norm": True}, _qwen, head_dim=128),
    Family("seed_oss", "SeedOssForCausalLM", families.llama, read=_seed_oss, head_dim=128),
    Family("ernie4_5", "Ernie4_5ForCausalLM", families.ernie, read=_ernie, tied=True, eps=1e-5, head_dim=128),
    Family("arcee", "ArceeForCausalLM", families.arcee, read=_llama, eps=1e-5, activation="relu2"),
    Family("phi3", "Phi3ForCausalLM", families.phi3, read=_phi3, eps=1e-5),
    Family(
        "gemma", "GemmaForCausalLM", families.llama, GEMMA, _gemma, True,
        head_dim=256, activation="gelu_pytorch_tanh",
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", families.gemma2, POST, _gemma, True,
        head_dim=256, activation="gelu_pytorch_tanh",
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        families.gemma2,
        {**POST, "qk_norm": True},
        _gemma3,
        True,
        head_dim=256,
        activation="gelu_pytorch_tanh",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        families.gpt2,
        {**LAYERNORM, "position": "learned", "activation": "gelu"},
        _gpt2,
        True,
    ),
    Family(
        "starcoder2", "Starcoder2ForCausalLM", families.starcoder2, LAYERNORM, _starcoder2, True,
        eps=1e-5, activation="gelu_pytorch_tanh",
    ),
    Family("mixtral", "MixtralForCausalLM", families.mixtral, read=_mixtral, eps=1e-5),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", families.qwen3_moe, {"qk_norm": True}, _qwen_moe),
    Family("dots1", "Dots1ForCausalLM", families.qwen3_moe, {"qk_norm": True}, _dots),
    Family("glm4_moe", "Glm4MoeForCausalLM", families.qwen3_moe, read=_glm4_moe),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        families.qwen3_next,
        {"qk_norm": True, "norm_unit_offset": True, "output_gate": True},
        _qwen3_next,
        head_dim=256,
    ),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", families.deepseek, read=_deepseek),
    Family("kimi_k2", "DeepseekV3ForCausalLM", families.deepseek, read=_deepseek),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", families.deepseek, read=_deepseek_v2),
)  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}
