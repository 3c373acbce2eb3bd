"""GGUF files: out and in again, blocks, what is refused, and tokenizers that come with them."""

import struct

import jax
import numpy as np
import pytest

from interop.gguf import GGUF, KINDS, quantized, write_gguf
from interop.read import Published
from interop.write import reader
from interop.write_gguf import export_gguf
from models.config import ModelConfig, RopeScaling
from models.transformer import build_model
from tests.interop.test_round_trip import MODELS, SAME, SMALL, placed, random_weights

NAMES = {
    "llama": {
        **SAME,
        "d_model": 64,
        "head_dim": 16,
        "bias": True,
        "rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_length=64),
    },
    "mixtral": MODELS["mixtral"],
    "qwen2": {
        **SAME,
        "qkv_bias": True,
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=32),
    },
    "qwen3": {**SMALL, "qk_norm": True, "tie_embeddings": True},
    "qwen3_moe": MODELS["qwen3_moe"],
    "gemma": MODELS["gemma"],
    "gemma2": {**MODELS["gemma2"], "attention_scale": None},
    "gemma3_text": {**MODELS["gemma3_text"], "window_pattern": ["local"] * 5 + ["global"], "num_layers": 6},
    "phi3": {**SMALL, "head_dim": 8, "rope_fraction": 0.5},
    "starcoder2": {**MODELS["starcoder2"], "window_pattern": ["global"], "window": None},
    "gpt2": MODELS["gpt2"],
}


def written(path, name, kind="F32"):
    """(config, parameters) of a small model that lies in `path` as GGUF."""
    config = ModelConfig(**NAMES[name])
    model = build_model(config)
    params = random_weights(model)
    export_gguf(path, config, model, reader(params), kind=kind)
    return config, params


def read_back(path):
    there = Published(path)
    model = build_model(there.config)
    return there, jax.device_get(there.weights(placed(model), model))


@pytest.mark.parametrize("name", NAMES)
def test_out_and_in_again_is_the_same(name, tmp_path):
    config, params = written(tmp_path / "a.gguf", name)
    there, got = read_back(tmp_path / "a.gguf")
    assert there.family.name == name and there.config.rope_fraction == config.rope_fraction
    # 1 + w is rounded; all else is the same to the bit.
    tolerance = 3e-7 if config.norm_unit_offset else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, params)


@pytest.mark.parametrize(("kind", "error"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2)])
def test_fewer_bits_are_the_nearest_numbers(kind, error, tmp_path):
    config, params = written(tmp_path / "a.gguf", "qwen3", kind)
    there, got = read_back(tmp_path / "a.gguf")
    kinds = {entry[1] for entry in there.tensors.entries.values()}
    assert kinds == ({"F32", "F16"} if kind == "Q8_0" else {"F32", kind})  # 16 columns are no block of 32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error, rtol=0), got, params)


def test_blocks_of_eight_bits_are_the_nearest_of_their_levels():
    x = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    x[3] = 0
    blocks = quantized(x)
    back = KINDS["Q8_0"].decode(blocks.reshape(-1, 34)).reshape(x.shape)
    step = np.abs(x.reshape(40, 2, 32)).max(axis=-1, keepdims=True) / 127
    assert (np.abs(back - x).reshape(40, 2, 32) <= step * 0.57 + 1e-12).all() and not back[3].any()


def scalar_q4_1(block):
    """One block by the format's own words: a scale, an offset, and 32 times four bits."""
    scale, offset = struct.unpack("<2e", block[:4])
    low, high = [byte & 15 for byte in block[4:]], [byte >> 4 for byte in block[4:]]
    return [np.float32(scale) * level + np.float32(offset) for level in low + high]


def scalar_q6_k(block):
    scale = np.float32(struct.unpack("<e", block[208:])[0])
    scales = struct.unpack("<16b", block[192:208])
    found = []
    for number in range(256):
        half, place = divmod(number, 128)
        quarter, at = divmod(place, 32)
        low = block[64 * half + 32 * (quarter % 2) + at] >> (4 * (quarter // 2)) & 15
        high = block[128 + 32 * half + at] >> (2 * quarter) & 3
        found.append(scale * np.float32(scales[number // 16]) * ((low | high << 4) - 32))
    return found


@pytest.mark.parametrize(("name", "scalar"), [("Q4_1", scalar_q4_1), ("Q6_K", scalar_q6_k)])
def test_blocks_are_decoded_number_by_number(name, scalar):
    kind = KINDS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (20, kind.bytes), np.uint8)
    halves = [(0, 2), (2, 4)] if name == "Q4_1" else [(208, 210)]
    for first, last in halves:  # no infinities among the scales
        blocks[:, first:last] = np.random.default_rng(1).normal(size=(20, 1)).astype("<f2").view(np.uint8)
    wanted = np.array([scalar(block.tobytes()) for block in blocks], np.float32)
    np.testing.assert_array_equal(kind.decode(blocks), wanted)


def test_a_quantized_file_is_the_model_of_its_decoded_arrays(tmp_path):
    """The same file with each array as float32 gives the same parameters, whoever asks for which part."""
    config = ModelConfig(**{**NAMES["qwen3"], "d_model": 32, "d_ff": 64, "head_dim": 8})
    model = build_model(config)
    export_gguf(tmp_path / "a.gguf", config, model, reader(random_weights(model)), kind="Q8_0")
    file = GGUF(tmp_path / "a.gguf")
    shapes = {name: entry[2] for name, entry in file.entries.items()}
    arrays = ((name, np.array(file[name])) for name in file)
    write_gguf(tmp_path / "b.gguf", file.metadata, shapes, dict.fromkeys(shapes, "F32"), arrays)
    jax.tree.map(np.testing.assert_array_equal, *(read_back(tmp_path / f"{x}.gguf")[1] for x in "ab"))


def change(metadata=(), arrays=()):
    def damage(path):
        file = GGUF(path)
        values = {k: v for k, v in (file.metadata | dict(metadata)).items() if v is not None}
        content = {name: np.array(file[name]) for name in file} | dict(arrays)
        content = {name: array for name, array in content.items() if array is not None}
        shapes = {name: array.shape for name, array in content.items()}
        write_gguf(path, values, shapes, dict.fromkeys(shapes, "F32"), content.items())

    return damage


def overwrite(begin, content):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[begin : begin + len(content)] = content
        path.write_bytes(data)

    return damage


UP = "blk.1.ffn_up.weight"
DAMAGED = {
    "no magic": (overwrite(0, b"GGML"), "is no GGUF file"),
    "version": (overwrite(4, b"\x09"), "of version 2 or 3"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "lies beyond"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:300]), "damaged or no GGUF"),
    "missing": (change(arrays={UP: None}), "ffn_up.weight is missing"),
    "extra": (change(arrays={"blk.9.ffn_up.weight": np.ones((24, 16))}), "blk.9.ffn_up.weight is not part"),
    "transposed": (change(arrays={UP: np.ones((16, 24))}), r"ffn_up.weight is \[16, 24\]"),
    "architecture": (change({"general.architecture": "mamba"}), "general.architecture=mamba is not one of"),
    "unknown key": (change({"llama.logit_scale": 0.5}), "llama.logit_scale=0.5 is not understood"),
    "partial": (change({"llama.rope.dimension_count": 2}), "dimension_count=2 is not supported; only 4 is"),
    "values": (change({"llama.attention.value_length": 6}), "value_length=6 is not supported; only 4 is"),
    "stretching": (
        change({"llama.rope.scaling.type": "longrope"}),
        "rope.scaling.type=longrope is not one of",
    ),
    "planes": (change(arrays={"rope_freqs.weight": np.array([2.0, 1.0])}), "is not Llama 3's"),
    "no width": (change({"llama.embedding_length": None}), "embedding_length is missing"),
    "parts": (change({"split.count": 2}), "in 2 files"),
    "adapter": (change({"general.type": "adapter"}), "is a adapter"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "llama.gguf"
    config = ModelConfig(**SAME)
    model = build_model(config)
    export_gguf(path, config, model, reader(random_weights(model)))
    return path


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_or_strange_file_is_refused_in_one_line(how, sound, tmp_path):
    damage, says = DAMAGED[how]
    path = tmp_path / "there.gguf"
    path.write_bytes(sound.read_bytes())
    damage(path)
    with pytest.raises(ValueError, match=says) as caught:
        there = Published(path)
        there.slots(build_model(there.config))
    assert "\n" not in str(caught.value)


def test_any_byte_of_a_header_may_be_wrong(sound, tmp_path):
    """It is refused in one line, or is part of a name or a value that nobody can check."""
    content, path = sound.read_bytes(), tmp_path / "a.gguf"
    size = min(entry[3] for entry in GGUF(sound).entries.values())
    refused = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        damaged = bytearray(content)
        damaged[rng.integers(size)] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            GGUF(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 40


def test_a_kind_that_is_not_read_is_refused_by_its_number(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": "llama"}, {"x": (32,)}, {"x": "F32"}, [("x", np.ones(32))])
    path.write_bytes(path.read_bytes().replace(struct.pack("<QIQ", 32, 0, 0), struct.pack("<QIQ", 32, 29, 0)))
    with pytest.raises(ValueError, match="x is of kind 29, which is not supported; use a file of F32, "):
        GGUF(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "relu2"}, "do not compute this model"),
        ({"window": 8, "window_pattern": ["local"]}, "do not compute this model"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute_is_not_written(change, says, tmp_path):
    config = ModelConfig(**{**SAME, **change})
    with pytest.raises(ValueError, match=says):
        export_gguf(tmp_path / "a.gguf", config, build_model(config), reader({}))
    assert not list(tmp_path.iterdir())
