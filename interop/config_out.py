"""A ModelConfig as a `config.json` of Hugging Face's layout: the way back of `interop.configs`.

A family can hold a model where what is written reads back as the same model, so that no second list says what
each of them supports.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from interop.configs import ACTIVATIONS, COMMON, FAMILIES, GPT2, Family, read_config
from models.config import BIASES, ModelConfig, MultipliersConfig, RopeScaling
from models.spec import make_segments


def write_config(config: ModelConfig, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The config.json of a model, and the family that it goes out as: `name`, or the first that can hold it.

    A family can hold a model when what is written reads back as the same model. ValueError where none does.
    """
    reasons: dict[str, str] = {}
    for family in tuple(FAMILIES.values()) if name is None else [FAMILIES[name]]:
        values = _their_values(config, family)
        try:
            back, _ = read_config(values)
        except ValueError as error:
            reasons[family.name] = str(error)
            continue
        differs = difference(config, back)
        if not differs and not _refused_there(config, family):
            return family, values
        reasons[family.name] = differs or _refused_there(config, family)
    one = name or config.name if (name or config.name) in reasons else next(iter(reasons))
    raise ValueError(f"no class of transformers computes this model; {one} fails by {reasons[one]}")


# Of a model these say nothing about its function from tokens to logits.
FREE = {"name", "zero_init", "init_std", "max_seq_len", "mtp"}
FREE_OF_EXPERTS = {
    "load_balance_weight",
    "router_z_weight",
    "bias_update_rate",
    "dispatch",
    "capacity_factor",
}


def difference(ours: ModelConfig, back: ModelConfig) -> str:
    """The first key in which two models differ in what they compute, or nothing."""
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(back, field.name)
        if field.name == "moe" and a is not None and b is not None:
            if (a.selection_bias or a.bias_update_rate > 0) != (b.selection_bias or b.bias_update_rate > 0):
                return "model.moe.selection_bias"
            if (dense := _dense_layers(ours)) != _dense_layers(back):
                return f"layers {dense} having no experts (model.moe.layer_pattern={a.layer_pattern})"
            same = {key: getattr(a, key) for key in FREE_OF_EXPERTS | {"selection_bias", *DENSE}}
            b = dataclasses.replace(b, **same)
        if field.name == "d_ff" and not _dense_layers(ours):
            continue
        if field.name == "mla" and a is not None and b is not None and a.norm_eps is None:
            a = dataclasses.replace(a, norm_eps=ours.norm_eps)
        if field.name in ("bias", "qkv_bias", "biases"):
            a, b = ([place for place in PLACES if _biased(model, place)] for model in (ours, back))
        if field.name == "attention_scale":
            a, b = (ours.head_dim**-0.5 if x is None else x for x in (a, b))
            if math.isclose(a, b, rel_tol=1e-9):
                continue
        if field.name == "window_pattern":
            a, b = (_every_layer(model) for model in (ours, back))
        if field.name == "rope_scaling":
            a, b = (_stretched(model) for model in (ours, back))
        if field.name == "mixer_pattern":
            a, b = (_every_mixer(model) for model in (ours, back))
        if field.name == "delta" and a is not None and b is not None:
            b = dataclasses.replace(b, chunk=a.chunk)
        if field.name == "window" and "local" not in ours.window_pattern:
            continue
        if field.name not in FREE and a != b:
            return f"model.{field.name}={a}"
    return ""


DENSE = ("first_dense_layers", "layer_pattern")  # two ways to say the same
PLACES = ("qkv", *BIASES)


def _biased(config: ModelConfig, place: str) -> bool:
    """Whether there are biases in a place, as far as the model has it."""
    there = {"norm": config.norm == "layernorm", "experts": config.moe is not None}
    return there.get(place, True) and config.has_bias(place)


def _stretched(config: ModelConfig) -> Any:
    """How rotations are stretched; longrope's factor says no more than its amplitude and its list do."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return scaling
    is_long = config.max_seq_len > scaling.original_length
    return dataclasses.replace(scaling, factor=1.0, attention_factor=scaling.amplitude), is_long


def _dense_layers(config: ModelConfig) -> list[int]:
    """The layers that have no experts."""
    specs = [spec for s in make_segments(config) for spec in s.period * s.count]
    return [n for n, spec in enumerate(specs) if not spec.moe]


def _every_mixer(config: ModelConfig) -> list[str]:
    return [config.mixers[n % len(config.mixers)] for n in range(config.num_layers)]


def _every_layer(config: ModelConfig) -> list[str]:
    pattern = list(config.window_pattern)
    return [pattern[n % len(pattern)] for n in range(config.num_layers)]


def _refused_there(config: ModelConfig, family: Family) -> str:
    """Why the class itself would refuse a model that its config can say."""
    strict = ("llama", "gemma2", "gemma3_text", "vaultgemma", "arcee", "deepseek_v2", "granite", "jais2")
    of_width = family.name == "stablelm" or (family.name == "phi3" and config.rope_scaling is not None)
    if of_width and config.num_heads * config.head_dim != config.d_model:
        return f"model.head_dim={config.head_dim} not being model.d_model / model.num_heads"
    if family.name == "olmo3" and config.rope_scaling is not None and config.rope_theta != family.theta:
        return f"model.rope_theta={config.rope_theta} of stretched layers, {family.theta:g} of windows"
    if family.name in strict and config.d_model % config.num_heads:
        return f"model.d_model={config.d_model} not being a multiple of model.num_heads={config.num_heads}"
    return ""


def _their_values(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What a family would call the values of this model; whether that is all of it is for reading to say."""
    gpt2 = family.name == "gpt2"
    values: dict[str, Any] = {"model_type": family.name, "architectures": [family.architecture]}
    values |= {theirs: getattr(config, ours) for theirs, ours in (GPT2 if gpt2 else COMMON).items()}
    values["tie_word_embeddings"] = config.tie_embeddings
    if gpt2:
        return values | {"n_inner": config.d_ff, "activation_function": "gelu_new"}
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}
    names["clamped_swiglu"] = "silu"
    act = "gelu_pytorch_tanh" if config.activation == "gelu" else names[config.activation]
    values |= {
        "hidden_act": act,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.eps_key: config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _their_scaling(config),
    }
    if family.name in ("gemma", "gemma2", "gemma3_text", "vaultgemma"):
        values["hidden_activation"] = act
    if family.partial is not None:
        values["partial_rotary_factor"] = config.rope_fraction
    values = {name: value for name, value in values.items() if value is not None}
    # Null is a value here: a class has numbers of its own for what is not said, such as a token of padding
    # that a small vocabulary lacks.
    values["pad_token_id"] = None
    for write in _WRITERS.get(family.name, ()):
        values |= write(config)
    return values


def _their_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "longrope":
        return _their_longrope(scaling, config.max_seq_len)
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        found |= {} if scaling.truncate else {"truncate": False}
        if scaling.attention_factor is not None:
            found["attention_factor"] = scaling.attention_factor
        if config.mla is not None:
            unit = 1.0 if scaling.attention_factor else 0.1 * math.log(scaling.factor) + 1.0
            share = (
                math.sqrt((config.attention_scale or config.head_dim**-0.5) / config.head_dim**-0.5) * unit
            )
            x = (share - 1.0) / (0.1 * math.log(scaling.factor))
            found |= {"mscale_all_dim": x} if scaling.attention_factor else {"mscale": x, "mscale_all_dim": x}
    return found


def _their_longrope(scaling: RopeScaling, length: int) -> dict[str, Any]:
    """Three keys, of which transformers 4 knows no more; a fourth where the waves' factor does not follow."""
    found: dict[str, Any] = {"type": "longrope"}
    found |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    own = dataclasses.replace(scaling, factor=length / scaling.original_length, attention_factor=None)
    return found | ({} if own.amplitude == scaling.amplitude else {"attention_factor": scaling.amplitude})


def _phi3_values(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    found = {} if scaling is None else {"original_max_position_embeddings": scaling.original_length}
    return {**_one_window(config), **found}


KINDS = {"local": "sliding_attention", "global": "full_attention", "nope": "full_attention"}


def _kinds(config: ModelConfig) -> dict[str, Any]:
    """Every layer's kind, also where there is one alone, and the window."""
    found = {"layer_types": [KINDS[kind] for kind in _every_layer(config)]}
    return {**found, "sliding_window": config.window if "local" in config.window_pattern else None}


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    if config.window is None or "local" not in config.window_pattern:
        return {"sliding_window": None}
    return _kinds(config)


def _one_window(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.window if "local" in config.window_pattern else None}


def _used_window(config: ModelConfig) -> dict[str, Any]:
    found = _layer_types(config)
    return found | {"use_sliding_window": found["sliding_window"] is not None}


def _gemma_values(config: ModelConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        **_layer_types(config),
        # A whole number where it is one: classes check the type.
        "query_pre_attn_scalar": round(scale**-2) if math.isclose(scale**-2, round(scale**-2)) else scale**-2,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _gemma3_values(config: ModelConfig) -> dict[str, Any]:
    return {**_gemma_values(config), "rope_local_base_freq": config.rope_local_theta or config.rope_theta}


def _latent_values(config: ModelConfig) -> dict[str, Any]:
    if config.mla is None:
        return {}
    found = dataclasses.asdict(config.mla)
    found.pop("norm_eps")
    return {**found, "head_dim": config.mla.qk_rope_head_dim}


def _further_tokens(config: ModelConfig) -> dict[str, Any]:
    return {"num_nextn_predict_layers": config.mtp_depth}


def _expert_values(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"first_k_dense_replace": config.num_layers}
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "n_shared_experts": moe.num_shared_experts,
        "first_k_dense_replace": moe.first_dense_layers,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "norm_topk_prob": moe.normalize_gates,
        "routed_scaling_factor": moe.gate_scale,
    }


def _qwen_expert_values(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.normalize_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(config),
    }


def _gated_shared_values(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None:
        return {"num_experts": 0, "mlp_only_layers": list(range(config.num_layers))}
    width = config.moe.num_shared_experts * config.moe.d_expert
    return {**_qwen_expert_values(config), "shared_expert_intermediate_size": width}


def _plain_expert_values(config: ModelConfig) -> dict[str, Any]:
    """Experts as wide as what is called the feed-forward there."""
    moe = config.moe
    if moe is None:
        return {}
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.normalize_gates,
    }


def _local_expert_values(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None:
        return {}
    found = _plain_expert_values(config)
    found["num_local_experts"] = found.pop("num_experts")
    found.pop("norm_topk_prob")
    return found


def _granite_shared_values(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {} if moe is None else {"shared_intermediate_size": moe.num_shared_experts * moe.d_expert}


def _ernie_expert_values(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    return {
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "moe_num_shared_experts": moe.num_shared_experts,
        "moe_layer_start_index": moe.first_dense_layers,
        "moe_layer_end_index": config.num_layers - 1,
    }


def _multiplier_values(config: ModelConfig) -> dict[str, Any]:
    m = config.multipliers or MultipliersConfig()
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        "embedding_multiplier": m.embedding,
        "residual_multiplier": m.residual,
        "logits_scaling": m.logits,
        "attention_multiplier": scale,
    }


def _mixtral_values(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None:
        return {}
    return {**_one_window(config), **_local_expert_values(config)}


def _glm_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm,
    }


def _delta_values(config: ModelConfig) -> dict[str, Any]:
    if config.delta is None:
        return {}
    names = {"gated_delta": "linear_attention", "attention": "full_attention"}
    pattern = config.mixers
    d = config.delta
    return {
        "layer_types": [names.get(pattern[n % len(pattern)], "?") for n in range(config.num_layers)],
        "linear_num_key_heads": d.num_key_heads,
        "linear_num_value_heads": d.num_value_heads,
        "linear_key_head_dim": d.key_head_dim,
        "linear_value_head_dim": d.value_head_dim,
        "linear_conv_kernel_dim": d.conv_width,
    }


def _attention_bias(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.has_bias("qkv") and config.has_bias("o")}


def _biases(config: ModelConfig) -> dict[str, Any]:
    return {**_attention_bias(config), "mlp_bias": config.has_bias("mlp")}


def _query_bias(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.has_bias("qkv")}


def _rotated_layers(config: ModelConfig) -> dict[str, Any]:
    return {"no_rope_layers": [int(kind != "nope") for kind in _every_layer(config)]}


Writer = Callable[[ModelConfig], dict[str, Any]]
_WRITERS: dict[str, tuple[Writer, ...]] = {
    "llama": (_biases,),
    "arcee": (_biases,),
    "mistral": (_one_window,),
    "qwen2": (_used_window,),
    "qwen3": (_used_window,),
    "qwen3_moe": (_used_window, _qwen_expert_values),
    "seed_oss": (_query_bias,),
    "ministral": (_kinds,),
    "smollm3": (_biases, _rotated_layers),
    "granite": (_biases, _multiplier_values),
    "olmo2": (_attention_bias,),
    "olmo3": (_attention_bias, _kinds),
    "exaone4": (_kinds,),
    "glm": (_query_bias,),
    "glm4": (_query_bias,),
    "helium": (_biases, _query_bias),
    "stablelm": (lambda config: {"use_qkv_bias": config.has_bias("qkv")},),
    "nemotron": (_biases,),
    "jais2": (_biases,),
    "vaultgemma": (_gemma_values,),
    "qwen2_moe": (_used_window, _gated_shared_values, lambda config: {"qkv_bias": config.has_bias("qkv")}),
    "olmoe": (_attention_bias, _plain_expert_values),
    "flex_olmo": (_attention_bias, _plain_expert_values),
    "granitemoe": (_attention_bias, _multiplier_values, _local_expert_values),
    "granitemoeshared": (
        _attention_bias,
        _multiplier_values,
        _local_expert_values,
        _granite_shared_values,
    ),
    "gpt_oss": (_attention_bias, _kinds, _local_expert_values),
    "ernie4_5_moe": (_ernie_expert_values,),
    "minimax_m2": (_local_expert_values,),
    "qwen3_5_text": (_delta_values,),
    "qwen3_5_moe_text": (_delta_values, _gated_shared_values),
    "phi3": (_phi3_values,),
    "gemma2": (_gemma_values,),
    "gemma3_text": (_gemma3_values,),
    "starcoder2": (_one_window, lambda config: {"use_bias": True}),
    "mixtral": (_mixtral_values,),
    "dots1": (_layer_types, _expert_values),
    "glm4_moe": (_expert_values, _glm_values, _further_tokens),
    "qwen3_next": (_delta_values, _gated_shared_values),
    "deepseek_v2": (_latent_values, _expert_values),
    "deepseek_v3": (_latent_values, _expert_values, _further_tokens),
    "kimi_k2": (_latent_values, _expert_values, _further_tokens),
}
