"""As `interop.config_in`, of families with experts, latent attention or the gated delta rule."""

from dataclasses import replace
from typing import Any

from interop.config_in import attention_biases, multipliers, olmo2, period_of, qwen, windows
from interop.keys import Keys
from models.config import DeltaConfig, MLAConfig, MoEConfig, MTPConfig


def qwen_moe(keys: Keys, model: dict[str, Any]) -> None:
    """Qwen 3 with experts: windows as Qwen has them."""
    qwen(keys, model)
    model["moe"] = qwen_experts(keys, model, experts=128, chosen=8, width=768)


def qwen_experts(
    keys: Keys, model: dict[str, Any], *, experts: int, chosen: int, width: int
) -> MoEConfig | None:
    """Qwen's keys for experts; None where no layer has any. The defaults are the class's."""
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    if step < 1:
        raise ValueError(f"config.json: decoder_sparse_step={step} must be 1 or more; fetch it again")
    kinds = ["mlp" if (n + 1) % step or n in dense else "experts" for n in range(model["num_layers"])]
    first = kinds.index("experts") if "experts" in kinds else len(kinds)
    # Files of transformers 5 call it by the other name.
    count = keys.get("num_experts", keys.get("num_local_experts", experts))
    keys.asked.add("num_local_experts")
    moe = {
        "experts_per_token": keys.get("num_experts_per_tok", chosen),
        "d_expert": keys.get("moe_intermediate_size", width),
        "normalize_gates": bool(keys.get("norm_topk_prob", False)),
    }
    if not count or first == len(kinds):
        return None
    if "mlp" in kinds[first:]:
        moe["layer_pattern"] = period_of(kinds)
    else:
        moe["first_dense_layers"] = first
    return MoEConfig(num_experts=count, **moe)


def gated_shared_expert(keys: Keys, moe: MoEConfig | None, width: int) -> MoEConfig | None:
    """With the shared expert that has a gate, as wide as a whole number of others."""
    width = keys.get("shared_expert_intermediate_size", width)
    if moe is None:
        return None
    if width % moe.d_expert:
        raise ValueError(
            f"config.json: shared_expert_intermediate_size={width} is not supported; only a multiple of "
            f"moe_intermediate_size={moe.d_expert} is"
        )
    return replace(moe, num_shared_experts=width // moe.d_expert, shared_gate=True)


def qwen2_moe(keys: Keys, model: dict[str, Any]) -> None:
    """Qwen 1.5 and 2 with experts, the shared one behind a gate."""
    qwen(keys, model)
    model["qkv_bias"] = bool(keys.get("qkv_bias", True))
    moe = qwen_experts(keys, model, experts=60, chosen=4, width=1408)
    model["moe"] = gated_shared_expert(keys, moe, 5632)


def mixtral(keys: Keys, model: dict[str, Any]) -> None:
    """Experts as wide as the file's feed-forward."""
    windows(keys, model)
    model["moe"] = MoEConfig(
        num_experts=keys.get("num_local_experts", 8),
        experts_per_token=keys.get("num_experts_per_tok", 2),
        d_expert=model["d_ff"],
    )


def latent(keys: Keys, model: dict[str, Any]) -> None:
    """The sizes of latent attention, and what is fixed about it."""
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


def deepseek(keys: Keys, model: dict[str, Any]) -> None:
    """Latent attention, experts, and layers for further tokens."""
    latent(keys, model)
    deepseek_experts(keys, model)
    if depth := keys.get("num_nextn_predict_layers", 0):
        model["mtp"] = MTPConfig(depth=depth)


def deepseek_experts(keys: Keys, model: dict[str, Any], score: str = "sigmoid") -> None:
    """DeepSeek's keys for experts, of which none are where all layers are dense."""
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


def deepseek_v2(keys: Keys, model: dict[str, Any]) -> None:
    """V2-Lite: latent attention, and a choice without groups."""
    # The best expert of a group decides there, and the sum of two here: only ungrouped files are the same.
    keys.must_be("topk_method", "greedy")
    latent(keys, model)
    deepseek_experts(keys, model, "softmax")


def dots(keys: Keys, model: dict[str, Any]) -> None:
    """DeepSeek's experts behind plain attention."""
    keys.must_be("attention_bias", False)
    kinds, size = keys.get("layer_types"), keys.get("sliding_window")
    if kinds is not None or size is None:  # else it says from which layer on there are windows
        keys.asked.add("max_window_layers")
    windows(keys, model)
    deepseek_experts(keys, model)


def glm4_moe(keys: Keys, model: dict[str, Any]) -> None:
    """GLM-4.5: biases, q/k norms, DeepSeek's experts and further tokens."""
    model["qkv_bias"] = bool(keys.get("attention_bias", False))
    model["qk_norm"] = bool(keys.get("use_qk_norm", False))
    deepseek_experts(keys, model)
    if depth := keys.get("num_nextn_predict_layers", 0):
        model["mtp"] = MTPConfig(depth=depth)


def qwen3_next(keys: Keys, model: dict[str, Any]) -> None:
    """The gated delta rule with experts, the shared one behind a gate."""
    qwen3_5(keys, model)
    # Qwen3.5's class knows no such key, and always divides.
    own = model["name"] == "qwen3_next"
    if not own:
        keys.values["norm_topk_prob"] = True
    elif "norm_topk_prob" not in keys.values:
        keys.values["norm_topk_prob"] = True
    moe = qwen_experts(keys, model, experts=512 if own else 256, chosen=10 if own else 8, width=512)
    model["moe"] = gated_shared_expert(keys, moe, 512)


def qwen3_5(keys: Keys, model: dict[str, Any]) -> None:
    """Layers of the gated delta rule between those of attention."""
    keys.must_be("attention_bias", False)
    keys.must_be("attn_output_gate", True)
    keys.asked |= {"mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}
    layers, every = model["num_layers"], keys.get("full_attention_interval", 4)
    default = ["full_attention" if (n + 1) % every == 0 else "linear_attention" for n in range(layers)]
    names = {"linear_attention": "gated_delta", "full_attention": "attention"}
    model["mixer_pattern"] = period_of([names[kind] for kind in keys.get("layer_types", default)])
    model["delta"] = DeltaConfig(
        num_key_heads=keys.get("linear_num_key_heads", 16),
        num_value_heads=keys.get("linear_num_value_heads", 32),
        key_head_dim=keys.get("linear_key_head_dim", 128),
        value_head_dim=keys.get("linear_value_head_dim", 128),
        conv_width=keys.get("linear_conv_kernel_dim", 4),
    )


def gpt_oss(keys: Keys, model: dict[str, Any]) -> None:
    """Windows in every other layer; biases in attention, in experts and in the router."""
    keys.must_be("swiglu_limit", 7.0)  # those of `kernels.activations`
    keys.must_be("swiglu_alpha", 1.702)
    keys.asked |= {"experts_per_token", "initial_context_length"}  # the same once more, and of yarn's
    keys.values.setdefault("sliding_window", 128)
    if keys.get("layer_types") is None:
        kinds = ("sliding_attention", "full_attention")
        keys.values["layer_types"] = [kinds[n % 2] for n in range(model["num_layers"])]
    windows(keys, model)
    attention_biases(model, bool(keys.get("attention_bias", True)))
    model["biases"].append("experts")
    model["moe"] = MoEConfig(
        num_experts=keys.get("num_local_experts", keys.get("num_experts", 128)),
        experts_per_token=keys.get("num_experts_per_tok", 4),
        d_expert=model["d_ff"],
    )


def granitemoe(keys: Keys, model: dict[str, Any]) -> None:
    """Granite with experts, and shared ones where the class has them."""
    attention_biases(model, bool(keys.get("attention_bias", False)))
    multipliers(keys, model)
    width, shared = model["d_ff"], 0
    if model["name"] == "granitemoeshared":
        shared = keys.get("shared_intermediate_size", 1024)
    if shared % width:
        raise ValueError(
            f"config.json: shared_intermediate_size={shared} is not supported; only a multiple of "
            f"intermediate_size={width} is"
        )
    model["moe"] = MoEConfig(
        num_experts=keys.get("num_local_experts", 8),
        experts_per_token=keys.get("num_experts_per_tok", 2),
        d_expert=width,
        num_shared_experts=shared // width,
    )


def olmoe(keys: Keys, model: dict[str, Any]) -> None:
    """Experts as wide as the file's feed-forward, queries and keys unclipped."""
    olmo2(keys, model)
    keys.must_be("clip_qkv", None)
    count, chosen = (64, 8) if model["name"] == "olmoe" else (7, 5)
    model["moe"] = MoEConfig(
        num_experts=keys.get("num_experts", keys.get("num_local_experts", count)),
        experts_per_token=keys.get("num_experts_per_tok", chosen),
        d_expert=model["d_ff"],
        normalize_gates=bool(keys.get("norm_topk_prob", False)),
    )


def ernie4_5_moe(keys: Keys, model: dict[str, Any]) -> None:
    """Experts from a layer on, chosen with a bias."""
    keys.must_be("use_bias", False)
    keys.must_be("moe_layer_interval", 1)
    keys.must_be("moe_norm_min", 1e-12)
    keys.must_be("moe_gate", "topk")
    keys.must_be("moe_use_aux_free", True)
    keys.asked.add("moe_capacity")  # of training
    count, first = model["num_layers"], keys.get("moe_layer_start_index", 1)
    last = keys.get("moe_layer_end_index", -1)
    if last not in (-1, count - 1):
        raise ValueError(f"config.json: moe_layer_end_index={last} is not supported; only {count - 1} is")
    model["moe"] = MoEConfig(
        num_experts=keys.get("moe_num_experts", 64),
        experts_per_token=keys.get("moe_k", 6),
        d_expert=keys.get("moe_intermediate_size", 1536),
        num_shared_experts=keys.get("moe_num_shared_experts", 2),
        first_dense_layers=first,
        selection_bias=True,
    )


def minimax_m2(keys: Keys, model: dict[str, Any]) -> None:
    """A part of each head rotates; experts are scored by sigmoids."""
    keys.must_be("attention_bias", False)
    keys.must_be("scoring_func", "sigmoid")
    keys.must_be("use_qk_norm", True)
    keys.must_be("qk_norm_type", "per_layer")
    keys.must_be("use_routing_bias", True)
    keys.must_be("shared_intermediate_size", 0)
    for name in ("layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta"):
        keys.must_be(name, 1.0)
    # Of layers for further tokens, and of others of its kind: the class reads none of it.
    keys.asked |= {"use_mtp", "num_mtp_modules", "mtp_transformer_layers"}
    keys.asked |= {"mlp_intermediate_size", "shared_moe_mode"}
    if set(keys.get("attn_type_list", [1])) != {1}:
        raise ValueError("config.json: attn_type_list is not supported; only full attention (1) is")
    if (size := keys.get("rotary_dim")) is not None:
        model["fraction"] = size / model["head_dim"]
    model["moe"] = MoEConfig(
        num_experts=keys.get("num_local_experts", keys.get("num_experts", 256)),
        experts_per_token=keys.get("num_experts_per_tok", 8),
        d_expert=model["d_ff"],
        score="sigmoid",
        selection_bias=True,
    )
