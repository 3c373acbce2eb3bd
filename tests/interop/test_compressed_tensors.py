"""Quantized weights go out as compressed-tensors and come in as they were, to the bit."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interop.packed.compressed_tensors import CONFIG, GRIDS
from interop.packed.write_packed import export_packed
from interop.read import Published
from interop.safetensors import Tensors, write_tensors
from models.config import ModelConfig
from models.transformer import build_model
from models.weights import QTensor, merged, quantizable, quantize
from tests.interop.test_round_trip import MODELS, random_weights

SCHEMES = {
    "int4": (4, 2, True, False),
    "int8": (8, None, True, False),
    "int4 with zeros": (4, None, False, False),
    "int8 with zeros": (8, 2, False, False),
    "three bits": (3, None, False, False),
    "float8": (8, None, True, True),
}


def of(model, params, scheme, tables=False):
    bits, group, symmetric, floating = SCHEMES[scheme]

    def leaf(path, info, w):
        if not quantizable(info) or (info.role != "matrix" and not tables) or path[0].key == "mtp":
            return w
        return quantize(info, w, bits, group, symmetric=symmetric, floating=floating)

    return jax.jit(lambda params: jax.tree_util.tree_map_with_path(leaf, model.info, params))(params)


def abstract(infos):
    place = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())

    def shaped(info):
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=place)

    return jax.tree.map(shaped, infos)


def written(name, scheme, path, **words):
    config = ModelConfig(**MODELS[name])
    model = build_model(config)
    params = of(model, random_weights(model), scheme, **words)
    export_packed(path, config, model, params, family=name)
    return model, params


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("llama", scheme) for scheme in SCHEMES),
        ("phi3", "int4"),  # several of ours in one array of theirs
        ("glm", "int8 with zeros"),  # pairs of columns
        ("qwen3_moe", "three bits"),
        ("deepseek_v3", "int8"),
        ("qwen3_5_text", "float8"),
    ],
)
def test_out_and_in_again_is_the_same_to_the_bit(name, scheme, tmp_path):
    model, params = written(name, scheme, tmp_path / "packed", tables=name == "llama")
    there = Published(tmp_path / "packed")
    known = replace(model.config, name=name)
    if known.delta is not None:  # how many positions are computed together is no part of a model
        known = replace(known, delta=replace(known.delta, chunk=there.config.delta.chunk))
    assert build_model(there.config).config == known
    infos = there.infos(model)
    packed = there.weights(abstract(infos), model)
    assert jax.tree.structure(packed) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, packed, params)
    plain = there.weights(abstract(model.info), model)  # what a run that begins with them takes
    jax.tree.map(np.testing.assert_array_equal, plain, merged(params))


def test_what_is_not_a_linear_layer_there_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"c_attn.weight is not \[outputs, inputs\] in this family"):
        written("gpt2", "int8", tmp_path / "packed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_bits": 3}, "int num_bits=3 strategy=group is not supported; use int of 4 or 8 bits"),
        ({"strategy": "tensor"}, "strategy=tensor is not supported"),
        ({"group_size": 4}, r"weight_scale is .*; of a weight .* it must be"),
        ({"symmetric": False}, "weight_zero_point is None; of a weight"),
    ],
)
def test_schemes_that_do_not_fit_are_one_line(change, said, tmp_path):
    written("llama", "int4", tmp_path / "packed")
    values = json.loads((tmp_path / "packed/config.json").read_text())
    values[CONFIG]["config_groups"]["group_0"]["weights"] |= change
    (tmp_path / "packed/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        Published(tmp_path / "packed")


def test_what_else_is_quantized_is_one_line(tmp_path):
    written("llama", "int4", tmp_path / "packed")
    path = tmp_path / "packed/config.json"
    values = json.loads(path.read_text())
    group = values[CONFIG]["config_groups"]["group_0"]
    for changed, said in (
        ({"config_groups": {"group_0": {**group, "input_activations": {"num_bits": 8}}}}, "quantizes activ"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        ({"config_groups": {"group_0": {**group, "targets": []}}}, "no group of .* says how"),
    ):
        path.write_text(json.dumps({**values, CONFIG: {**values[CONFIG], **changed}}))
        with pytest.raises(ValueError, match=said):
            Published(tmp_path / "packed")


def test_the_grid_is_said_beside_the_words_that_hold_it(tmp_path):
    _, params = written("llama", "three bits", tmp_path / "packed")
    values = json.loads((tmp_path / "packed/config.json").read_text())
    assert values[GRIDS] == {"group_0": 3}
    assert values[CONFIG]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    q = params["segments"]["0"]["0"]["attention"]["q"]
    assert isinstance(q, QTensor) and int(jnp.max(q.levels())) <= 3 and int(jnp.min(q.levels())) >= -4


def test_arrays_of_several_dtypes_lie_in_one_file(tmp_path):
    given = {"a": np.arange(3, dtype=np.int32), "b": np.ones((2, 2), np.float32)}
    shapes = {name: array.shape for name, array in given.items()}
    kinds = {"a": np.int32, "b": jnp.bfloat16}
    write_tensors(tmp_path, shapes, given.items(), kinds, shard=12)
    back = Tensors(tmp_path)
    for name, array in given.items():
        assert back[name].dtype == kinds[name]
        np.testing.assert_array_equal(back[name].astype(array.dtype), array)
