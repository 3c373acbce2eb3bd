"""Exported directories in vLLM itself: the same greedy tokens, the same ids of every text.

It runs in an environment of its own (`make vllm-env`, or CAMBRIAN_VLLM_PYTHON names its Python), once for all
families. Its attention on a CPU takes heads of 32 and more; models have that and are tiny otherwise.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from data.tokens.tokenizer import Tokenizer
from interop.gguf_tokenizer import tokenizer_files
from interop.tokenizer_out import hub_files
from interop.write import export, reader
from models.config import ModelConfig, MoEConfig, RopeScaling
from models.ops import Ops
from models.transformer import build_model
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from tests.interop.test_llama_cpp import BASE as NARROW
from tests.interop.test_llama_cpp import CAPS, GEMMA, PLAIN, THETAS, weights_that_say_something
from tests.interop.test_tokenizers import byte_level, nasty, sentencepiece_values

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("CAMBRIAN_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists() and "CAMBRIAN_REQUIRE_VLLM" not in os.environ,
        reason="needs vLLM in an environment of its own: make vllm-env",
    ),
]
HEADS = {"head_dim": 32}
BASE = {**NARROW, **HEADS}
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, d_expert=32)
CASES = {
    "llama": {**BASE, "rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_length=64)},
    "mistral": {**BASE, "window": 16},
    "qwen2": {
        **BASE,
        "qkv_bias": True,
        "num_heads": 2,
        "num_kv_heads": 1,
    },  # heads of d_model over their number
    "qwen3": {**BASE, "qk_norm": True, "tie_embeddings": True},
    "phi3": {**BASE},
    "gpt2": {
        **BASE,
        **PLAIN,
        "position": "learned",
        "d_model": 64,
        "num_heads": 2,
        "num_kv_heads": 2,
        "tie_embeddings": True,
    },
    "gemma2": {**GEMMA, **HEADS, **CAPS, "window_pattern": ["local", "global"]},
    "gemma3_text": {
        **{**GEMMA, **HEADS, **THETAS, "num_layers": 6, "qk_norm": True},
        "window_pattern": [*["local"] * 5, "global"],
    },
    "exaone4": {
        **{**BASE, "post_norms": "only", "qk_norm": True, "window": 16},
        "window_pattern": ["local", "nope"],
    },
    "mixtral": {**BASE, "moe": EXPERTS},
    "qwen3_moe": {**BASE, "qk_norm": True, "moe": EXPERTS},
}


def tokenizer_of(name):
    """(its tokenizer.json, ours): byte-level, of Gemma a SentencePiece vocabulary."""
    pieces = name.startswith("gemma")
    text = tokenizer_files(sentencepiece_values(), "")["tokenizer.json"] if pieces else byte_level()[0]
    names = ("<s>", "</s>") if pieces else ("<|im_start|>", "<|im_end|>")
    return text, Tokenizer(text, named=dict(zip(("bos_token", "eos_token"), names, strict=True)))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Of each family (what we say, what vLLM says): greedy tokens behind a prompt, ids of texts."""
    root = tmp_path_factory.mktemp("vllm")
    asked, ours = {}, {}
    for name, sizes in CASES.items():
        text, tokenizer = tokenizer_of(name)
        config = ModelConfig(**{**sizes, "vocab_size": tokenizer.vocab_size})
        model = build_model(config)
        params = weights_that_say_something(model, config.norm_unit_offset)
        files = hub_files(text, tokenizer, None, None, config.max_seq_len)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        export(root / name, config, model, reader(params), family=name, files=files, extra=ids)
        prompt = [tokenizer.bos_id, *tokenizer.encode("the quick brown fox jumps over 12345").tolist()]
        asked[name] = {"directory": str(root / name), "prompt": prompt, "texts": nasty()}
        (greedy,) = Generator(model, params, Ops()).complete(
            [prompt], Sampling(0), sample_keys(0, range(1)), max_new_tokens=64
        )
        cut = [[tokenizer.bos_id, *one.tolist()] for one in tokenizer.encode_batch(nasty())]
        ours[name] = {"greedy": greedy, "ids": cut}
    (root / "asked").write_text(json.dumps(asked), "utf-8")
    command = [PYTHON, "-P", "tests/interop/vllm_greedy.py", root / "asked", root / "answered"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ours, json.loads((root / "answered").read_text("utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_and_ids_are_those_of_vllm(name, read):
    ours, theirs = (side[name] for side in read)
    assert "error" not in theirs, theirs["error"]
    assert theirs["greedy"] == ours["greedy"] and len(set(ours["greedy"])) >= 3
    specials = tokenizer_of(name)[1].specials_by_id.values()
    for text, their_ids, our_ids in zip(nasty(), theirs["ids"], ours["ids"], strict=True):
        if not any(special in text for special in specials):  # which theirs takes for what it spells
            assert their_ids == our_ids, repr(text)
