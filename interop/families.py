"""What parameters are called in files of Hugging Face's layout, a line each; a family is a list of lines.

Sources: the modeling files of transformers, whose names these are. Weights are `[out, in]` there unless said.
Rules for parameters that a model does not have are not used, so that a family's table may hold all variants.
"""

from interop.rules import Rule as R
from models.config import ModelConfig

Rules = list[R]
LAYER = "model.layers.{n}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
Names = tuple[str, str]

TOP = [
    R("embed/table", "model.embed_tokens.weight", "V D -> V D"),
    R("head/table", "lm_head.weight", "V D -> V D"),
    *(
        R(f"final_norm/{ours}", f"model.norm.{theirs}", "D -> D")
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    ),
]
FURTHER = [  # layers behind the last one predict further tokens (DeepSeek-V3)
    R("mtp/hidden_norm/scale", LAYER + "hnorm.weight", "D -> D"),
    R("mtp/embed_norm/scale", LAYER + "enorm.weight", "D -> D"),
    R("mtp/final_norm/scale", LAYER + "shared_head.norm.weight", "D -> D"),
    # The embedding's half comes first there, the stream's here.
    R("mtp/project", LAYER + "eh_proj.weight", "M (C D) -> C D M", part=("C", 1, 2, 2), at=0),
    R("mtp/project", LAYER + "eh_proj.weight", "M (C D) -> C D M", part=("C", 0, 1, 2), at=1),
]


def norms(attention: str | None, mlp: str | None, after: Names | None = None) -> Rules:
    """The norms of a layer: before its halves (None: none there), and behind them."""
    names = {ours: n for ours, n in (("attention_norm", attention), ("mlp_norm", mlp)) if n is not None}
    if after is not None:
        names |= {"attention_post_norm": after[0], "mlp_post_norm": after[1]}
    kinds = (("scale", "weight"), ("bias", "bias"))
    return [R(f"{o}/{kind}", f"{LAYER}{t}.{k}", "D -> D") for o, t in names.items() for kind, k in kinds]


def attention(pairs: int | tuple[int, int] | None = None, *, joint: bool = False) -> Rules:
    """Projections apart, with what biases and norms there are. pairs: from there on columns lie in pairs.

    joint: norms of queries and keys are over all heads, in one dim there.
    """
    prefix = ATTENTION
    k, v = prefix + "k_proj", prefix + "v_proj"
    return [
        R("attention/q", prefix + "q_proj.weight", "(N H) D -> D N H", pairs=pairs),
        R("attention/kv", k + ".weight", "(K H) D -> D C K H", pairs=pairs, at=0),
        R("attention/kv", v + ".weight", "(K H) D -> D C K H", at=1),
        R("attention/o", prefix + "o_proj.weight", "D (N H) -> N H D"),
        R("attention/q_bias", prefix + "q_proj.bias", "(N H) -> N H", pairs=pairs),
        R("attention/kv_bias", k + ".bias", "(K H) -> C K H", pairs=pairs, at=0),
        R("attention/kv_bias", v + ".bias", "(K H) -> C K H", at=1),
        R("attention/o_bias", prefix + "o_proj.bias", "D -> D"),
        R("attention/q_norm/scale", prefix + "q_norm.weight", "(N H) -> N H" if joint else "H -> H"),
        R("attention/k_norm/scale", prefix + "k_norm.weight", "(K H) -> K H" if joint else "H -> H"),
        R("attention/sinks", prefix + "sinks", "N -> N"),
    ]


def gated(
    prefix: str = MLP, ours: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Rules:
    """A feed-forward with a gate, the gate first."""
    gate, up, down = (prefix + name for name in names)
    return [
        R(f"{ours}/up", (gate + ".weight", up + ".weight"), "F D -> D C F"),
        R(f"{ours}/down", down + ".weight", "D F -> F D"),
        R(f"{ours}/up_bias", (gate + ".bias", up + ".bias"), "F -> C F"),
        R(f"{ours}/down_bias", down + ".bias", "D -> D"),
    ]


def stacked_pair(name: str, ours: str = "mlp", prefix: str = MLP) -> Rules:
    """A feed-forward whose gate and value lie below each other in one array."""
    up, down = name.split()
    return [
        R(f"{ours}/up", f"{prefix}{up}.weight", "(C F) D -> D C F"),
        R(f"{ours}/down", f"{prefix}{down}.weight", "D F -> F D"),
    ]


def plain(up: str, down: str) -> Rules:
    """A feed-forward without a gate."""
    return [
        R("mlp/up", f"{MLP}{up}.weight", "F D -> D F"),
        R("mlp/down", f"{MLP}{down}.weight", "D F -> F D"),
        R("mlp/up_bias", f"{MLP}{up}.bias", "F -> F"),
        R("mlp/down_bias", f"{MLP}{down}.bias", "D -> D"),
    ]


def experts(
    prefix: str = MLP,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_experts",
) -> Rules:
    """Experts in files of their own, the router, its bias, and shared experts as one feed-forward."""
    gate, up, down = (f"{prefix}experts.{{e}}.{name}.weight" for name in names)
    return [
        R("mlp/experts/router", prefix + "gate.weight", "E D -> D E"),
        R("mlp/experts/up", (gate, up), "F D -> E D C F"),
        R("mlp/experts/down", down, "D F -> E F D"),
        R("mlp/experts/bias", prefix + "gate.e_score_correction_bias", "E -> E"),
        *gated(f"{prefix}{shared}.", "mlp/shared"),
        R("mlp/shared_gate", f"{prefix}{shared}_gate.weight", "C D -> D C"),
    ]


def latent(config: ModelConfig) -> Rules:
    """Latent attention (DeepSeek-V2); rotated columns are pairs there, and keys and values share arrays."""
    if config.mla is None:
        return []
    nope, rope, v, rank = (
        config.mla.qk_nope_head_dim,
        config.mla.qk_rope_head_dim,
        config.mla.v_head_dim,
        config.mla.kv_lora_rank,
    )
    down, up = ATTENTION + "kv_a_proj_with_mqa.weight", ATTENTION + "kv_b_proj.weight"
    queries = "q_proj" if config.mla.q_lora_rank is None else "q_b_proj"
    return [
        R("attention/q_down", ATTENTION + "q_a_proj.weight", "Q D -> D Q"),
        R("attention/q_norm/scale", ATTENTION + "q_a_layernorm.weight", "Q -> Q"),
        R("attention/q", f"{ATTENTION}{queries}.weight", "(N H) Q -> Q N H", pairs=nope),
        R("attention/kv_down", down, "X D -> D X", part=("X", 0, rank, rank + rope)),
        R("attention/k_rope", down, "X D -> D X", part=("X", rank, rank + rope, rank + rope), pairs=0),
        R("attention/kv_norm/scale", ATTENTION + "kv_a_layernorm.weight", "R -> R"),
        R("attention/k", up, "(N X) R -> R N X", part=("X", 0, nope, nope + v)),
        R("attention/v", up, "(N X) R -> R N X", part=("X", nope, nope + v, nope + v)),
        R("attention/o", ATTENTION + "o_proj.weight", "D (N H) -> N H D"),
    ]


def fused(config: ModelConfig) -> Rules:
    """Phi-3: queries, keys and values below each other in one array, gate and up in another."""
    N, K = config.num_heads, config.num_kv_heads
    name, every = ATTENTION + "qkv_proj.weight", N + 2 * K
    return [
        R("attention/q", name, "(N H) D -> D N H", part=("N", 0, N, every)),
        R("attention/kv", name, "(K H) D -> D C K H", part=("K", N, N + K, every), at=0),
        R("attention/kv", name, "(K H) D -> D C K H", part=("K", N + K, every, every), at=1),
        R("attention/o", ATTENTION + "o_proj.weight", "D (N H) -> N H D"),
        *stacked_pair("gate_up_proj down_proj"),
    ]


def gpt2(config: ModelConfig) -> Rules:
    """GPT-2: weights are [in, out] there, and queries, keys and values one array."""
    h = "transformer.h.{n}."
    kinds = (("scale", "weight"), ("bias", "bias"))
    halves = (("attention_norm", "ln_1"), ("mlp_norm", "ln_2"))
    return [
        R("embed/table", "transformer.wte.weight", "V D -> V D"),
        R("embed/positions", "transformer.wpe.weight", "T D -> T D"),
        R("head/table", "lm_head.weight", "V D -> V D"),  # where it is not tied
        *(R(f"final_norm/{ours}", f"transformer.ln_f.{theirs}", "D -> D") for ours, theirs in kinds),
        *(R(f"{o}/{kind}", f"{h}{t}.{k}", "D -> D") for o, t in halves for kind, k in kinds),
        R("attention/q", h + "attn.c_attn.weight", "D (C N H) -> D N H", part=("C", 0, 1, 3)),
        R("attention/kv", h + "attn.c_attn.weight", "D (C K H) -> D C K H", part=("C", 1, 3, 3)),
        R("attention/q_bias", h + "attn.c_attn.bias", "(C N H) -> N H", part=("C", 0, 1, 3)),
        R("attention/kv_bias", h + "attn.c_attn.bias", "(C K H) -> C K H", part=("C", 1, 3, 3)),
        R("attention/o", h + "attn.c_proj.weight", "(N H) D -> N H D"),
        R("attention/o_bias", h + "attn.c_proj.bias", "D -> D"),
        R("mlp/up", h + "mlp.c_fc.weight", "D F -> D F"),
        R("mlp/up_bias", h + "mlp.c_fc.bias", "F -> F"),
        R("mlp/down", h + "mlp.c_proj.weight", "F D -> F D"),
        R("mlp/down_bias", h + "mlp.c_proj.bias", "D -> D"),
    ]


def llama(config: ModelConfig) -> Rules:
    """Llama and whoever has its names: Mistral, Qwen 2 and 3, SmolLM 2, Seed-OSS, Granite."""
    return [*TOP, *norms("input_layernorm", "post_attention_layernorm"), *attention(), *gated()]


def gemma2(config: ModelConfig) -> Rules:
    """Gemma 2 and 3: norms on both sides of each half."""
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    before = norms("input_layernorm", "pre_feedforward_layernorm", after)
    return [*TOP, *before, *attention(), *gated()]


def mixtral(config: ModelConfig) -> Rules:
    """Mixtral: Llama with experts that are called by number."""
    inside = experts(LAYER + "block_sparse_moe.", ("w1", "w3", "w2"))
    return [*TOP, *norms("input_layernorm", "post_attention_layernorm"), *attention(), *inside]


def qwen3_moe(config: ModelConfig) -> Rules:
    """Qwen 3's and dots.llm1's experts in a Llama with q/k norms; the first layers may be dense."""
    return [*llama(config), *experts()]


def deepseek(config: ModelConfig) -> Rules:
    """DeepSeek-V2 and V3, Kimi K2: latent attention, dense layers first, then experts."""
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [*TOP, *FURTHER, *halves, *latent(config), *gated(), *experts()]


def starcoder2(config: ModelConfig) -> Rules:
    """StarCoder 2: LayerNorm and biases everywhere."""
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [*TOP, *halves, *attention(), *plain("c_fc", "c_proj")]


def arcee(config: ModelConfig) -> Rules:
    """Arcee AFM: a squared ReLU without a gate."""
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [*TOP, *halves, *attention(), *plain("up_proj", "down_proj")]


def ernie(config: ModelConfig) -> Rules:
    """ERNIE 4.5: a Llama whose rotated columns are pairs."""
    return [*TOP, *norms("input_layernorm", "post_attention_layernorm"), *attention(pairs=0), *gated()]


def delta(config: ModelConfig) -> Rules:
    """Qwen3-Next's gated delta rule: rows by key head, each with its queries, keys, values, and gates."""
    if config.delta is None:
        return []
    d, prefix, mixer = config.delta, LAYER + "linear_attn.", "gated_delta:attention/"
    K, H, V, group = d.num_key_heads, d.key_head_dim, d.value_head_dim, d.num_value_heads // d.num_key_heads
    wide, keys, values = 2 * H + 2 * group * V, K * H, d.num_value_heads * V
    inputs, rates, conv = (
        prefix + "in_proj_qkvz.weight",
        prefix + "in_proj_ba.weight",
        prefix + "conv1d.weight",
    )
    channels = 2 * keys + values
    rules = [
        R(mixer + "qk", inputs, "(K H) D -> D C K H", part=("H", 0, H, wide), at=0),
        R(mixer + "qk", inputs, "(K H) D -> D C K H", part=("H", H, 2 * H, wide), at=1),
        R(mixer + "qk_conv", conv, "(K H) 1 J -> J C K H", cut=(0, keys, channels), at=0),
        R(mixer + "qk_conv", conv, "(K H) 1 J -> J C K H", cut=(keys, 2 * keys, channels), at=1),
        R(mixer + "v_conv", conv, "(N H) 1 J -> J N H", cut=(2 * keys, channels, channels)),
        R(mixer + "decay", prefix + "A_log", "N -> N"),
        R(mixer + "step", prefix + "dt_bias", "N -> N"),
        R(mixer + "norm", prefix + "norm.weight", "H -> H"),
        R(mixer + "o", prefix + "out_proj.weight", "D (N H) -> N H D"),
    ]
    for k in range(K):
        heads = ("N", k * group, (k + 1) * group)
        for number, name in enumerate("vz"):
            first = k * wide + 2 * H + number * group * V
            rows = (first, first + group * V, K * wide)
            rules.append(R(mixer + name, inputs, "(N H) D -> D N H", cut=rows, into=heads))
        for number in range(2):  # how much is written, then how much is left
            first = (2 * k + number) * group
            rows = (first, first + group, 2 * K * group)
            rules.append(R(mixer + "ba", rates, "N D -> D C N", cut=rows, into=heads, at=number))
    return rules


def qwen3_next(config: ModelConfig) -> Rules:
    """Qwen3-Next: three layers of the gated delta rule to one of attention, whose output has a gate."""
    return [*hybrid(config), *delta(config)]


def qwen3_5(config: ModelConfig) -> Rules:
    """Qwen3.5: the same with the rule's projections apart, each kind's rows together."""
    if config.delta is None:
        return hybrid(config)
    d, prefix, mixer = config.delta, LAYER + "linear_attn.", "gated_delta:attention/"
    keys, values = d.num_key_heads * d.key_head_dim, d.num_value_heads * d.value_head_dim
    inputs, channels = prefix + "in_proj_qkv.weight", 2 * keys + values
    return [
        *hybrid(config),
        *(rule for rule in delta(config) if "in_proj" not in rule.theirs),
        R(mixer + "qk", inputs, "(C K H) D -> D C K H", cut=(0, 2 * keys, channels)),
        R(mixer + "v", inputs, "(N H) D -> D N H", cut=(2 * keys, channels, channels)),
        R(mixer + "z", prefix + "in_proj_z.weight", "(N H) D -> D N H"),
        R(mixer + "ba", (prefix + "in_proj_b.weight", prefix + "in_proj_a.weight"), "N D -> D C N"),
    ]


def hybrid(config: ModelConfig) -> Rules:
    """What layers of Qwen3-Next and Qwen3.5 have beside the gated delta rule."""
    H, q = config.head_dim, ATTENTION + "q_proj.weight"
    both = [rule for rule in attention() if rule.ours != "attention/q"]
    gates = [
        R("attention/q", q, "(N H) D -> D N H", part=("H", 0, H, 2 * H)),
        R("attention/gate", q, "(N H) D -> D N H", part=("H", H, 2 * H, 2 * H)),
    ]
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [*TOP, *halves, *both, *gates, *gated(), *experts(shared="shared_expert")]


def qwen2_moe(config: ModelConfig) -> Rules:
    """Qwen 1.5 and 2 with experts."""
    return [*llama(config), *experts(shared="shared_expert")]


AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


def olmo2(config: ModelConfig) -> Rules:
    """OLMo 2 and 3: norms only behind the halves, those of queries and keys over all heads."""
    return [*TOP, *norms(None, None, AFTER), *attention(joint=True), *gated()]


def exaone4(config: ModelConfig) -> Rules:
    """EXAONE 4: norms only behind the halves."""
    return [*TOP, *norms(None, None, AFTER), *attention(), *gated()]


def olmoe(config: ModelConfig) -> Rules:
    """OLMoE: Llama's norms, those of queries and keys over all heads, and experts."""
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [*TOP, *halves, *attention(joint=True), *experts()]


def flex_olmo(config: ModelConfig) -> Rules:
    """FlexOlmo: OLMo 2 with experts."""
    return [*TOP, *norms(None, None, AFTER), *attention(joint=True), *experts()]


def rotated_pairs(config: ModelConfig) -> tuple[int, int]:
    """The columns of a head that rotate, as pairs."""
    return 0, round(config.head_dim * config.rope_fraction)


def glm(config: ModelConfig) -> Rules:
    """GLM-4 of 2024: a part of each head rotates, in pairs; gate and value in one array."""
    halves = norms("input_layernorm", "post_attention_layernorm")
    pair = stacked_pair("gate_up_proj down_proj")
    return [*TOP, *halves, *attention(rotated_pairs(config)), *pair]


def glm4(config: ModelConfig) -> Rules:
    """GLM-4 of 2025: the same with norms on both sides of each half."""
    after = ("post_self_attn_layernorm", "post_mlp_layernorm")
    halves = norms("input_layernorm", "post_attention_layernorm", after)
    pair = stacked_pair("gate_up_proj down_proj")
    return [*TOP, *halves, *attention(rotated_pairs(config)), *pair]


def vaultgemma(config: ModelConfig) -> Rules:
    """VaultGemma: Gemma 2 without norms behind the halves."""
    return [*TOP, *norms("input_layernorm", "pre_feedforward_layernorm"), *attention(), *gated()]


def granitemoe(config: ModelConfig) -> Rules:
    """Granite 3 with experts, all of a layer in two arrays, and perhaps shared ones."""
    inside = LAYER + "block_sparse_moe."
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [
        *TOP,
        *halves,
        *attention(),
        R("mlp/experts/router", inside + "router.layer.weight", "E D -> D E"),
        R("mlp/experts/up", inside + "input_linear.weight", "E (C F) D -> E D C F"),
        R("mlp/experts/down", inside + "output_linear.weight", "E D F -> E F D"),
        *stacked_pair("input_linear output_linear", "mlp/shared", LAYER + "shared_mlp."),
    ]


def gpt_oss(config: ModelConfig) -> Rules:
    """GPT-OSS: experts stacked as here, gates and values in turns; biases in all of it."""
    inside = MLP + "experts."
    return [
        *TOP,
        *norms("input_layernorm", "post_attention_layernorm"),
        *attention(),
        R("mlp/experts/router", MLP + "router.weight", "E D -> D E"),
        R("mlp/experts/router_bias", MLP + "router.bias", "E -> E"),
        R("mlp/experts/up", inside + "gate_up_proj", "E D (F C) -> E D C F"),
        R("mlp/experts/up_bias", inside + "gate_up_proj_bias", "E (F C) -> E C F"),
        R("mlp/experts/down", inside + "down_proj", "E F D -> E F D"),
        R("mlp/experts/down_bias", inside + "down_proj_bias", "E D -> E D"),
    ]


def ernie4_5_moe(config: ModelConfig) -> Rules:
    """ERNIE 4.5 with experts: the choice has a bias, in a row of its own."""
    bias = R("mlp/experts/bias", MLP + "moe_statics.e_score_correction_bias", "1 E -> E")
    return [*ernie(config), *(rule for rule in experts() if rule.ours != bias.ours), bias]


def minimax_m2(config: ModelConfig) -> Rules:
    """MiniMax-M2: Mixtral's names, norms of queries and keys over all heads, a bias in the choice."""
    inside = LAYER + "block_sparse_moe."
    bias = R("mlp/experts/bias", inside + "e_score_correction_bias", "E -> E")
    rest = [rule for rule in experts(inside, ("w1", "w3", "w2")) if rule.ours != bias.ours]
    halves = norms("input_layernorm", "post_attention_layernorm")
    return [*TOP, *halves, *attention(joint=True), *rest, bias]


def phi3(config: ModelConfig) -> Rules:
    """Phi-3 and Phi-4: fused arrays."""
    return [*TOP, *norms("input_layernorm", "post_attention_layernorm"), *fused(config)]
