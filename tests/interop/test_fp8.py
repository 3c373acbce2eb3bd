"""Weights in eight bits with a scale for each block of 128 x 128, as DeepSeek-V3's files have them."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interop.read import Published
from interop.safetensors import NAMES, Tensors
from interop.write import export, reader
from models.config import ModelConfig
from models.transformer import build_model
from tests.interop.test_round_trip import SAME, placed, random_weights

ABOUT = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


def write_mixed(path, arrays):
    """A safetensors file whose arrays have dtypes of their own."""
    table, content = {}, b""
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        table[name] = {
            "dtype": NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.fixture
def quantized(tmp_path):
    """(directory, its arrays with the blocks undone one by one): blocks end before the dims do."""
    config = ModelConfig(**{**SAME, "d_model": 160, "head_dim": 40, "d_ff": 200, "num_layers": 1})
    model = build_model(config)
    export(tmp_path / "a", config, model, reader(random_weights(model)), family="llama")
    tensors, arrays, wanted = Tensors(tmp_path / "a"), {}, {}
    for name in tensors:
        array = np.array(tensors[name])
        if name.endswith("proj.weight"):
            scales = np.random.default_rng(len(name)).uniform(0.5, 2, [-(-n // 128) for n in array.shape])
            scales, small = scales.astype(np.float32), array.astype(jnp.float8_e4m3fn)
            arrays |= {name: small, name + "_scale_inv": scales}
            array = small.astype(np.float32)
            for i, j in np.ndindex(*scales.shape):
                array[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scales[i, j]
        else:
            arrays[name] = array
        wanted[name] = array
    write_mixed(tmp_path / "a/model.safetensors", arrays)
    say(tmp_path / "a", ABOUT)
    return tmp_path / "a", arrays, wanted


def say(directory, about):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": about}))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_blocks_are_undone_in_the_parameters_dtype(quantized, dtype):
    directory, _, wanted = quantized
    there = Published(directory)
    model = build_model(there.config)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), placed(model))
    got = jax.device_get(there.weights(like, model))["segments"]["0"]["0"]
    prefix = "model.layers.0."
    up = np.stack([wanted[f"{prefix}mlp.{x}_proj.weight"].T for x in ("gate", "up")], axis=1)
    np.testing.assert_array_equal(got["mlp"]["up"][0], up.astype(dtype))
    q = wanted[prefix + "self_attn.q_proj.weight"].reshape(4, 40, 160).transpose(2, 0, 1)
    np.testing.assert_array_equal(got["attention"]["q"][0], q.astype(dtype))


def test_other_blocks_and_scales_without_an_array_are_refused(quantized):
    directory, arrays, _ = quantized
    name = "model.layers.0.mlp.up_proj.weight"
    write_mixed(directory / "model.safetensors", {**arrays, name + "_scale_inv": np.ones((1, 1), np.float32)})
    with pytest.raises(
        ValueError, match=r"up_proj.weight_scale_inv is \[1, 1\]; of \[200, 160\] it must be \[2, 2\]"
    ):
        Published(directory)
    more = {**arrays, "model.norm.bias_scale_inv": np.ones((2, 2), np.float32)}
    write_mixed(directory / "model.safetensors", more)
    there = Published(directory)
    with pytest.raises(ValueError, match="model.norm.bias_scale_inv is not part of this model"):
        there.slots(build_model(there.config))
    say(directory, {**ABOUT, "weight_block_size": [64, 64]})
    with pytest.raises(ValueError, match="quantization_config"):
        Published(directory)
