"""Experts in MXFP4, as GPT-OSS's files have them, are read as the numbers that they stand for."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interop.packed.mxfp4 import dequantized
from interop.read import Published
from interop.safetensors import Tensors
from interop.write import export, reader
from models.config import ModelConfig
from models.transformer import build_model
from tests.interop.test_fp8 import say, write_mixed
from tests.interop.test_round_trip import EXPERTS, MODELS, placed, random_weights

ABOUT = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
SIZES = {"d_model": 64, "head_dim": 16, "d_ff": 32, "moe": replace(EXPERTS, d_expert=32), "num_layers": 4}
E2M1 = {
    **{0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0},
    **{8: -0.0, 9: -0.5, 10: -1.0, 11: -1.5, 12: -2.0, 13: -3.0, 14: -4.0, 15: -6.0},
}


def written_out(blocks, scales):
    """[E, in, out] of blocks [E, out, G, 16] and scales [E, out, G], a number at a time."""
    experts, out, groups = scales.shape
    found = np.empty((experts, 32 * groups, out), np.float32)
    for (e, o, g), scale in np.ndenumerate(scales):
        for b, byte in enumerate(blocks[e, o, g].tolist()):
            for half, level in enumerate((byte % 16, byte // 16)):
                found[e, 32 * g + 2 * b + half, o] = E2M1[level] * 2.0 ** (int(scale) - 127)
    return found


def packed_and_plain(packed, plain):
    """Write both directories of one model; the arrays of the former."""
    config = ModelConfig(**{**MODELS["gpt_oss"], **SIZES})
    model = build_model(config)
    # Or attention looks at one token, and rounding decides at which.
    params = jax.tree.map(lambda x: x * np.float32(0.25), random_weights(model))
    for directory in (packed, plain):
        export(directory, config, model, reader(params), family="gpt_oss")
    tensors, rng = Tensors(plain), np.random.default_rng(1)
    arrays = {name: np.array(tensors[name]) for name in tensors}
    numbers = dict(arrays)
    for name, array in numbers.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, size, out = arrays.pop(name).shape
            scales = rng.integers(121, 125, (experts, out, size // 32), np.uint8)
            blocks = rng.integers(0, 256, (*scales.shape, 16), np.uint8)
            arrays |= {name + "_blocks": blocks, name + "_scales": scales}
            numbers[name] = written_out(blocks, scales)
            assert numbers[name].shape == array.shape
    write_mixed(plain / "model.safetensors", numbers)
    write_mixed(packed / "model.safetensors", arrays)
    say(packed, ABOUT)
    return arrays


@pytest.fixture
def both(tmp_path):
    """(a directory with packed experts, its arrays, one with the numbers that they stand for)."""
    arrays = packed_and_plain(tmp_path / "packed", tmp_path / "plain")
    return tmp_path / "packed", arrays, tmp_path / "plain"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_packed_experts_are_the_plain_ones_to_the_bit(both, dtype):
    packed, plain = Published(both[0]), Published(both[2])
    assert packed.config == plain.config
    model = build_model(packed.config)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), placed(model))
    got, wanted = (jax.device_get(there.weights(like, model)) for there in (packed, plain))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(packed.tensors[name], plain.tensors[name])
    assert plain.config.moe.d_expert == 32 and float(np.abs(plain.tensors[name]).max()) > 0


def test_a_device_reads_its_slice_also_where_it_cuts_a_group(both):
    """Experts, inputs and outputs split over eight devices, sixteen inputs on each: half of a group."""
    packed, plain = Published(both[0]), Published(both[2])
    model = build_model(packed.config)
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    for axes in ({"expert_embed": "b", "experts": "a"}, {"expert_embed": "a", "mlp": "b"}, {"layers": "a"}):

        def split(info, axes=axes):
            first = axes.get("layers"), *(axes.get(axis) for axis in info.axes[1:])
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*first))
            return jax.ShapeDtypeStruct(info.shape, np.float32, sharding=sharding)

        experts = model.info["segments"]["0"]["1"]["mlp"]
        like = {"segments": {"0": {"1": {"mlp": jax.tree.map(split, experts)}}}}
        got, wanted = (jax.device_get(there.weights(like, model)) for there in (packed, plain))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_every_byte_is_the_tables_two_values():
    blocks = np.arange(256, dtype=np.uint8).reshape(2, 8, 1, 16)
    scales = np.array([0, 1, 64, 120, 126, 127, 128, 200] * 2, np.uint8).reshape(2, 8, 1)
    got = dequantized(np.moveaxis(blocks, 1, -1), np.moveaxis(scales, 1, -1))
    np.testing.assert_array_equal(got.view(np.uint32), written_out(blocks, scales).view(np.uint32))


def without_scales(arrays, name):
    del arrays[name + "_scales"]


def without_blocks(arrays, name):
    del arrays[name + "_blocks"]


def fewer_scales(arrays, name):
    arrays[name + "_scales"] = arrays[name + "_scales"][..., :1].copy()


def fewer_groups(arrays, name):
    for part in ("_scales", "_blocks"):
        arrays[name + part] = arrays[name + part][:, :, :1].copy()


def wider_blocks(arrays, name):
    arrays[name + "_blocks"] = np.tile(arrays[name + "_blocks"], 2)


def plain_too(arrays, name):
    arrays[name] = np.zeros((4, 64, 64), np.float32)


def no_number(arrays, name):
    arrays[name + "_scales"][1, 2, 0] = 255


DAMAGED = {
    "scales": (without_scales, r"gate_up_proj_blocks is \[4, 64, 2, 16\] and .*gate_up_proj_scales None"),
    "blocks": (without_blocks, "gate_up_proj_blocks is None"),
    "fewer scales": (fewer_scales, r"gate_up_proj_scales \[4, 64, 1\]; they must be"),
    "fewer groups": (fewer_groups, r"gate_up_proj is \[4, 32, 64\], and this model's is \[4, 64, 64\]"),
    "wider": (wider_blocks, r"gate_up_proj_blocks is \[4, 64, 2, 32\]"),
    "plain too": (plain_too, "gate_up_proj twice, packed and plain"),
    "no number": (no_number, "a scale of mxfp4 is 255"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_blocks_are_refused_in_one_line(how, both):
    damage, says = DAMAGED[how]
    directory, arrays, _ = both
    damage(arrays, "model.layers.1.mlp.experts.gate_up_proj")
    write_mixed(directory / "model.safetensors", arrays)
    with pytest.raises(ValueError, match=says) as caught:
        there = Published(directory)
        model = build_model(there.config)
        there.weights(placed(model), model)
    assert "\n" not in str(caught.value)


def test_what_else_is_said_of_blocks_is_refused(both):
    directory = both[0]
    say(directory, {**ABOUT, "group_size": 16})
    with pytest.raises(ValueError, match="quantization_config.group_size=16 of mxfp4 is not supported"):
        Published(directory)
    say(directory, ABOUT)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "model_type": "olmoe"}))
    with pytest.raises(ValueError, match="quantization_config"):
        Published(directory)
