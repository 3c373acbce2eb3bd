"""GGUF files of ours in llama.cpp itself: the same greedy text, the same ids of every text."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokens.tokenizer import Tokenizer
from interop.gguf_tokenizer import tokenizer_files, tokenizer_values
from interop.write import reader
from interop.write_gguf import export_gguf
from models.config import ModelConfig, RopeScaling
from models.transformer import build_model
from tests.interop.test_parity import PYTHON, ROOT, forward_of, pytestmark  # noqa: F401
from tests.interop.test_round_trip import random_weights
from tests.interop.test_tokenizers import byte_level, nasty, sentencepiece_values

LENGTH = 128  # of a row: one program for all prefixes
BASE = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "d_ff": 96}
BASE |= {"tie_embeddings": False, "max_seq_len": 512}
GEMMA = {**BASE, "norm_unit_offset": True, "embed_scale": True, "activation": "geglu", "post_norms": True}
GEMMA |= {"tie_embeddings": True, "window": 16}
CAPS = {"attention_softcap": 50.0, "logit_softcap": 30.0}
THETAS = {"rope_local_theta": 10000.0, "rope_theta": 1e6}
PLAIN = {"norm": "layernorm", "bias": True, "activation": "gelu"}
CASES = {
    "llama": {**BASE, "rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_length=64)},
    "qwen2": {**BASE, "qkv_bias": True},
    "qwen3": {**BASE, "qk_norm": True, "tie_embeddings": True, "head_dim": 32},
    "phi3": {**BASE, "rope_fraction": 0.5},
    "starcoder2": {**BASE, **PLAIN, "num_layers": 1},  # of two layers a random one says one word
    "gpt2": {**BASE, **PLAIN, "position": "learned", "num_kv_heads": 4},
    "gemma2": {**GEMMA, **CAPS, "window_pattern": ["local", "global"]},
    "gemma3": {
        **GEMMA,
        **THETAS,
        "num_layers": 6,
        "window_pattern": [*["local"] * 5, "global"],
        "qk_norm": True,
    },
}


def weights_that_say_something(model, offset):
    """Random, at the size that a layer keeps the stream at; norms around one."""

    def sized(info, w):
        norm = "embed" in info.axes[-1:] and info.role == "norm"
        small = 0.03 if offset and "vocab" in info.axes else 0.15  # or a token names itself for ever
        return w * np.float32(small) + np.float32(norm and not offset)

    return jax.tree.map(lambda info, w: jnp.asarray(sized(info, w)), model.info, random_weights(model))


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_and_ids_are_those_of_llama_cpp(name, tmp_path):
    gemma = name.startswith("gemma")
    text = tokenizer_files(sentencepiece_values(), "")["tokenizer.json"] if gemma else byte_level()[0]
    names = ("<s>", "</s>") if gemma else ("<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer(text, named=dict(zip(("bos_token", "eos_token"), names, strict=True)))
    config = ModelConfig(**{**CASES[name], "vocab_size": tokenizer.vocab_size})
    model = build_model(config)
    params = weights_that_say_something(model, config.norm_unit_offset)
    values = tokenizer_values(tokenizer, text, config.vocab_size, None)
    assert export_gguf(tmp_path / "a.gguf", config, model, reader(params), values=values) == name
    ids = [tokenizer.bos_id, *tokenizer.encode("the quick brown fox jumps over 12345").tolist()]
    texts = [one for one in nasty() if "\x00" not in one]  # which ends a text in C
    (tmp_path / "asked").write_text(json.dumps({"prompt": ids, "texts": texts}), "utf-8")
    command = [PYTHON, "tests/interop/llama_cpp.py", *(tmp_path / x for x in ("a.gguf", "asked", "answered"))]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    answered = json.loads((tmp_path / "answered").read_text("utf-8"))
    for one, theirs, ours in zip(texts, answered["ids"], tokenizer.encode_batch(texts), strict=True):
        assert theirs == [tokenizer.bos_id, *ours.tolist()], repr(one)
    forward, first = forward_of(model, params), len(ids)
    while len(ids) < first + 64 and ids[-1] != tokenizer.eos_id:
        row = jnp.asarray([ids + [0] * (LENGTH - len(ids))])
        ids.append(int(np.asarray(forward(row))[0, len(ids) - 1].argmax()))
    assert answered["greedy"] == ids[first:] and len(set(ids[first:])) > 3
