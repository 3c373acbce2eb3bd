"""What a run is given as its attention, and what it is told of it."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import reference_attention
from kernels.attention_cpu import fused_attention
from kernels.backends import BACKENDS, Choice
from parallel.attention.choose import build_attention
from parallel.config import ContextConfig
from tests.configs.composing import config
from tests.parallel.context_cases import layout_of
from training.config import ATTENTION
from training.loop import checked
from training.program import attention_of


@pytest.fixture(scope="module")
def debug():
    return config("+experiment=debug")


def test_auto_on_cpu_is_the_fused_one_on_one_device_and_the_reference_itself_on_several(debug):
    assert debug.training.attention == "auto"
    choice = attention_of(debug, layout_of(), jnp.dtype("float32"))
    assert choice == Choice("fused", "auto on cpu")
    assert build_attention(choice.name, layout_of(), ContextConfig(), 1) is fused_attention
    several = layout_of(data=2)
    choice = attention_of(debug, several, jnp.dtype("float32"))
    assert choice == Choice("reference", "auto on cpu; fused runs on one device, not in a mesh of 2")
    assert build_attention(choice.name, several, ContextConfig(), 1) is reference_attention


def test_every_name_has_a_function():
    assert ATTENTION == ("auto", *BACKENDS)
    for name in set(BACKENDS) - {"cudnn", "splash"}:
        assert callable(build_attention(name, layout_of(), ContextConfig(), 64))
    for name, words in (("cudnn", "needs NVIDIA GPUs, not cpu"), ("splash", "needs TPUs, not cpu")):
        with pytest.raises(ValueError, match=words):
            build_attention(name, layout_of(), ContextConfig(), 64)
        assert callable(build_attention(name, layout_of(context=2), ContextConfig(), 64))  # in ulysses


def test_rows_are_looked_at_where_cudnn_is_what_auto_chose(debug):
    batch = {"segment_ids": np.arange(1, 71)[None]}
    for name in ("cudnn", "reference"):
        setup = SimpleNamespace(config=debug, program=SimpleNamespace(attention=Choice(name, "auto on gpu")))
        place = checked(setup, lambda batch: "placed")
        if name == "reference":
            assert place(batch) == "placed"
            continue
        with pytest.raises(ValueError, match=r"holds 70 documents.*use training.max_documents=128"):
            place(batch)
        assert place({"segment_ids": np.arange(1, 60)[None]}) == "placed"
