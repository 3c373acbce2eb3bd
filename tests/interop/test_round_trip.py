"""Out and in again, to the bit, for every family; and what damaged or strange directories get."""

import hashlib
import json
import struct

import jax
import numpy as np
import pytest

from interop.configs import FAMILIES, read_config, write_config
from interop.read import Published
from interop.rules import slots
from interop.safetensors import Tensors
from interop.write import export, families_for
from models.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeScaling
from models.transformer import build_model

SMALL = {
    "vocab_size": 40,
    "num_layers": 3,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "d_ff": 24,
    "tie_embeddings": False,
    "max_seq_len": 64,
}
SAME = {**SMALL, "head_dim": 4}
GEMMA = {"norm_unit_offset": True, "embed_scale": True, "activation": "geglu", "tie_embeddings": True}
POST = {**GEMMA, "post_norms": True, "window": 8, "window_pattern": ["local", "global"]}
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, d_expert=8)
DEEP = MoEConfig(
    num_experts=4, experts_per_token=2, d_expert=8, num_shared_experts=2, first_dense_layers=1, score="sigmoid",
    gate_scale=2.5, num_groups=2, groups_per_token=1, selection_bias=True,
)  # fmt: skip
MLA = MLAConfig(
    q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5, norm_eps=1e-6
)
LATENT = {"mla": MLA, "num_kv_heads": 4, "moe": DEEP}
LAYERNORM = {"norm": "layernorm", "bias": True, "activation": "gelu", "norm_eps": 1e-5}
MODELS = {
    "llama": {**SAME, "bias": True, "rope_scaling": RopeScaling(kind="llama3", factor=4.0)},
    "mistral": {**SMALL, "window": 8, "window_pattern": ["local"]},
    "qwen2": {**SMALL, "qkv_bias": True},
    "qwen3": {**SMALL, "qk_norm": True, "tie_embeddings": True},
    "seed_oss": {**SMALL, "qkv_bias": True},
    "ernie4_5": SMALL,
    "arcee": {**SAME, "activation": "relu2"},
    "phi3": {**SMALL, "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=32)},
    "gemma": {**SMALL, **GEMMA},
    "gemma2": {**SAME, **POST, "attention_softcap": 50.0, "logit_softcap": 30.0, "attention_scale": 0.25},
    "gemma3_text": {**SAME, **POST, "qk_norm": True, "rope_local_theta": 1000.0},
    "gpt2": {**SAME, **LAYERNORM, "position": "learned", "num_kv_heads": 4, "tie_embeddings": True},
    "starcoder2": {**SMALL, **LAYERNORM},
    "mixtral": {**SMALL, "moe": EXPERTS},
    "qwen3_moe": {**SMALL, "qk_norm": True, "moe": EXPERTS},
    "dots1": {**SMALL, "qk_norm": True, "moe": DEEP},
    "deepseek_v3": {**SMALL, **LATENT, "mtp": MTPConfig(depth=1)},
    "kimi_k2": {**SMALL, **LATENT},
    "deepseek_v2": {
        **SMALL,
        **LATENT,
        "num_heads": 4,
        "moe": MoEConfig(num_experts=4, experts_per_token=2, d_expert=8, num_shared_experts=2, first_dense_layers=1,
                         normalize_gates=False),
    },
}  # fmt: skip


def random_weights(model):
    """Every parameter random, norms and biases too."""
    leaves, structure = jax.tree.flatten(model.info)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def reader(params):
    def read(path, row):
        leaf = params
        for name in path:
            leaf = leaf[name]
        return leaf if row is None else leaf[row]

    return read


def placed(model):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    del device
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=spec), model.info)


def digests_of(path):
    tensors = Tensors(path)
    return {name: hashlib.sha256(np.ascontiguousarray(tensors[name]).tobytes()).hexdigest() for name in tensors}


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again_is_the_same_to_the_bit(name, tmp_path):
    config = ModelConfig(**MODELS[name])
    model = build_model(config)
    params = random_weights(model)
    assert export(tmp_path / "a", config, reader(params), family=name, shard=4000).name == name
    there = Published(tmp_path / "a")
    got = jax.device_get(there.weights(placed(build_model(there.config)), build_model(there.config)))
    jax.tree.map(np.testing.assert_array_equal, got, params)
    # Theirs, ours, theirs: the same files.
    export(tmp_path / "b", there.config, reader(got), family=name, shard=4000)
    assert digests_of(tmp_path / "a") == digests_of(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert name in families_for(config)


def test_every_family_is_tried():
    assert set(MODELS) == set(FAMILIES)
