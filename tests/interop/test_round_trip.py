"""Out and in again, to the bit, for every family; and what damaged or strange directories get."""

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from interop.configs import FAMILIES
from interop.read import Published
from interop.safetensors import Tensors, write_tensors
from interop.write import export, families_for, reader
from models.config import (
    DeltaConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    MultipliersConfig,
    RopeScaling,
)
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
SHARED = replace(EXPERTS, num_shared_experts=2, first_dense_layers=1)
GROUPED: Any = {"num_groups": 2, "groups_per_token": 1, "selection_bias": True}
DEEP = replace(SHARED, score="sigmoid", gate_scale=2.5, **GROUPED)
MLA = MLAConfig(
    q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5, norm_eps=1e-6
)
LATENT = {"mla": MLA, "num_kv_heads": 4, "moe": DEEP}
LAYERNORM = {"norm": "layernorm", "bias": True, "activation": "gelu", "norm_eps": 1e-5}
BEHIND = {"post_norms": "only", "qk_norm": True}
JOINT = {"qk_norm": "joint"}
HALF = {**SMALL, "head_dim": 8, "rope_fraction": 0.5}
SCALED: Any = {
    "attention_scale": 0.3,
    "multipliers": MultipliersConfig(embedding=3.0, residual=0.7, logits=5.0),
}
NORMED = {"norm": "layernorm", "biases": ["norm"], "norm_eps": 1e-5}
OWN: Any = {"attention_factor": 1.3, "truncate": False}
PLANES: Any = {"short_factor": [1.0, 1.5], "long_factor": [1.25, 6.0]}
GATED = replace(EXPERTS, num_shared_experts=1, shared_gate=True)
EVERY_OTHER: Any = {"layer_pattern": ["mlp", "experts"]}
CHOSEN = replace(EXPERTS, score="sigmoid", selection_bias=True)
HYBRID = {
    **{**SMALL, "num_layers": 5, "head_dim": 8},
    **{"qk_norm": True, "norm_unit_offset": True, "output_gate": True, "rope_fraction": 0.25},
    "mixer_pattern": ["gated_delta", "gated_delta", "gated_delta", "attention"],
    "delta": DeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=5, chunk=4),
}
MODELS = {
    "ministral": {**SMALL, "window": 8, "window_pattern": ["local", "global", "global"]},
    "smollm3": {**SMALL, "window_pattern": ["global", "global", "nope"], "qkv_bias": True, "biases": ["o"]},
    "granite": {**SAME, **SCALED, "biases": ["mlp"]},
    "olmo2": {**SMALL, **BEHIND, **JOINT, "qkv_bias": True, "biases": ["o"]},
    "olmo3": {
        **{**SMALL, **BEHIND, **JOINT, "window": 8, "window_pattern": ["local", "local", "global"]},
        **{"rope_theta": 5e5, "rope_local_theta": 5e5},
        "rope_scaling": RopeScaling(kind="yarn", factor=8.0, original_length=16, **OWN),
    },
    "exaone4": {**SMALL, **BEHIND, "window": 8, "window_pattern": ["local", "local", "nope"]},
    "glm": {**HALF, "qkv_bias": True},
    "glm4": {**HALF, "qkv_bias": True, "post_norms": True},
    "helium": {**SMALL, "qkv_bias": True, "biases": ["mlp"]},
    "stablelm": {**SAME, **NORMED, "rope_fraction": 0.5, "qkv_bias": True},
    "nemotron": {**HALF, **NORMED, "norm_unit_offset": True, "activation": "relu2"},
    "jais2": {**SAME, **NORMED, "activation": "relu2", "biases": ["norm", "o", "mlp"], "qkv_bias": True},
    "vaultgemma": {**SAME, **GEMMA, "window": 8, "window_pattern": ["local", "global"]},
    "qwen2_moe": {**SMALL, "qkv_bias": True, "moe": replace(GATED, num_shared_experts=3, **EVERY_OTHER)},
    "gpt_oss": {
        **{**SMALL, "d_ff": 8, "moe": EXPERTS, "qkv_bias": True, "biases": ["o", "experts"]},
        **{"window": 8, "window_pattern": ["local", "global"], "attention_sinks": True},
        **{"activation": "clamped_swiglu", "rope_theta": 1.5e5},
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=16, truncate=False),
    },
    "olmoe": {**SMALL, **JOINT, "moe": replace(EXPERTS, normalize_gates=False)},
    "flex_olmo": {**SMALL, **BEHIND, **JOINT, "moe": EXPERTS},
    "granitemoe": {**SMALL, **SCALED, "d_ff": 8, "moe": EXPERTS},
    "granitemoeshared": {**SMALL, **SCALED, "d_ff": 8, "moe": replace(EXPERTS, num_shared_experts=2)},
    "ernie4_5_moe": {**SMALL, "moe": replace(SHARED, selection_bias=True)},
    "minimax_m2": {**HALF, **JOINT, "moe": CHOSEN},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": {**HYBRID, "moe": GATED},
    "llama": {**SAME, "bias": True, "rope_scaling": RopeScaling(kind="llama3", factor=4.0)},
    "mistral": {**SMALL, "window": 8, "window_pattern": ["local"]},
    "qwen2": {**SMALL, "qkv_bias": True},
    "qwen3": {**SMALL, "qk_norm": True, "tie_embeddings": True},
    "seed_oss": {**SMALL, "qkv_bias": True},
    "ernie4_5": SMALL,
    "arcee": {**SAME, "activation": "relu2"},
    "phi3": {**SAME, "rope_scaling": RopeScaling(kind="longrope", factor=4.0, original_length=16, **PLANES)},
    "gemma": {**SMALL, **GEMMA},
    "gemma2": {**SAME, **POST, "attention_softcap": 50.0, "logit_softcap": 30.0, "attention_scale": 0.25},
    "gemma3_text": {**SAME, **POST, "qk_norm": True, "rope_local_theta": 1000.0},
    "gpt2": {**SAME, **LAYERNORM, "position": "learned", "num_kv_heads": 4, "tie_embeddings": True},
    "starcoder2": {**SMALL, **LAYERNORM},
    "mixtral": {**SMALL, "moe": EXPERTS},
    "qwen3_moe": {**SMALL, "qk_norm": True, "moe": EXPERTS},
    "dots1": {**SMALL, "qk_norm": True, "moe": DEEP},
    "glm4_moe": {**SMALL, "head_dim": 8, "rope_fraction": 0.5, "qkv_bias": True, "moe": DEEP},
    "qwen3_next": {**HYBRID, "moe": replace(GATED, first_dense_layers=1)},
    "deepseek_v3": {**SMALL, **LATENT, "mtp": MTPConfig(depth=1)},
    "kimi_k2": {**SMALL, **LATENT},
    "deepseek_v2": {**SMALL, **LATENT, "moe": replace(SHARED, normalize_gates=False)},
}


def random_weights(model):
    """Every parameter random, norms and biases too."""
    leaves, structure = jax.tree.flatten(model.info)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def placed(model):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=spec), model.info)


def digests_of(path):
    tensors = Tensors(path)
    return {
        name: hashlib.sha256(np.ascontiguousarray(tensors[name]).tobytes()).hexdigest() for name in tensors
    }


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again_is_the_same_to_the_bit(name, tmp_path):
    config = ModelConfig(**MODELS[name])
    model = build_model(config)
    params = random_weights(model)
    assert export(tmp_path / "a", config, model, reader(params), family=name, shard=4000).name == name
    there = Published(tmp_path / "a")
    got = jax.device_get(there.weights(placed(build_model(there.config)), build_model(there.config)))
    jax.tree.map(np.testing.assert_array_equal, got, params)
    # Theirs, ours, theirs: the same files.
    export(tmp_path / "b", there.config, model, reader(got), family=name, shard=4000)
    assert digests_of(tmp_path / "a") == digests_of(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert name in families_for(config)


def test_every_family_is_tried():
    assert set(MODELS) == set(FAMILIES)


# -- what damaged and strange directories get ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small llama in three files."""
    directory = tmp_path_factory.mktemp("sound") / "llama"
    config = ModelConfig(**{**SAME, "tie_embeddings": True})
    model = build_model(config)
    export(directory, config, model, reader(random_weights(model)), family="llama", shard=6000)
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def rewrite(directory, change):
    """The whole model in one file, its arrays changed by `change(dict)`."""
    tensors = Tensors(directory)
    arrays = {name: np.array(tensors[name]) for name in tensors}
    change(arrays)
    for path in directory.glob("model*"):
        path.unlink()
    write_tensors(directory, {n: a.shape for n, a in arrays.items()}, arrays.items(), np.float32)


def missing(directory):
    rewrite(directory, lambda arrays: arrays.pop("model.layers.1.mlp.up_proj.weight"))


def extra(directory):
    rewrite(directory, lambda arrays: arrays.update({"model.layers.9.mlp.up_proj.weight": np.ones((24, 16))}))


def transposed(directory):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory, lambda arrays: arrays.update({name: arrays[name].T.copy()}))


def untied(directory):
    table = np.ones((40, 16))
    rewrite(directory, lambda arrays: arrays.update({"lm_head.weight": table}))


def cut_short(directory):
    path = sorted(directory.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-64])


def lengthened(directory):
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes() + b"0" * 8)


def swapped(directory):
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def gone(directory):
    sorted(directory.glob("*.safetensors"))[1].unlink()


def other_dtype(directory):
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))


def wrong_size(directory):
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F16"', 1))


def no_table(directory):
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def key(name, value):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def outside(directory):
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


DAMAGED = {
    "missing": (missing, "up_proj.weight is missing"),
    "extra": (extra, "layers.9.mlp.up_proj.weight is not part"),
    "transposed": (transposed, r"up_proj.weight is \[16, 24\]"),
    "untied": (untied, "lm_head.weight differs from"),
    "cut_short": (cut_short, "its table says"),
    "lengthened": (lengthened, "its table says"),
    "swapped": (swapped, "disagree about"),
    "gone": (gone, "is missing"),
    "other_dtype": (other_dtype, "F99, which is not supported"),
    "wrong_size": (wrong_size, "bytes for"),
    "no_table": (no_table, "cut short"),
    "outside": (outside, "which is not beside it"),
    "unknown_key": (key("residual_multiplier", 0.5), "residual_multiplier=0.5 is not understood"),
    "quantized": (key("quantization_config", {"bits": 4}), "quantization_config"),
    "partial": (key("partial_rotary_factor", 0.5), "partial_rotary_factor=0.5"),
    "one_bias": (key("attention_bias", True), "_proj.bias is missing"),
    "rope": (key("rope_scaling", {"rope_type": "longrope", "factor": 4.0}), "rope_type=longrope"),
    "wider": (key("hidden_size", 32), "and this model's is"),
    "deeper": (key("num_hidden_layers", 4), "layers.3.*is missing"),
    "family": (key("model_type", "lama"), "did you mean llama"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_or_strange_directory_is_refused_in_one_line(how, sound, tmp_path):
    damage, says = DAMAGED[how]
    shutil.copytree(sound, tmp_path / "there")
    damage(tmp_path / "there")
    with pytest.raises(ValueError, match=says) as caught:
        there = Published(tmp_path / "there")
        there.slots(build_model(there.config))
    assert "\n" not in str(caught.value)


def test_a_device_reads_its_slice_and_nothing_else(sound):
    """On fsdp x tensor each device's part of each array is what the whole has there."""
    there = Published(sound)
    model = build_model(there.config)
    mesh = jax.make_mesh((2, 4), ("a", "b"))

    def split(info):
        axes = {"embed": "a", "mlp": "b", "heads": "b", "vocab": "b"}
        spec = jax.sharding.PartitionSpec(*(axes.get(axis) for axis in info.axes))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(info.shape, np.float32, sharding=sharding)

    got = there.weights(jax.tree.map(split, model.info), model)
    whole = there.weights(placed(model), model)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(whole))
    up = got["segments"]["0"]["0"]["mlp"]["up"]
    assert up.addressable_shards[0].data.size * 8 == up.size
