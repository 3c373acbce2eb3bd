"""Adapters go out as PEFT keeps them and come in again; what PEFT itself makes of them is in test_parity."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from interop.configs import FAMILIES
from interop.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from interop.peft import factor_reader as reader
from interop.safetensors import Tensors, write_tensors
from models.config import ModelConfig
from models.transformer import build_model
from models.weights import Adapters, LowRank, merged
from tests.interop.test_round_trip import MODELS, random_weights

ADAPTERS = Adapters(rank=3, scale=1.5, names=("q", "kv", "o", "up", "down"))


def base_weights(model, size=1.0):
    return jax.tree.map(lambda x: x * np.float32(size), random_weights(model))


def adapted(name, adapters=ADAPTERS, size=1.0):
    """(model, its rules, weights with factors, none of which is zero)."""
    config = ModelConfig(**MODELS[name])
    model = build_model(config)
    weights = adapters.make(model.info, base_weights(model, size), jax.random.key(0))
    rng = np.random.default_rng(1)

    def filled(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        m = None if leaf.m is None else leaf.m * rng.uniform(0.5, 2.0, leaf.m.shape).astype(np.float32)
        return replace(leaf, b=rng.normal(0.0, size, leaf.b.shape).astype(np.float32), m=m)

    weights = jax.tree.map(filled, weights, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    return model, FAMILIES[name].rules(config), jax.device_get(weights)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "ernie4_5", "gemma2", "qwen2", "starcoder2"])
def test_out_and_in_again_is_the_same_to_the_bit(name, dora, tmp_path):
    wanted = replace(ADAPTERS, dora=dora)
    model, rules, weights = adapted(name, wanted)
    write_adapter(tmp_path / "a", model, rules, wanted, reader(weights))
    adapters, there = read_adapter(tmp_path / "a", model, rules)
    assert adapters == replace(wanted, names=tuple(sorted(wanted.names)))
    back = there.applied(model, adapters, random_weights(model))
    assert jax.tree.structure(back) == jax.tree.structure(weights)
    jax.tree.map(np.testing.assert_array_equal, back, weights)


def test_what_is_added_is_their_product(tmp_path):
    """lora_B lora_A times alpha / r, on the rows and columns of their weight."""
    model, rules, weights = adapted("llama")
    write_adapter(tmp_path / "a", model, rules, ADAPTERS, reader(weights))
    tensors, said = Tensors(tmp_path / "a" / WEIGHTS), json.loads((tmp_path / "a" / CONFIG).read_text())
    attention = weights["segments"]["0"]["0"]["attention"]
    base, whole = ({k: np.asarray(getattr(v, "w", v)) for k, v in tree.items() if k in ("q", "kv", "o")}
                   for tree in (attention, merged(attention)))  # fmt: skip
    shapes = {"q_proj": (4, 4, 16), "v_proj": (2, 4, 16), "o_proj": (16, 4, 4)}
    for n in range(3):
        prefix = f"base_model.model.model.layers.{n}.self_attn."
        delta = {
            m: said["lora_alpha"]
            / said["r"]
            * tensors[f"{prefix}{m}.lora_B.weight"]
            @ tensors[f"{prefix}{m}.lora_A.weight"]
            for m in shapes
        }
        delta = {m: d.reshape(shapes[m]) for m, d in delta.items()}
        close = {"rtol": 0, "atol": 2e-6}
        np.testing.assert_allclose(delta["q_proj"], (whole["q"] - base["q"])[n].transpose(1, 2, 0), **close)
        np.testing.assert_allclose(
            delta["v_proj"], (whole["kv"] - base["kv"])[n][:, 1].transpose(1, 2, 0), **close
        )
        np.testing.assert_allclose(delta["o_proj"], (whole["o"] - base["o"])[n].transpose(2, 0, 1), **close)


def rewrite(directory, change=lambda arrays: None, **values):
    tensors = Tensors(directory / WEIGHTS)
    arrays = {name: np.array(tensors[name]) for name in tensors}
    change(arrays)
    write_tensors(directory, {n: a.shape for n, a in arrays.items()}, arrays.items(), np.float32)
    (directory / "model.safetensors").rename(directory / WEIGHTS)
    said = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**said, **values}))


def test_half_of_a_pair_leaves_the_other_as_it_is(tmp_path):
    """q_proj and v_proj, as PEFT adapts a Llama where nothing is said."""
    model, rules, weights = adapted("llama")
    write_adapter(tmp_path / "a", model, rules, ADAPTERS, reader(weights))

    def fewer(arrays):
        for name in [n for n in arrays if "q_proj" not in n and "v_proj" not in n]:
            del arrays[name]

    rewrite(tmp_path / "a", fewer, target_modules=["q_proj", "v_proj"])
    adapters, there = read_adapter(tmp_path / "a", model, rules)
    assert adapters.names == ("kv", "q")
    params = random_weights(model)
    back = merged(there.applied(model, adapters, params))["segments"]["0"]["0"]["attention"]["kv"]
    base, whole = (tree["segments"]["0"]["0"]["attention"]["kv"] for tree in (params, merged(weights)))
    np.testing.assert_array_equal(back[:, :, 0], base[:, :, 0])
    np.testing.assert_allclose(back[:, :, 1], whole[:, :, 1], rtol=0, atol=1e-6)


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
DAMAGED = {
    "missing": ({"change": lambda arrays: arrays.pop(NAME)}, "q_proj.lora_B.weight is missing"),
    "extra": (
        {"change": lambda a: a.update({NAME.replace(".1.", ".9."): a[NAME]})},
        "layers.9.* is not part",
    ),
    "shape": (
        {"change": lambda a: a.update({NAME: a[NAME].T})},
        r"is \[3, 16\], and this model's is \[16, 3\]",
    ),
    "targets": ({"target_modules": ["q_proj"]}, "disagree about"),
    "dora": ({"use_dora": True}, "k_proj.lora_magnitude_vector is missing"),
    "layers": (
        {"layers_to_transform": [1]},
        r"layers_to_transform=\[1\] is not supported; only LoRA and DoRA",
    ),
    "kind": ({"peft_type": "IA3"}, "peft_type=IA3 is not supported"),
    "bias": ({"bias": "all"}, "bias=all is not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    "no rank": ({"r": None}, "cannot be read"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_or_strange_adapter_is_refused_in_one_line(how, tmp_path):
    change, says = DAMAGED[how]
    model, rules, weights = adapted("llama")
    write_adapter(tmp_path / "a", model, rules, ADAPTERS, reader(weights))
    rewrite(tmp_path / "a", **change)
    with pytest.raises(ValueError, match=says) as caught:
        read_adapter(tmp_path / "a", model, rules)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "names"), [("phi3", ("q",)), ("mixtral", ("experts",)), ("gpt2", ("kv",))])
def test_factors_that_peft_has_no_module_for_are_refused(name, names, tmp_path):
    adapters = Adapters(rank=2, names=names)
    model, rules, weights = adapted(name, adapters)
    with pytest.raises(ValueError, match="no rule says what"):
        write_adapter(tmp_path / "a", model, rules, adapters, reader(weights))
    assert not list(tmp_path.iterdir())
