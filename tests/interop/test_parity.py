"""Published families against transformers itself: logits of 512 tokens, and 64 tokens of greedy text.

The oracle runs in an environment of its own (`make torch-env`, or CAMBRIAN_TORCH_PYTHON names its Python):
nothing of ours imports it. Every parameter is random, norms, biases and routers' biases too.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokens.tokenizer import load_tokenizer
from interop.adapted import published
from interop.gguf import KINDS
from interop.packed.mxfp4 import dequantized
from interop.peft import factor_reader, read_adapter, write_adapter
from interop.read import Published
from interop.write import export, reader
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from scripts.export import main as export_run
from tests.interop.test_mxfp4 import packed_and_plain
from tests.interop.test_peft import ADAPTERS, adapted, base_weights, rewrite
from tests.interop.test_round_trip import MODELS
from training.loop import fit

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("CAMBRIAN_TORCH_PYTHON", ROOT / ".venv-torch/bin/python"))
KEPT = os.environ.get("CAMBRIAN_PARITY_CASES")  # a directory of cases that were made before
CASES = [
    *("llama", "llama_tied", "mistral", "qwen2", "qwen3", "seed_oss", "ernie4_5", "arcee", "phi3", "gemma"),
    *("gemma2", "gemma3_text", "gpt2", "starcoder2", "mixtral", "qwen3_moe", "dots1", "deepseek_v3"),
    *("kimi_flat", "deepseek_v2", "glm4_moe", "qwen3_next", "llama_own_yarn", "ministral", "smollm3"),
    *("granite", "granitemoe", "granitemoeshared", "olmo2", "olmo3", "olmoe", "flex_olmo", "exaone4"),
    *("exaone4_global", "glm", "glm4", "helium", "stablelm", "nemotron", "jais2", "vaultgemma"),
    *("phi3_partial", "qwen2_moe", "qwen3_next_moe", "qwen3_5", "qwen3_5_moe", "minimax_m2"),
    *("ernie4_5_moe", "deepseek_mscales", "gpt_oss", "qwen2_moe_sparse"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists() and "CAMBRIAN_REQUIRE_TORCH" not in os.environ,
        reason="needs transformers in an environment of its own: make torch-env",
    ),
]


def case(name, tmp_path):
    if KEPT and (Path(KEPT) / name / "greedy.npy").exists():
        return Path(KEPT) / name
    subprocess.run(
        [PYTHON, "tests/interop/oracle.py", name, tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    return tmp_path


def weights_of(there):
    """(model, parameters) of a directory, on one device."""
    model = build_model(there.config)
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.info)
    return model, there.weights(like, model)


def forward_of(model, params):
    @jax.jit
    def forward(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}
        return model.apply(params, batch, Ops())

    return forward


# Every sixth in the suite, the others with the matrix: each takes ten seconds of PyTorch.
SAMPLED = [
    name if number % 6 == 0 else pytest.param(name, marks=pytest.mark.matrix)
    for number, name in enumerate(CASES)
]


@pytest.mark.parametrize("name", SAMPLED)
def test_logits_and_greedy_text_are_those_of_transformers(name, tmp_path):
    directory = case(name, tmp_path)
    there = Published(directory)
    forward = forward_of(*weights_of(there))
    wanted = np.load(directory / "logits.npy")
    got = np.asarray(forward(jnp.asarray(np.load(directory / "tokens.npy"))))[0]
    apart = np.abs(got - wanted).max(axis=-1) / wanted.std()
    # Experts amplify rounding: a token near a tie goes elsewhere, and all behind it with it. So does a state
    # that is written to 512 times: the two forms of the delta rule there are 4e-4 apart at their worst.
    assert np.median(apart) < 2e-5
    if there.config.moe is None and there.config.delta is None:
        assert apart.max() < 2e-5
    greedy = np.load(directory / "greedy.npy")
    scores = np.asarray(forward(jnp.asarray(greedy)))[0, 15:-1]
    np.testing.assert_array_equal(scores.argmax(axis=-1), greedy[0, 16:])
    print(f"{name}: median {np.median(apart):.2e}, largest {apart.max():.2e} deviations")


def test_longrope_is_that_of_transformers_for_short_and_for_long_texts(tmp_path):
    """Theirs takes a list by the text at hand, ours by the length that the model is for."""
    directory = case("phi3_longrope", tmp_path / "kept")
    long = Published(directory)
    model, params = weights_of(long)
    texts = {512: (directory, np.load(directory / "logits.npy"))}
    export(tmp_path / "short", long.config, model, reader(params), family="phi3")
    np.save(tmp_path / "short/tokens.npy", np.load(directory / "tokens.npy")[:, :128])
    subprocess.run([PYTHON, "tests/interop/oracle.py", "open", tmp_path / "short"], cwd=ROOT, check=True)
    texts[128] = (tmp_path / "short", np.load(tmp_path / "short/logits.npy"))
    for length, (where, wanted) in texts.items():
        tokens = jnp.asarray(np.load(where / "tokens.npy"))
        for size in texts:
            forward = forward_of(build_model(replace(long.config, max_seq_len=size)), params)
            apart = np.abs(np.asarray(forward(tokens))[0] - wanted).max() / wanted.std()
            assert apart < 2e-5 if size == length else apart > 1e-2
            if length == size == 128:  # and what is written while a text is short
                greedy = np.load(directory / "greedy.npy")
                scores = np.asarray(forward(jnp.asarray(greedy)))[0, 15:-1]
                np.testing.assert_array_equal(scores.argmax(axis=-1), greedy[0, 16:])
            print(f"longrope, {length} tokens by the list for {size}: {apart:.2e} deviations")


def test_a_run_that_was_exported_is_opened_by_transformers(ground, tmp_path):
    """Without a missing or an unexpected key; the same logits, and the same ids of a text and back."""
    words = ("training.num_steps=4", "eval.every=4", "checkpoint.every=4", "schedule.warmup_steps=1")
    bpe = ("tokenizer=bpe", "tokenizer.vocab_size=300", "model.qk_norm=true", "model.tie_embeddings=false")
    assert fit(ground.config("opened", *words, *bpe)) == 0
    directory = tmp_path / "out"
    assert export_run([str(ground.run("opened")), f"output={directory}"]) == 0
    there = Published(directory)
    tokens = np.random.default_rng(0).integers(3, 300, (1, 200))
    np.save(directory / "tokens.npy", tokens)
    text = "the quick brown fox jumps over\n  lazy dogs: def f(x): return x  # \u00e9"
    (directory / "text.txt").write_text(text, "utf-8")
    subprocess.run([PYTHON, "tests/interop/oracle.py", "open", directory], cwd=ROOT, check=True)
    wanted = np.load(directory / "logits.npy")
    got = np.asarray(forward_of(*weights_of(there))(jnp.asarray(tokens)))[0]
    assert there.family.name == "qwen3" and np.abs(got - wanted).max() < 2e-5 * wanted.std()
    ours = load_tokenizer(directory / "tokenizer.json").encode(text)
    np.testing.assert_array_equal(np.load(directory / "ids.npy"), ours)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_opened_and_saved_again_by_peft(dora, tmp_path):
    """Its logits are ours to 1e-5 of their deviation, and what it saves is what it was given."""
    size = 0.25  # or attention looks at one token, and rounding decides at which
    asked = replace(ADAPTERS, dora=dora)
    model, rules, weights = adapted("llama", asked, size=size)
    base = base_weights(model, size)
    export(tmp_path / "base", ModelConfig(**MODELS["llama"]), model, reader(base))
    write_adapter(tmp_path / "adapter", model, rules, asked, factor_reader(weights))
    tokens = np.random.default_rng(0).integers(3, 40, (1, 60))
    np.save(tmp_path / "tokens.npy", tokens)
    subprocess.run([PYTHON, "tests/interop/oracle.py", "peft", tmp_path], cwd=ROOT, check=True)
    wanted = np.load(tmp_path / "logits.npy")
    got = np.asarray(forward_of(model, jax.tree.map(jnp.asarray, weights))(jnp.asarray(tokens)))[0]
    assert np.abs(got - wanted).max() < 1e-5 * wanted.std()
    # Merged into its base as init_from takes it, the same.
    rewrite(tmp_path / "adapter", base_model_name_or_path="someone/base")
    whole = np.asarray(forward_of(*weights_of(published(tmp_path / "adapter")))(jnp.asarray(tokens)))[0]
    assert np.abs(whole - wanted).max() < 1e-5 * wanted.std()
    adapters, there = read_adapter(tmp_path / "again", model, rules)
    back = there.applied(model, adapters, base)
    jax.tree.map(np.testing.assert_array_equal, back, weights)


def test_experts_in_mxfp4_are_what_transformers_dequantizes(tmp_path):
    """To the bit, of every byte; and the same logits of a directory that it opens itself."""
    rng = np.random.default_rng(0)
    scales = rng.integers(0, 255, (4, 40, 3), np.uint8)
    scales[scales > 252] = 120  # or infinite
    blocks = rng.integers(0, 256, (*scales.shape, 16), np.uint8)
    np.save(tmp_path / "blocks.npy", blocks)
    np.save(tmp_path / "scales.npy", scales)
    directory = tmp_path / "there"
    packed_and_plain(directory, tmp_path / "plain")
    tokens = np.random.default_rng(0).integers(3, 40, (1, 60))
    np.save(directory / "tokens.npy", tokens)
    for mode, where in (("mxfp4", tmp_path), ("open", directory)):
        subprocess.run([PYTHON, "tests/interop/oracle.py", mode, where], cwd=ROOT, check=True)
    got = dequantized(np.moveaxis(blocks, 1, -1), np.moveaxis(scales, 1, -1))
    np.testing.assert_array_equal(got.view(np.uint32), np.load(tmp_path / "numbers.npy").view(np.uint32))
    wanted = np.load(directory / "logits.npy")
    there = Published(directory)
    apart = np.abs(np.asarray(forward_of(*weights_of(there))(jnp.asarray(tokens)))[0] - wanted)
    assert np.median(apart.max(axis=-1)) < 2e-5 * wanted.std()


def test_blocks_are_decoded_as_by_the_gguf_package(tmp_path):
    """Each kind, to the bit, whatever the bytes are but for infinite scales."""
    rng, blocks = np.random.default_rng(0), {}
    for name, kind in KINDS.items():
        if kind.decode is not None:
            found = rng.integers(0, 256, (500, kind.bytes), np.uint8)
            with np.errstate(all="ignore"):
                blocks[name] = found[np.isfinite(kind.decode(found)).all(axis=1)]
    np.savez(tmp_path / "blocks.npz", **blocks)
    subprocess.run([PYTHON, "tests/interop/oracle.py", "blocks", tmp_path], cwd=ROOT, check=True)
    numbers = np.load(tmp_path / "numbers.npz")
    assert len(blocks) == 8
    for name, found in blocks.items():
        assert len(found) > 300
        np.testing.assert_array_equal(KINDS[name].decode(found), numbers[name].reshape(len(found), -1))
