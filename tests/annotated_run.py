"""A tiny program from text to text with every annotation checked: `python -m tests.annotated_run`.

A process of its own, because the hook rewrites each module as it is imported. Types are checked while JAX
traces, so variants of the model are traced and only one is computed.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

ROOMS = ("kernels", "models", "optim", "parallel", "serving", "data")
# Their states and batches are also trees of shapes and of shardings, under the names of the arrays' types.
ABSTRACT = ("program", "state", "step")
FILES = sorted((Path(__file__).parents[1] / "training").glob("[a-z]*.py"))
TRAINING = [f"training.{file.stem}" for file in FILES if file.stem not in ABSTRACT]

with install_import_hook([*ROOMS, *TRAINING], "beartype.beartype"):
    from artifacts.checkpoints.digest import combined, digests
    from data.config import DataConfig, TokenizerConfig
    from data.loading.loader import Loader
    from data.tokens.store import TokenStore
    from data.tokens.tokenizer import train_tokenizer
    from kernels.token_losses import chunked_cross_entropy
    from models.config import ModelConfig, RopeScaling, padded_vocab
    from optim.config import AdamWConfig, CosineConfig, LionConfig, MuonConfig, WSDConfig
    from parallel.mesh import build_layout
    from serving.generator import Generator
    from serving.sampling import Sampling, sample, sample_keys
    from serving.text import complete
    from training.config import AdapterConfig, Config, TrainingConfig
    from training.evaluate import evaluate
    from training.program import build_program
    from training.state import init_state, shardings

TEXTS = [f"{number} " + "def f(x): return x\n" * (number % 4) for number in range(40)]
VARIANTS = (
    {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "tie_embeddings": True},
    {"window": 8, "window_pattern": ["local", "global"], "qk_norm": True, "post_norms": True},
    {"rope_scaling": RopeScaling("yarn", 4.0), "attention_softcap": 50.0, "logit_softcap": 30.0},
)


def store_of(tokenizer):
    framed = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(TEXTS)]
    offsets = np.cumsum([0, *map(len, framed)])
    size = sum(len(text.encode()) for text in TEXTS)
    counts = tokenizer.token_bytes()
    tokens = np.concatenate(framed).astype(np.uint16)
    return TokenStore(Path(), tokens, offsets, counts, size, tokenizer.bos_id, tokenizer.eos_id)


def program_of(optim, schedule, model, adapter=None, **training):
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    config = Config(
        model=ModelConfig(vocab_size=padded_vocab(257), **sizes, **model),
        data=DataConfig(seq_len=32),
        optim=optim,
        schedule=schedule,
        adapter=adapter,
        training=TrainingConfig(num_steps=200, loss_chunk=64, **training),
    )
    return config, build_program(config, build_layout(config.mesh, jax.devices()[:1]))


def compute():
    """Pack, train, evaluate, digest, and write."""
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    store = store_of(tokenizer)
    step = {"accumulation_steps": 2, "ema_decay": 0.9, "attention": "chunked", "remat": "dots"}
    config, program = program_of(AdamWConfig(), CosineConfig(), {}, **step)
    batches = [
        Loader(store, replace(config.data, packing=packing), global_batch_size=8, seed=0).batch(0)
        for packing in ("concat", "best_fit", "none")
    ]
    batch = jax.device_put(batches[0], shardings(program.batch))
    state = init_state(program.model, program.tx, program.state, seed=0, ema=True)
    state, metrics = program.compile_train()(state, batch)
    assert np.isfinite(metrics["loss"])
    assert evaluate(program.compile_eval(), state.params, [batch], 100)["eval/loss"] > 0
    assert combined(digests({"table": state.params["embed"]["table"], "step": state.step}))
    prompts = ["def ", "the second is long enough to be prefilled"]
    settings = replace(config.sample, max_new_tokens=3, top_k=5)
    generator = Generator(program.model, state.params, program.ops, program.layout)
    texts, _ = complete(generator, tokenizer, prompts, settings, 0)
    assert generator.score([tokenizer.encode(text).tolist() for text in texts])[0].dtype == np.float32
    assert [text[:3] for text in texts] == ["def", "the"]


def trace_variants():
    adapters = (AdapterConfig(kind="dora", rank=2), None, AdapterConfig(rank=2, bits=4, group=8))
    for optim, model, more in zip(
        (MuonConfig(), LionConfig(), AdamWConfig()), VARIANTS, adapters, strict=True
    ):
        program = program_of(optim, WSDConfig(), model, more)[1]
        jax.eval_shape(program.train_step, program.state, program.batch)


def refuse():
    """Arrays of a wrong rank, of sizes that disagree, and of a wrong type."""
    x, table, ids = np.zeros((2, 4, 8), np.float32), np.zeros((16, 8), np.float32), np.zeros((2, 4), np.int32)
    x, table, ids = map(jax.numpy.asarray, (x, table, ids))
    weights = jax.numpy.ones((2, 4))
    chunked_cross_entropy(x, table, ids, weights, chunk=8)
    for wrong in (
        (x[0], table, ids, weights),
        (x, table[:, :4], ids, weights),
        (x, table, ids[:, :3], weights),
        (x, table, weights, weights),
    ):
        with pytest.raises(TypeError, match="chunked_cross_entropy"):
            chunked_cross_entropy(*wrong, chunk=8)
    with pytest.raises(TypeError, match="sample"):
        sample(table, sample_keys(0, [0, 1]), Sampling())


if __name__ == "__main__":
    compute()
    print("held")
    trace_variants()
    print("traced")
    refuse()
    print("refused")
