"""A tiny model to ask, and documents of every kind."""

import os
from pathlib import Path

import pytest

from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from evaluation.olmo import CACHE, WHEEL
from evaluation.requests import TaskRequest
from models.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 384
BYTES = train_tokenizer([], TokenizerConfig(kind="byte"))
WORDS = train_tokenizer(
    ["the muscles of the arm and the nerves of the eye " * 9], TokenizerConfig(kind="bpe", vocab_size=300)
)
TINY = ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_seq_len=64,
)
REQUESTS = [
    TaskRequest(
        "t", "0", "choice", ("Which moves the arm?",), (" the muscles", " nerves", " the eye"), gold=1
    ),
    TaskRequest("t", "1", "choice", ("A or B?", "B or A, then?"), (" A", " A"), gold=1),
    TaskRequest("t", "2", "choice", ("Letter:",), ("A", "B", "C", "D"), gold=2),
    TaskRequest("t", "3", "bpb", ("def f(x): ",), ("return x",)),
    TaskRequest("t", "4", "rolling", continuations=("the arm and the eye " * 12,)),
    TaskRequest("t", "5", "bpb", ("long context " * 20,), (" the end",)),
]


def wheel():
    """The real wheel; without it skip, or fail where CAMBRIAN_REQUIRE_EVAL says that there is one."""
    path = Path(os.environ.get(CACHE, ROOT / ".cache/eval")) / WHEEL
    if not path.is_file():
        missing = f"NOT READ: {path} is missing; make eval-data fetches it"
        (pytest.fail if os.environ.get("CAMBRIAN_REQUIRE_EVAL") else pytest.skip)(missing)
    return path
