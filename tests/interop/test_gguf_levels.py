"""Quantized weights as GGUF: level by level what they were, for every grid, and what no blocks hold."""

import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.steps import Material, Quantize
from interop.gguf import GGUF, KINDS, OnGrid, write_gguf
from interop.packed.gguf_blocks import block_kind
from interop.packed.write_packed import leaves_by_path
from interop.write import reader
from interop.write_gguf import export_gguf
from models.config import ModelConfig, MoEConfig
from models.grid import half_digits, in_half
from models.ops import Ops
from models.transformer import build_model
from models.weights import QTensor, merged
from tests.interop.test_gguf import read_back
from tests.interop.test_parity import PYTHON
from tests.interop.test_round_trip import random_weights
from tests.models.decoders import make_batch

WIDE = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "d_ff": 96}
WIDE |= {"vocab_size": 40, "tie_embeddings": False, "max_seq_len": 64}
PLAIN = {"norm": "layernorm", "bias": True, "activation": "gelu"}
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, d_expert=32)
MODELS = {
    "llama": WIDE,
    "mixtral": {**WIDE, "moe": EXPERTS},
    "phi3": {**WIDE, "rope_fraction": 0.5},  # of fused arrays
    "gpt2": {**WIDE, **PLAIN, "position": "learned", "num_kv_heads": 4},
}
GRIDS = {
    "Q8_0": {"bits": 8},
    "Q4_0": {"bits": 4, "group": 32},
    "Q4_1": {"bits": 4, "group": 32, "symmetric": False, "clip": True},
    "Q5_1": {"bits": 5, "group": 32, "symmetric": False},
    "three": {"bits": 3, "symmetric": False},
}
OF = {"three": "Q4_0"}


def quantized(name, **options):
    """(model, its weights on a grid)."""
    model = build_model(ModelConfig(**MODELS[name]))
    step = Quantize("rtn", **{"scales": "float16", "tables": 8, **options})
    params = jax.tree.map(jnp.asarray, random_weights(model))
    return step.apply(model, params, Material(lambda config: Ops(), ()))


def write(path, model, params, **words):
    packed = {name: leaf for name, leaf in leaves_by_path(params) if isinstance(leaf, QTensor)}
    export_gguf(path, model.config, model, reader(params), packed=packed, **words)


CASES = [*(("llama", grid) for grid in GRIDS), *((name, "Q4_1") for name in MODELS if name != "llama")]


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_a_file_is_the_quantized_model_to_the_bit(name, grid, tmp_path):
    model, params = quantized(name, **GRIDS[grid])
    write(tmp_path / "a.gguf", model, params)
    there, got = read_back(tmp_path / "a.gguf")
    jax.tree.map(np.testing.assert_array_equal, got, merged(params))
    kinds = {name: entry[1] for name, entry in there.tensors.entries.items()}
    assert kinds["blk.1.ffn_down.weight" if name != "mixtral" else "blk.1.ffn_down_exps.weight"] == OF.get(
        grid, grid
    )
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_model_of_such_a_file_says_the_same(tmp_path):
    model, params = quantized("llama", **GRIDS["Q4_1"])
    write(tmp_path / "a.gguf", model, params)
    _, got = read_back(tmp_path / "a.gguf")
    batch = jax.tree.map(jnp.asarray, make_batch([[32], [12, 20]], 40))
    forward = jax.jit(lambda params: model.apply(params, batch, Ops()))
    packed, plain = forward(params), forward(jax.tree.map(jnp.asarray, got))
    assert float(jnp.abs(packed - plain).max()) <= 1e-6 * float(jnp.abs(plain).max())


def test_what_no_step_has_quantized_is_as_before(tmp_path):
    model, params = quantized("llama", bits=4, tables=None, keep=["o", "down"])
    write(tmp_path / "a.gguf", model, params, kind="F16")
    there, got = read_back(tmp_path / "a.gguf")
    kinds = {name: entry[1] for name, entry in there.tensors.entries.items()}
    assert kinds["blk.0.attn_output.weight"] == kinds["token_embd.weight"] == "F16"
    assert there.tensors.metadata["general.file_type"] == 2  # most is Q4_0
    up, was = (tree["segments"]["0"]["0"]["mlp"]["up"] for tree in (got, params))
    np.testing.assert_array_equal(up, was.astype(jnp.float32))


def on_grid(bits, symmetric):
    """(numbers with the smallest, the largest and all kinds of scales, whatever the zero; their blocks)."""
    kind, rng = block_kind(bits, symmetric=symmetric), np.random.default_rng(bits)
    digits = half_digits(bits, symmetric) if kind.endswith("_1") else 11
    sizes = np.exp2(rng.uniform(-24, 10, 400)).astype(np.float32)
    scale = np.asarray(in_half(sizes, digits))
    near = np.abs(scale / sizes - 1) <= 2.0**-digits
    assert (scale.astype(np.float16) == scale).all() and near[sizes > 2.0**-14].all()
    top = 2 ** (bits - 1) - 1
    zero = 0 if symmetric else rng.integers(-top - 1, top + 1, (400, 1))
    levels = rng.integers(-top if symmetric else -top - 1, top + 1, (400, 32))
    return OnGrid((levels - zero).astype(np.int8), np.repeat(scale[:, None], 32, axis=1)), kind


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_every_level_of_every_grid_has_its_place(bits, symmetric):
    array, kind = on_grid(bits, symmetric)
    blocks = array.blocks(kind)
    assert blocks.shape == (400, KINDS[kind].bytes)
    np.testing.assert_array_equal(KINDS[kind].decode(blocks), array.numbers())


def test_a_scale_is_the_nearest_number_of_float16():
    sizes = np.exp2(np.random.default_rng(0).uniform(-26, 15, 5000)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(in_half)(sizes), sizes.astype(np.float16).astype(np.float32))


@pytest.mark.skipif(
    not PYTHON.exists() and "CAMBRIAN_REQUIRE_TORCH" not in os.environ, reason="make torch-env"
)
def test_the_package_of_the_format_reads_the_same_numbers(tmp_path):
    arrays, kinds = {}, {}
    for bits, symmetric in [(8, True), *((bits, s) for bits in (4, 5) for s in (True, False))]:
        array, kind = on_grid(bits, symmetric)
        arrays[kind], kinds[kind] = array, kind
    shapes = {name: array.shape for name, array in arrays.items()}
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, shapes, kinds, arrays.items())
    code = """if True:
        import sys, numpy, gguf
        there = gguf.GGUFReader(sys.argv[1]).tensors
        numpy.savez(sys.argv[2], **{t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in there})
    """
    subprocess.run([PYTHON, "-c", code, tmp_path / "a.gguf", tmp_path / "a.npz"], check=True)
    theirs, ours = np.load(tmp_path / "a.npz"), GGUF(tmp_path / "a.gguf")
    assert set(theirs) == set(ours) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array.numbers())
        np.testing.assert_array_equal(ours[name], array.numbers())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "llama",
            {"bits": 8, "floating": True},
            "floating=true: GGUF has no such blocks; use symmetric bits=8",
        ),
        ("llama", {"bits": 8, "symmetric": False}, "bits=8 symmetric=false: GGUF has no such blocks"),
        ("llama", {"group": 16}, "group=16 must be a multiple of GGUF's 32, or null"),
        ("llama", {"scales": "float32"}, "has scales that GGUF's float16 cannot hold; .* scales: float16"),
        (
            "phi3",
            {"keep": ["q"]},
            "attn_qkv.weight would be quantized in part; quantize all projections in it",
        ),
    ],
)
def test_what_no_blocks_hold_is_one_line(name, options, says, tmp_path):
    model, params = quantized(name, **options)
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "a.gguf", model, params)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_no_blocks_and_arrays_of_two_grids_are_one_line(tmp_path):
    narrow = build_model(ModelConfig(**{**WIDE, "d_ff": 48}))
    rest = Material(lambda config: Ops(), ())
    params = jax.tree.map(jnp.asarray, random_weights(narrow))
    _, packed = Quantize("rtn", 8, scales="float16").apply(narrow, params, rest)
    with pytest.raises(ValueError, match="ffn_down.weight has rows of 48 inputs, which are no blocks of 32"):
        write(tmp_path / "a.gguf", narrow, packed)
    fused = build_model(ModelConfig(**MODELS["phi3"]))
    params = jax.tree.map(jnp.asarray, random_weights(fused))
    others = ["kv", "o", "up", "down"]
    _, packed = Quantize("rtn", 8, scales="float16", keep=others).apply(fused, params, rest)
    _, packed = Quantize("rtn", 4, scales="float16", keep=["q"]).apply(fused, packed, rest)
    with pytest.raises(
        ValueError, match="attn_qkv.weight would be of Q4_0 and Q8_0; quantize its parts alike"
    ):
        write(tmp_path / "a.gguf", fused, packed)
