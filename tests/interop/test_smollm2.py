"""A real model that nobody here wrote, SmolLM2-135M-Instruct from its GGUF file, against transformers."""

import argparse
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokens.tokenizer import load_tokenizer
from interop.gguf_tokenizer import write_tokenizer
from interop.read import Published
from models.ops import Ops
from tests.interop.test_parity import PYTHON, ROOT, weights_of

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = Path(os.environ.get("CAMBRIAN_SMOLLM2", ROOT / ".cache/smollm2" / NAME))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FILE.exists() and "CAMBRIAN_REQUIRE_SMOLLM2" not in os.environ, reason="needs make smollm2"
    ),
]


@pytest.mark.skipif(
    not PYTHON.exists() and "CAMBRIAN_REQUIRE_TORCH" not in os.environ, reason="needs make torch-env"
)
def test_logits_of_two_thousand_tokens_are_those_of_transformers(tmp_path):
    """Its own loader and forward: the same ids of a text, the same best token everywhere, logits to 1e-3."""
    there = Published(FILE)
    tokenizer = load_tokenizer(write_tokenizer(there.tensors.metadata, tmp_path, str(FILE)))
    text = Path(argparse.__file__).read_text("utf-8")[:16000]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    subprocess.run([PYTHON, "tests/interop/oracle.py", "gguf", FILE, tmp_path], cwd=ROOT, check=True)
    ids = tokenizer.encode(text)[:2048]
    np.testing.assert_array_equal(ids, np.load(tmp_path / "ids.npy"))
    assert len(ids) == 2048 and tokenizer.gives_back(text)
    model, params = weights_of(there)

    @jax.jit
    def forward(params, tokens):
        ones = jnp.ones_like(tokens)
        batch = {"tokens": tokens, "positions": jnp.arange(tokens.shape[1])[None], "segment_ids": ones}
        return model.apply(params, batch, Ops())[0]

    got, wanted = np.asarray(forward(params, jnp.asarray(ids)[None])), np.load(tmp_path / "logits.npy")
    np.testing.assert_array_equal(got.argmax(axis=-1), wanted.argmax(axis=-1))
    assert np.abs(got - wanted).max() < 1e-3
    print(f"largest {np.abs(got - wanted).max():.2e}, deviation of the logits {wanted.std():.2f}")
