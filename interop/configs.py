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
from interop import config_in, config_in_experts, families
from interop.families import Rules
from interop.keys import Keys
from models.config import ModelConfig, RopeScaling

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
    eps_key: str = "rms_norm_eps"
    head_dim: int | None = None  # the same
    activation: str = "silu"  # the same
    theta: float = 10000.0  # the same
    partial: float | None = None  # the same, of the share of a head that rotates; None: it is the whole


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
        _read_rope(keys, family, model)
    keys.check_all_read()
    return ModelConfig(**model), family


def _read_decoder(keys: Keys, family: Family, model: dict[str, Any]) -> None:
    heads = model["num_heads"]
    model["num_kv_heads"] = keys.get("num_key_value_heads", heads)
    model["head_dim"] = keys.get("head_dim", family.head_dim or model["d_model"] // heads)
    model["norm_eps"] = keys.get(family.eps_key, family.eps)
    name = keys.get("hidden_activation", keys.get("hidden_act", family.activation))
    keys.get("hidden_act")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act={name} is not supported; use one of {', '.join(ACTIVATIONS)}"
        )
    model["activation"] = ACTIVATIONS[name]


def _read_rope(keys: Keys, family: Family, model: dict[str, Any]) -> None:
    """Base and stretching of the rotation: `rope_theta` and `rope_scaling`, or `rope_parameters`."""
    found = keys.get("rope_parameters", {})
    fraction = keys.get("partial_rotary_factor", found.get("partial_rotary_factor"))
    default = model.pop("fraction", family.partial or 1.0)
    model["rope_fraction"] = float(default if fraction is None else fraction)
    if model["rope_fraction"] != 1.0 and family.partial is None:
        # Others cut the pairs elsewhere, or turn them in another order.
        raise ValueError(f"config.json: partial_rotary_factor={fraction} is not supported; only 1 is")
    if "full_attention" in found:  # by kind of layer, as Gemma 3 has it
        local = found.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"config.json: rope_type={local['rope_type']} of sliding layers is not supported"
            )
        model["rope_local_theta"] = local.get("rope_theta", model.get("rope_local_theta", 10000.0))
        found = found["full_attention"]
    scaling = dict(keys.get("rope_scaling", found) or {})
    theta = keys.get("rope_theta", scaling.pop("rope_theta", found.get("rope_theta", family.theta)))
    model["rope_theta"] = float(theta)
    if (local := keys.get("rope_local_base_freq")) is not None:
        model["rope_local_theta"] = float(local)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    scaling.pop("partial_rotary_factor", None)
    if family.name == "olmo3":  # windows are as they were before the text was stretched
        _unstretched_windows(model, stretched=kind != "default")
    original = model.pop("original_length", None)
    if kind == "default":
        return
    if (
        original is not None
    ):  # Phi-3, whose class knows one kind; files before it had a name call it otherwise
        if kind not in LONGROPE:
            raise ValueError(f"config.json: rope_type={kind} is not supported in {family.name}; use longrope")
        model["rope_scaling"] = _longrope(scaling, original, model.get("max_seq_len", 4096))
        return
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"config.json: rope_type={kind} is not supported; use linear, llama3 or yarn")
    names = {"factor": "factor", "original_max_position_embeddings": "original_length"}
    names |= {name: name for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")}
    length = model.get("max_seq_len", 2048)
    values = {names[key]: value for key, value in scaling.items() if key in names and value is not None}
    if kind == "yarn":
        values.setdefault("original_length", length)
        values |= _yarn_factors(scaling, float(values["factor"]), model)
    model["rope_scaling"] = RopeScaling(kind=kind, **values)


def _longrope(scaling: Mapping[str, Any], original: int, length: int) -> RopeScaling:
    """Two factors a plane, and one on the waves that follows from how much longer texts have become."""
    names = {"short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"}
    if strange := sorted(set(scaling) - names):
        raise ValueError(
            f"config.json: rope_scaling.{strange[0]}={scaling[strange[0]]} of longrope is not supported"
        )
    # Where these disagree it hangs on the version of transformers which one counts.
    fixed: dict[str, float] = {"original_max_position_embeddings": original}
    if scaling.get("attention_factor") is None:
        fixed["factor"] = length / original
    for key, wanted in fixed.items():
        value = scaling.get(key)
        if value is not None and not math.isclose(value, wanted):
            raise ValueError(f"config.json: rope_scaling.{key}={value} is not supported; only {wanted:g} is")
    for key in ("short_factor", "long_factor"):
        if not isinstance(scaling.get(key), list):
            raise ValueError(
                f"config.json: rope_scaling.{key}={scaling.get(key)} must be a list of longrope's"
            )
    return RopeScaling(
        kind="longrope",
        factor=length / original,
        original_length=original,
        attention_factor=scaling.get("attention_factor"),
        short_factor=[float(x) for x in scaling["short_factor"]],
        long_factor=[float(x) for x in scaling["long_factor"]],
    )


def _yarn_factors(scaling: Mapping[str, Any], factor: float, model: dict[str, Any]) -> dict[str, Any]:
    """What of YaRN is not as ours: waves by 0.1 ln(factor) + 1, with latents scores by its square."""

    def stretch(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    waves = scaling.get("attention_factor")
    if waves is None:
        waves = stretch(mscale) / stretch(all_dim) if mscale and all_dim else stretch(1.0)
    found = {} if scaling.get("truncate", True) else {"truncate": False}
    own = 1.0 if model.get("mla") else stretch(1.0)
    if math.isclose(waves, own, rel_tol=1e-6):
        waves = None
    if model.get("mla"):
        wanted = stretch(all_dim or 0.0) ** 2 / (stretch(1.0) ** 2 if waves is None else 1.0)
        model["attention_scale"] = None if wanted == 1.0 else model["head_dim"] ** -0.5 * wanted
    return found | ({} if waves is None else {"attention_factor": waves})


def _unstretched_windows(model: dict[str, Any], *, stretched: bool) -> None:
    """OLMo 3: one theta for all layers, of which only global ones are stretched."""
    local = model.get("rope_local_theta", model["rope_theta"])
    if local != model["rope_theta"]:
        raise ValueError(
            f"config.json: rope_theta={local} of sliding layers is not supported; only one for all is"
        )
    model["rope_local_theta"] = local if stretched else None


GEMMA = {"norm_unit_offset": True, "embed_scale": True}
POST = {**GEMMA, "post_norms": True}
LAYERNORM = {"norm": "layernorm", "bias": True}
BEHIND = {"post_norms": "only", "qk_norm": True}
JOINT = {"qk_norm": "joint"}
NEXT = {"qk_norm": True, "norm_unit_offset": True, "output_gate": True}
OSS = {"attention_sinks": True, "activation": "clamped_swiglu"}  # its hidden_act says nothing
TANH = "gelu_pytorch_tanh"
LONGROPE = ("longrope", "su", "yarn")
F, A, X = families, config_in, config_in_experts
_ALL = (
    Family("llama", "LlamaForCausalLM", F.llama, read=A.llama),
    Family("mistral", "MistralForCausalLM", F.llama, read=A.mistral),
    Family("ministral", "MinistralForCausalLM", F.llama, read=A.mistral),
    Family("qwen2", "Qwen2ForCausalLM", F.llama, {"qkv_bias": True}, A.qwen),
    Family("qwen3", "Qwen3ForCausalLM", F.llama, {"qk_norm": True}, A.qwen, head_dim=128),
    Family("seed_oss", "SeedOssForCausalLM", F.llama, read=A.seed_oss, head_dim=128),
    Family("smollm3", "SmolLM3ForCausalLM", F.llama, read=A.smollm3, tied=True, theta=2e6),
    Family("granite", "GraniteForCausalLM", F.llama, read=A.granite),
    Family("olmo2", "Olmo2ForCausalLM", F.olmo2, {**BEHIND, **JOINT}, A.olmo2, eps=1e-5),
    Family("olmo3", "Olmo3ForCausalLM", F.olmo2, {**BEHIND, **JOINT}, A.olmo3, eps=1e-5, theta=5e5),
    Family("exaone4", "Exaone4ForCausalLM", F.exaone4, BEHIND, A.exaone4, eps=1e-5),
    Family("glm", "GlmForCausalLM", F.glm, read=A.glm, eps=1.5625e-7, head_dim=128, partial=0.5),
    Family(
        "glm4", "Glm4ForCausalLM", F.glm4, {"post_norms": True}, A.glm,
        eps=1.5625e-7, head_dim=128, partial=0.5,
    ),
    Family("helium", "HeliumForCausalLM", F.ernie, read=A.helium, eps=1e-8, head_dim=128, theta=1e5),
    Family(
        "stablelm", "StableLmForCausalLM", F.llama, A.STABLELM, A.stablelm,
        eps=1e-5, eps_key="layer_norm_eps", partial=0.25,
    ),
    Family(
        "nemotron", "NemotronForCausalLM", F.arcee, A.NEMOTRON, A.nemotron,
        eps=1e-5, eps_key="norm_eps", activation="relu2", partial=0.5,
    ),
    Family(
        "jais2", "Jais2ForCausalLM", F.arcee, {"norm": "layernorm"}, A.jais2,
        eps=1e-5, eps_key="layer_norm_eps", activation="relu2",
    ),
    Family(
        "ernie4_5", "Ernie4_5ForCausalLM", F.ernie, read=A.ernie, tied=True,
        eps=1e-5, head_dim=128, theta=5e5,
    ),
    Family("arcee", "ArceeForCausalLM", F.arcee, read=A.llama, eps=1e-5, activation="relu2"),
    Family("phi3", "Phi3ForCausalLM", F.phi3, read=A.phi3, eps=1e-5, partial=1.0),
    Family("gemma", "GemmaForCausalLM", F.llama, GEMMA, A.gemma, True, head_dim=256, activation=TANH),
    Family("gemma2", "Gemma2ForCausalLM", F.gemma2, POST, A.gemma, True, head_dim=256, activation=TANH),
    Family(
        "gemma3_text", "Gemma3ForCausalLM", F.gemma2, {**POST, "qk_norm": True}, A.gemma3, True,
        head_dim=256, activation=TANH, theta=1e6,
    ),
    Family(
        "vaultgemma", "VaultGemmaForCausalLM", F.vaultgemma, GEMMA, A.gemma, True,
        head_dim=256, activation=TANH,
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", F.gpt2, {**LAYERNORM, "position": "learned", "activation": "gelu"},
        A.gpt2, True,
    ),
    Family(
        "starcoder2", "Starcoder2ForCausalLM", F.starcoder2, LAYERNORM, A.starcoder2, True,
        eps=1e-5, eps_key="norm_epsilon", activation=TANH,
    ),
    Family("mixtral", "MixtralForCausalLM", F.mixtral, read=X.mixtral, eps=1e-5, theta=1e6),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", F.qwen2_moe, read=X.qwen2_moe),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", F.qwen3_moe, {"qk_norm": True}, X.qwen_moe),
    Family("gpt_oss", "GptOssForCausalLM", F.gpt_oss, OSS, X.gpt_oss, eps=1e-5, head_dim=64, theta=1.5e5),
    Family("olmoe", "OlmoeForCausalLM", F.olmoe, JOINT, X.olmoe, eps=1e-5),
    Family("flex_olmo", "FlexOlmoForCausalLM", F.flex_olmo, {**BEHIND, **JOINT}, X.olmoe, theta=5e5),
    Family("granitemoe", "GraniteMoeForCausalLM", F.granitemoe, read=X.granitemoe),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM", F.granitemoe, read=X.granitemoe),
    Family(
        "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", F.ernie4_5_moe, read=X.ernie4_5_moe, tied=True,
        eps=1e-5, theta=5e5,
    ),
    Family("minimax_m2", "MiniMaxM2ForCausalLM", F.minimax_m2, JOINT, X.minimax_m2, partial=1.0, theta=5e6),
    Family("dots1", "Dots1ForCausalLM", F.qwen3_moe, {"qk_norm": True}, X.dots),
    Family("glm4_moe", "Glm4MoeForCausalLM", F.qwen3_moe, read=X.glm4_moe, partial=0.5),
    Family(
        "qwen3_next", "Qwen3NextForCausalLM", F.qwen3_next, NEXT, X.qwen3_next,
        head_dim=256, partial=0.25,
    ),
    Family("qwen3_5_text", "Qwen3_5ForCausalLM", F.qwen3_5, NEXT, X.qwen3_5, head_dim=256, partial=0.25),
    Family(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", F.qwen3_5, NEXT, X.qwen3_next,
        head_dim=256, partial=0.25,
    ),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", F.deepseek, read=X.deepseek),
    Family("kimi_k2", "DeepseekV3ForCausalLM", F.deepseek, read=X.deepseek),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", F.deepseek, read=X.deepseek_v2),
)  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}
