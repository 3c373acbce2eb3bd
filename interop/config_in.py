"""What the `config.json` of a dense family says beyond what all do, read into the values of a ModelConfig.

A function a family: it asks for each key that changes what is computed, and fills `model`.
"""

from typing import Any

from interop.keys import Keys
from models.config import MultipliersConfig


def period_of(kinds: list[str]) -> list[str]:
    """The shortest beginning of a list of all layers that gives it when it is repeated."""
    count = len(kinds)
    return kinds[: next(n for n in range(1, count + 1) if (kinds[:n] * count)[:count] == kinds)]


def windows(keys: Keys, model: dict[str, Any]) -> None:
    """`layer_types` or one window for all layers."""
    size, kinds = keys.get("sliding_window"), keys.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": "local", "full_attention": "global"}
        if not set(kinds) <= set(known):
            raise ValueError(
                f"config.json: layer_types has {sorted(set(kinds) - set(known))[0]}; not supported"
            )
        pattern = [known[kind] for kind in kinds]
        model["window_pattern"] = period_of(pattern)
        model["window"] = size if "local" in pattern else None
    elif size is not None:
        model["window"], model["window_pattern"] = size, ["local"]


def llama(keys: Keys, model: dict[str, Any]) -> None:
    """Biases on attention, on the feed-forward, or on both."""
    attention, mlp = (bool(keys.get(name, False)) for name in ("attention_bias", "mlp_bias"))
    model["bias"] = attention and mlp
    if attention != mlp:
        attention_biases(model, attention)
        model["biases"] += ["mlp"] if mlp else []


def attention_biases(model: dict[str, Any], there: bool) -> None:
    """Biases on queries, keys, values and on the way out."""
    model["qkv_bias"], model["biases"] = there, ["o"] if there else []


def qwen(keys: Keys, model: dict[str, Any]) -> None:
    """Windows, in layers from a number on or by a list, and only where they are switched on."""
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
    windows(keys, model)


def mistral(keys: Keys, model: dict[str, Any]) -> None:
    """A window for all layers, or a list of kinds."""
    windows(keys, model)


def gemma(keys: Keys, model: dict[str, Any]) -> None:
    """The scale of scores, soft caps, and windows in every other layer."""
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
    windows(keys, model)


def gemma3(keys: Keys, model: dict[str, Any]) -> None:
    """Gemma 2's keys, and a theta of their own for windows."""
    gemma(keys, model)
    model.setdefault("rope_local_theta", 10000.0)


def gpt2(keys: Keys, model: dict[str, Any]) -> None:
    """Its own names, and sizes that follow from the stream's."""
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


def starcoder2(keys: Keys, model: dict[str, Any]) -> None:
    """LayerNorm and biases everywhere, which is all it can have."""
    keys.must_be("use_bias", True)
    keys.must_be("norm_type", "layer_norm")
    keys.must_be("mlp_type", "default")
    windows(keys, model)
    model["activation"] = "gelu"


def phi3(keys: Keys, model: dict[str, Any]) -> None:
    """A window; of longrope the length before, and what Phi-4-mini's files say beside it."""
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.must_be(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        keys.must_be(name, 1)
    model["original_length"] = keys.get("original_max_position_embeddings", 4096)
    windows(keys, model)


def seed_oss(keys: Keys, model: dict[str, Any]) -> None:
    """Biases on queries, keys and values alone."""
    keys.must_be("attention_out_bias", False)
    keys.must_be("mlp_bias", False)
    model["qkv_bias"] = bool(keys.get("attention_bias", True))


def ernie(keys: Keys, model: dict[str, Any]) -> None:
    """No biases, which is all that is published."""
    keys.must_be("use_bias", False)


def smollm3(keys: Keys, model: dict[str, Any]) -> None:
    """Layers that do not rotate, by a list or an interval; windows are refused."""
    llama(keys, model)
    keys.must_be("use_sliding_window", False)
    layers, every = model["num_layers"], keys.get("no_rope_layer_interval", 4)
    default = [int((n + 1) % every != 0) for n in range(layers)]
    rotated = keys.get("no_rope_layers", default)[:layers]
    model["window_pattern"] = period_of(["global" if one else "nope" for one in rotated])
    keys.asked |= {"layer_types", "sliding_window", "max_window_layers"}  # of windows, which are off


def granite(keys: Keys, model: dict[str, Any]) -> None:
    """Llama's biases and the four multipliers."""
    llama(keys, model)
    multipliers(keys, model)


def multipliers(keys: Keys, model: dict[str, Any]) -> None:
    """Granite's four: one is the scale of scores."""
    model["attention_scale"] = float(keys.get("attention_multiplier", 1.0))
    model["multipliers"] = MultipliersConfig(
        embedding=float(keys.get("embedding_multiplier", 1.0)),
        residual=float(keys.get("residual_multiplier", 1.0)),
        logits=float(keys.get("logits_scaling", 1.0)),
    )


def olmo2(keys: Keys, model: dict[str, Any]) -> None:
    """Biases on all four projections of attention."""
    attention_biases(model, bool(keys.get("attention_bias", False)))


def olmo3(keys: Keys, model: dict[str, Any]) -> None:
    """OLMo 2's, and windows in three layers of four."""
    olmo2(keys, model)
    keys.values.setdefault("sliding_window", 4096)
    if keys.get("layer_types") is None:
        count = model["num_layers"]
        keys.values["layer_types"] = [
            "full_attention" if (n + 1) % 4 == 0 else "sliding_attention" for n in range(count)
        ]
    windows(keys, model)


def exaone4(keys: Keys, model: dict[str, Any]) -> None:
    """Global layers between windows do not rotate; without windows all do."""
    keys.must_be("attention_bias", False)
    every, count = keys.get("sliding_window_pattern", 4), model["num_layers"]
    keys.values.setdefault("sliding_window", 4096)
    if keys.get("sliding_window") is None:  # then every layer is global, and rotated
        keys.asked.add("layer_types")
        return
    if keys.get("layer_types") is None:
        last = [
            (n + 1) % every == 0 if isinstance(every, int) else (every * count)[n] == "G"
            for n in range(count)
        ]
        keys.values["layer_types"] = ["full_attention" if one else "sliding_attention" for one in last]
    windows(keys, model)
    model["window"] = keys.get("sliding_window")
    model["window_pattern"] = ["local" if kind == "local" else "nope" for kind in model["window_pattern"]]


def glm(keys: Keys, model: dict[str, Any]) -> None:
    """Biases on queries, keys and values."""
    model["qkv_bias"] = bool(keys.get("attention_bias", True))


def helium(keys: Keys, model: dict[str, Any]) -> None:
    """Biases on queries, keys and values, and on the feed-forward."""
    model["qkv_bias"] = bool(keys.get("attention_bias", False))
    model["biases"] = ["mlp"] if keys.get("mlp_bias", False) else []


STABLELM = {"norm": "layernorm", "biases": ["norm"]}
NEMOTRON = {**STABLELM, "norm_unit_offset": True}


def stablelm(keys: Keys, model: dict[str, Any]) -> None:
    """LayerNorm with biases; q/k norms by head and parallel halves are refused."""
    keys.must_be("qk_layernorm", False)
    keys.must_be("use_parallel_residual", False)
    model["qkv_bias"] = bool(keys.get("use_qkv_bias", False))


def nemotron(keys: Keys, model: dict[str, Any]) -> None:
    """Llama's biases beside those of the norms."""
    llama(keys, model)
    model["biases"] = [*model.get("biases", []), "norm"]


def jais2(keys: Keys, model: dict[str, Any]) -> None:
    """Biases everywhere, where nothing else is said."""
    for name in ("attention_bias", "mlp_bias"):
        keys.values.setdefault(name, True)
    nemotron(keys, model)
