"""Every experiment is a program: it composes, its mesh fits its model, its step traces; nothing is made."""

import jax
import pytest

from configs.groups import options
from parallel.mesh import build_layout
from tests.configs.composing import config
from training.config import with_vocab
from training.legal.check import check
from training.program import build_program

BYTES = 257  # tokens of tokenizer=byte
PARAMETERS = {  # what the name promises, in millions
    "gpt2_124m": 124.4,
    "llama_1b": 1236,
    "smollm2_stdlib": 134.5,
    "llama3_8b": 8030,
    "llama3_70b": 70550,
    "qwen3_8b": 8190,
    "gemma2_9b": 9240,
}


@pytest.mark.parametrize("name", options("experiment"))
def test_experiment_traces_abstractly(name):
    made = config(f"+experiment={name}")
    check(made, jax.device_count())
    made = with_vocab(made, BYTES if made.tokenizer.kind == "byte" else made.tokenizer.vocab_size)
    before = len(jax.live_arrays())
    program = build_program(made, build_layout(made.mesh))
    state, metrics = jax.eval_shape(program.train_step, program.state, program.batch)
    assert jax.tree.structure(state) == jax.tree.structure(program.state)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(s)] for s in (state, program.state)]
    assert kinds[0] == kinds[1]
    assert {"loss", "grad_norm", "learning_rate", "tokens"} <= set(metrics)
    assert all(leaf.shape == () and leaf.dtype == "float32" for leaf in metrics.values())
    assert len(jax.live_arrays()) == before
    if name in PARAMETERS:
        assert program.model.num_params()["total"] / 1e6 == pytest.approx(PARAMETERS[name], rel=0.01)
