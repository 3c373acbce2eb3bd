"""What llama.cpp calls models and parameters, to and from `config.json` and the rules of `interop.families`.

A GGUF's values become a config.json, which `interop.configs` reads as any other, so that what is refused
there is refused here. Its names stand for those of Hugging Face's files, with four changes of content:
Llama's rotated rows lie in pairs, Gemma's norms are 1 + w, experts are stacked, GPT-2's matrices transposed.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.checks import choice
from interop.configs import FAMILIES, Family, read_config
from interop.families import Rules
from interop.gguf import GGUF
from interop.rules import Rule
from models.config import ModelConfig, RopeScaling
from models.rope import rope_frequencies
from models.spec import layer_spec

EPSILONS = ("rms_epsilon", "epsilon")
TABLE, HEAD, STRETCHES = "token_embd.weight", "output.weight", "rope_freqs.weight"
ROUTER = "ffn_gate_inp"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "mlp.gate": ROUTER,
    "block_sparse_moe.gate": ROUTER,
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",  # Phi-3
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",  # StarCoder 2 and GPT-2
    "mlp.c_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
}
AROUND = {  # where both halves have a norm behind them too, as in Gemma 2
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERTS = [
    Rule(
        "mlp/experts/up", tuple(f"blk.{{n}}.ffn_{x}_exps.weight" for x in ("gate", "up")), "E F D -> E D C F"
    ),
    Rule("mlp/experts/down", "blk.{n}.ffn_down_exps.weight", "E D F -> E F D"),
]
KEYS = {  # behind the architecture's name, and what config.json calls it
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
GEMMA2 = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GEMMA3 = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq",
    "final_logit_softcapping": "final_logit_softcapping",
}
MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
QWEN_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
PHI3 = {"attention.sliding_window": "sliding_window"}
STARCODER2 = {"attention.layer_norm_rms_epsilon": "", "attention.layer_norm_epsilon": "norm_epsilon"}
GPT2 = dict.fromkeys(KEYS, "") | {  # sizes of heads follow, and nothing rotates
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # layers of the one model whose scores are scaled by D / N
OTHERS = ("general.", "tokenizer.", "quantize.", "split.")  # values that say nothing of the model


@dataclass(frozen=True)
class Architecture:
    """What `general.architecture` says, and the model_type that is the same."""

    name: str
    family: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # beside KEYS; "": not this one
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of config.json, whatever a file says
    pairs: bool = False  # rotated rows lie in pairs
    transposed: bool = False  # the family's matrices are [in, out], llama.cpp's are [out, in]

    @property
    def words(self) -> dict[str, str]:
        """What config.json calls a key behind the architecture's name."""
        return {key: name for key, name in {**KEYS, **self.keys}.items() if name}

    @property
    def rotates(self) -> bool:
        """Whether positions are rotations, which have keys of their own."""
        return "rope.freq_base" in self.words

    def rules(self, config: ModelConfig) -> Rules:
        """One line a parameter, in GGUF's names."""
        return list(self._rules(config))

    def _rules(self, config: ModelConfig) -> Iterator[Rule]:
        names = {**NAMES, **(AROUND if config.post_norms else {})}
        for rule in FAMILIES[self.family].rules(config):
            found = tuple(new for name in rule.names if (new := _renamed(name, names)))
            if len(found) < len(rule.names):
                continue  # of what llama.cpp has no name for
            # What is turned is queries, and keys: the first of a pair's two.
            turned = rule.ours.startswith("attention/q") or (
                rule.ours.startswith("attention/kv") and rule.at == 0
            )
            norm = config.norm_unit_offset and rule.ours.endswith("norm/scale")
            yield dataclasses.replace(
                rule,
                theirs=found,
                dims=_transposed(rule) if self.transposed else rule.dims,
                pairs=0 if self.pairs and turned and "norm" not in rule.ours else rule.pairs,
                add=-1.0 if norm else rule.add,
            )
        if config.moe is not None:
            yield from EXPERTS


ARCHITECTURES = (  # the plainest first
    Architecture("llama", "llama", pairs=True),
    Architecture("llama", "mixtral", MIXTRAL, pairs=True),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture("qwen3moe", "qwen3_moe", QWEN_MOE, {"norm_topk_prob": True}),
    Architecture("gemma", "gemma"),
    Architecture("gemma2", "gemma2", GEMMA2),
    Architecture("gemma3", "gemma3_text", GEMMA3),
    Architecture("phi3", "phi3", PHI3),
    Architecture("starcoder2", "starcoder2", STARCODER2),
    Architecture("gpt2", "gpt2", GPT2, transposed=True),
)


def _transposed(rule: Rule) -> str:
    """A matrix's dims with theirs in the other order; tables, norms and biases stay as they are."""
    theirs, ours = rule.dims.split(" -> ")
    groups = re.findall(r"\([^)]*\)|\S+", theirs)
    matrix = len(groups) == 2 and rule.ours.startswith(("attention/", "mlp/"))
    return f"{' '.join(groups[::-1])} -> {ours}" if matrix else rule.dims


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    module, _, kind = re.sub(r"^(model\.layers|transformer\.h)\.{n}\.", "", name).rpartition(".")
    if module not in names:
        return None
    return f"{'blk.{n}.' if '{n}' in name else ''}{names[module]}.{kind}"


def read_model(file: GGUF) -> tuple[dict[str, Any], ModelConfig, Family, Rules]:
    """The config.json that a file amounts to, the model, and its rules. ValueError, by key, for another."""
    values = dict(file.metadata)
    name, kind = values.get("general.architecture"), values.get("general.type", "model")
    known = [a for a in ARCHITECTURES if a.name == name]
    if kind != "model" or values.get("split.count", 1) > 1:
        raise ValueError(
            f"{file.path} is a {kind} in {values.get('split.count', 1)} files; give a model in one"
        )
    choice(f"{file.path}: general.architecture", name, sorted({a.name for a in ARCHITECTURES}))
    experts = values.get(f"{name}.expert_count", 0) > 0
    architecture = next(a for a in known if experts == ("expert_count" in a.keys))
    found = _config_values(file, architecture)
    config, family = read_config(found)
    return found, config, family, architecture.rules(config)


def _config_values(file: GGUF, architecture: Architecture) -> dict[str, Any]:
    head, left = architecture.name + ".", dict(file.metadata)

    def take(key: str, default: Any = None) -> Any:
        return left.pop(head + key, default)

    found: dict[str, Any] = {"model_type": architecture.family, **architecture.fixed}
    words = architecture.words
    for key, name in words.items():
        if (value := take(key)) is not None:
            if isinstance(value, list):
                raise ValueError(
                    f"{file.path}: {head}{key} differs from layer to layer, which is not supported"
                )
            found[name] = value
    for key in ("expert_count", "expert_used_count"):  # 0 in dense models
        take(key)
    for key in ("embedding_length", "attention.head_count", "block_count", "feed_forward_length"):
        if words[key] not in found:
            raise ValueError(f"{file.path}: {head}{key} is missing; fetch it again")
    if TABLE not in file.entries:
        raise ValueError(f"{file.path}: {TABLE} is missing; fetch it again")
    width, layers, heads = (
        found[words[key]] for key in ("embedding_length", "block_count", "attention.head_count")
    )
    H = found.get("head_dim", width // heads)
    found["vocab_size"] = file.entries[TABLE][2][0]
    same = {"vocab_size": found["vocab_size"], "attention.value_length": H, "rope.dimension_count": H}
    if FAMILIES[architecture.family].partial is not None:
        found["partial_rotary_factor"] = take("rope.dimension_count", H) / H
    for key, wanted in same.items():
        if (value := take(key, wanted)) != wanted:
            raise ValueError(f"{file.path}: {head}{key}={value} is not supported; only {wanted} is")
    found["tie_word_embeddings"] = HEAD not in file.entries
    if architecture.name == "llama":
        if architecture.family == "llama":
            found["attention_bias"] = "blk.0.attn_q.bias" in file.entries
            found["mlp_bias"] = "blk.0.ffn_up.bias" in file.entries
    if architecture.name in SCALED_BY_WIDTH:
        wide = layers == SCALED_BY_WIDTH[architecture.name]
        found["query_pre_attn_scalar"] = width / heads if wide else H
    if architecture.rotates:
        found |= {"head_dim": H, "rope_scaling": _scaling(file, take, found)}
    if strange := [key for key in left if not key.startswith(OTHERS)]:
        raise ValueError(
            f"{file.path}: {strange[0]}={left[strange[0]]!r} is not understood, and may change "
            "what the model computes"
        )
    return found


def _scaling(file: GGUF, take: Any, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """How rotations are stretched: two kinds are said in words, Llama 3's by its factor for each plane."""
    kind, factor = take("rope.scaling.type", "none"), take("rope.scaling.factor", 1.0)
    length = take("rope.scaling.original_context_length")
    take("rope.scaling.finetuned")
    if STRETCHES in file.entries:
        scaling = _llama3(np.asarray(file[STRETCHES]), found.get("rope_theta", 10000.0))
        if scaling is None or kind != "none":
            raise ValueError(
                f"{file.path}: {STRETCHES} is not Llama 3's; no other stretching by plane is supported"
            )
        return scaling
    choice(f"{file.path}: rope.scaling.type", kind, ("none", "linear", "yarn"))
    if kind == "none" or factor == 1.0:
        return None
    scaling = {"rope_type": kind, "factor": factor}
    return scaling | ({"original_max_position_embeddings": length} if kind == "yarn" and length else {})


def _llama3(stretches: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The published settings of Llama 3.1 that give these factors, of whatever context they were made for."""
    for power in range(5, 21):
        scaling = RopeScaling(kind="llama3", factor=float(stretches.max()), original_length=2**power)
        if np.allclose(stretches_of(scaling, theta, 2 * len(stretches)), stretches, rtol=1e-5):
            names = ("factor", "low_freq_factor", "high_freq_factor")
            values = {name: getattr(scaling, name) for name in names}
            return {"rope_type": "llama3", "original_max_position_embeddings": 2**power, **values}
    return None


def stretches_of(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """By how much each plane turns slower, [H/2]."""
    config = ModelConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    spec = layer_spec(config, "global")
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None), spec)[0]
    return plain / rope_frequencies(config, spec)[0]
