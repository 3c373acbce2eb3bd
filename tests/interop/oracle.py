"""Models of transformers with random weights, and their logits, for an environment that has transformers.

python tests/interop/oracle.py CASE DIRECTORY       config.json, weights, tokens, logits, greedy text
python tests/interop/oracle.py open DIRECTORY       logits of tokens.npy, ids of text.txt
python tests/interop/oracle.py blocks DIRECTORY     numbers.npz of blocks.npz
python tests/interop/oracle.py mxfp4 DIRECTORY      numbers.npy of blocks.npy and scales.npy
python tests/interop/oracle.py peft DIRECTORY       logits of tokens.npy by adapter/ over base/
python tests/interop/oracle.py gguf FILE DIRECTORY  ids of text.txt, and their logits
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TOKENS = 512
BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
DEEP = {
    **EXPERTS,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
LATENT = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0}
SEVEN = {"num_hidden_layers": 7}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "num_experts": 0,
    "mlp_only_layers": list(range(8)),
    "num_hidden_layers": 8,
    "head_dim": 16,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
OSS = {
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": 70},
    "rope_parameters": {**YARN, "truncate": False},
}
OWN_YARN = {**YARN, "rope_theta": 5e5, "attention_factor": 1.3, "truncate": False}
PLANES = {"short_factor": [1.0, 1.25, 1.5], "long_factor": [1.25, 4.0, 8.0]}
MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 5.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
GATED_EXPERTS = {
    **{**LINEAR, **EXPERTS, "num_experts": 8, "mlp_only_layers": []},
    "shared_expert_intermediate_size": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 100}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 90, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "ernie4_5": ("ernie4_5", {"use_bias": False}),
    "arcee": ("arcee", {}),
    "phi3": ("phi3", {"sliding_window": 80}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 70, "query_pre_attn_scalar": 24, "layer_types": SLIDING}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 70, "query_pre_attn_scalar": 24, **SEVEN}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 1024, "n_inner": 48}),
    "starcoder2": ("starcoder2", {"sliding_window": 100, "use_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 100}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": []}),
    "dots1": ("dots1", {**DEEP, "n_group": 1, "topk_group": 1}),
    "glm4_moe": ("glm4_moe", {**DEEP, "attention_bias": True, "use_qk_norm": True}),
    "qwen3_next": ("qwen3_next", LINEAR),
    "deepseek_v3": ("deepseek_v3", {**DEEP, **LATENT, "q_lora_rank": 10, "n_group": 4, "topk_group": 2}),
    "kimi_flat": ("deepseek_v3", {**DEEP, **LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v2": ("deepseek_v2", {**DEEP, **LATENT, "q_lora_rank": None, "norm_topk_prob": False}),
    "llama_own_yarn": ("llama", {"rope_parameters": OWN_YARN, "attention_bias": True}),
    "ministral": ("ministral", {"sliding_window": 70, "layer_types": SLIDING}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 3, "num_hidden_layers": 5, "mlp_bias": True}),
    "granite": ("granite", MULTIPLIED),
    "granitemoe": (
        "granitemoe",
        {**MULTIPLIED, "attention_bias": True, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {**MULTIPLIED, "num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", {"sliding_window": 70, "rope_scaling": {**OWN_YARN, "truncate": True}}),
    "gpt_oss": ("gpt_oss", OSS),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "flex_olmo": ("flex_olmo", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "exaone4": ("exaone4", {"sliding_window": 70, "sliding_window_pattern": 3, "num_hidden_layers": 5}),
    "exaone4_global": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "glm": ("glm", {"attention_bias": True}),
    "glm4": ("glm4", {"attention_bias": True}),
    "helium": ("helium", {"attention_bias": True, "mlp_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "nemotron": ("nemotron", {"mlp_bias": True, "num_hidden_layers": 3}),
    "jais2": ("jais2", {}),
    "vaultgemma": ("vaultgemma", {"sliding_window": 70, "query_pre_attn_scalar": 24}),
    "phi3_partial": ("phi3", {"partial_rotary_factor": 0.75}),
    "phi3_longrope": (
        "phi3",
        {
            **{"original_max_position_embeddings": 128, "partial_rotary_factor": 0.75},
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **PLANES},
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "qwen2_moe_sparse": (
        "qwen2_moe",
        {
            **{**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 32, "num_hidden_layers": 6},
            **{"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        },
    ),
    "qwen3_next_moe": ("qwen3_next", GATED_EXPERTS),
    "qwen3_5": ("qwen3_5_text", {k: v for k, v in LINEAR.items() if "experts" not in k and "mlp" not in k}),
    "qwen3_5_moe": ("qwen3_5_moe_text", GATED_EXPERTS),
    "minimax_m2": (
        "minimax_m2",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "rotary_dim": 4},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2},
    ),
    "deepseek_mscales": (
        "deepseek_v3",
        {
            **{**DEEP, **LATENT, "q_lora_rank": 10, "n_group": 1, "topk_group": 1},
            "rope_parameters": {**YARN, "mscale": 1.4, "mscale_all_dim": 0.6},
        },
    ),
}  # fmt: skip


def main(case: str, directory: Path) -> None:
    """Make the model, its files and what it says."""
    name, values = CASES[case]
    few = ("vocab_size", "bos_token_id", "eos_token_id")
    base = {key: BASE[key] for key in few} if name == "gpt2" else BASE
    config = transformers.AutoConfig.for_model(name, **{**base, **values})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        # Every parameter random, norms, biases and routers' biases too, so that none can be left out unseen.
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key or not value.dtype.is_floating_point or "embed_scale" in key:
                continue
            spread = 0.15 if value.ndim > 1 else 0.2
            if "gate_up_proj_bias" in key:  # so that the clamps of GPT-OSS are reached
                spread = 5.0
            noise = torch.randn_like(value) * spread
            value.copy_(value + noise if value.ndim == 1 else noise)
    model.save_pretrained(directory)
    tokens = torch.randint(3, BASE["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
        out = tokens[:, :16]
        for _ in range(64):
            scores = model(out).logits[0, -1]
            out = torch.cat([out, scores.argmax().view(1, 1)], dim=1)
    np.save(directory / "tokens.npy", tokens.numpy())
    np.save(directory / "logits.npy", logits)
    np.save(directory / "greedy.npy", out.numpy())
    print(case, transformers.__version__, float(logits.std()))


def read_ours(directory: Path) -> None:
    """Open what was exported as anybody does, and write down logits, and ids of a text and back."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(directory / "tokens.npy"))).logits[0].numpy()
    np.save(directory / "logits.npy", logits)
    text = directory / "text.txt"
    if text.exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
        assert tokenizer.eos_token_id == model.config.eos_token_id
        assert tokenizer.decode(ids) == text.read_text("utf-8")
        np.save(directory / "ids.npy", np.array(ids))


def read_gguf(file: Path, directory: Path) -> None:
    """What transformers makes of a GGUF file: ids of a text, and their logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation="eager", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer((directory / "text.txt").read_text("utf-8"), add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids)[None, :2048]
    with torch.no_grad():
        np.save(directory / "logits.npy", model.eval()(ids).logits[0].numpy())
    np.save(directory / "ids.npy", ids[0].numpy())


def read_blocks(directory: Path) -> None:
    """What the gguf package makes of blocks.npz."""
    from gguf import GGMLQuantizationType, quants

    blocks = np.load(directory / "blocks.npz")
    found = {kind: quants.dequantize(blocks[kind], GGMLQuantizationType[kind]) for kind in blocks}
    np.savez(directory / "numbers.npz", **found)


def read_mxfp4(directory: Path) -> None:
    """What transformers makes of blocks and scales, [E, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = (torch.from_numpy(np.load(directory / f"{name}.npy")) for name in ("blocks", "scales"))
    np.save(directory / "numbers.npy", convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy())


def read_adapter(directory: Path) -> None:
    """PEFT opens an adapter over base/, says its logits of tokens.npy, and saves it again as again/."""
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "base", attn_implementation="eager", dtype=torch.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # of keys that are missing there is no more than a warning
        model = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(directory / "tokens.npy"))).logits[0].numpy()
    np.save(directory / "logits.npy", logits)
    model.save_pretrained(directory / "again")


if __name__ == "__main__" and sys.argv[1] == "peft":
    read_adapter(Path(sys.argv[2]))
elif __name__ == "__main__" and sys.argv[1] == "blocks":
    read_blocks(Path(sys.argv[2]))
elif __name__ == "__main__" and sys.argv[1] == "mxfp4":
    read_mxfp4(Path(sys.argv[2]))
elif __name__ == "__main__" and sys.argv[1] == "open":
    read_ours(Path(sys.argv[2]))
elif __name__ == "__main__" and sys.argv[1] == "gguf":
    read_gguf(Path(sys.argv[2]), Path(sys.argv[3]))
elif __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
