"""What a run writes at its end, from a tiny model and from one that recites."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from artifacts.config import RunConfig
from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from serving.config import SampleConfig
from serving.generator import Generator
from serving.python_share import parse_share
from serving.text import complete, encode_prompt
from training.config import Config, TrainingConfig
from training.samples import PYTHON_PROMPT, draw_samples, write_samples

STEP = 7
VOCAB = 384  # padded: the last 127 rows are nobody's token
BODY = " add(a, b):\n    total = a + b\n    return total\n"
FUNCTION = PYTHON_PROMPT.rstrip() + BODY
TOKENIZER = train_tokenizer([], TokenizerConfig(kind="byte"))


class Recitation:
    """A model whose next token depends on the position alone: that of a text, or either of two where they
    differ; after the longer text it ends the document.
    """

    config = ModelConfig(vocab_size=VOCAB)
    segments = ()

    def __init__(self, *texts):
        self.tokens = [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts]

    def unstack(self, params, ops, masters, *, packed):
        return params

    def init_cache(self, batch_size, capacity, ops):
        self.capacity = capacity
        return {"lengths": jnp.zeros(batch_size, jnp.int32)}

    def decode(self, params, tokens, cache, ops, counts):
        logits = jnp.full((self.capacity + 1, VOCAB), -1e9)
        for text in self.tokens:
            logits = logits.at[jnp.arange(len(text)), jnp.array(text)].set(0.0)
        lengths = cache["lengths"] + counts
        return logits[lengths], {"lengths": lengths}


def program_of(model):
    return SimpleNamespace(model=model, ops=Ops(), layout=None, to_canonical=lambda params: params)


def written(program, params, config, path):
    """The figures of what a run draws and writes at its end."""
    return write_samples(*draw_samples(program, params, TOKENIZER, config), config, path)


def make_config(seed=0, **sample):
    return Config(
        run=RunConfig(name="test"),
        seed=seed,
        training=TrainingConfig(num_steps=STEP),
        sample=SampleConfig(**sample),
    )


@pytest.fixture(scope="module")
def tiny():
    sizes = {"num_layers": 1, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 32}
    model = build_model(ModelConfig(vocab_size=VOCAB, **sizes))
    return program_of(model), model.init(jax.random.key(0))


def texts_in(path):
    """The texts of a sample file, in the order of their numbers."""
    _, *parts = re.split(r"(?:\A|\n\n)--- (\d+)\n", path.read_text())
    assert parts[::2] == [str(i) for i in range(len(parts) // 2)]
    return [*parts[1:-1:2], parts[-1].removesuffix("\n")]


@pytest.mark.parametrize(
    ("prompt", "left"),
    [("def ", "def"), ("def", "def"), ("a  ", "a "), (" a", " a"), ("x\n", "x\n"), (" ", " "), ("", "")],
)
def test_a_space_at_the_end_is_left_to_the_model(prompt, left):
    bos, *ids = encode_prompt(TOKENIZER, prompt)
    assert bos == TOKENIZER.bos_id
    assert TOKENIZER.decode(ids) == left


def test_both_files_hold_the_texts_that_the_figures_are_of(tmp_path, tiny):
    prompts = ["import ", "class A", ""]
    config = make_config(prompts=prompts, parse_snippets=2, max_new_tokens=9)
    figures = written(*tiny, config, tmp_path)
    texts = texts_in(tmp_path / "samples" / f"{STEP}.txt")
    snippets = texts_in(tmp_path / "samples" / f"{STEP}.python.txt")
    for text, prompt in zip(texts, prompts, strict=True):
        assert text.startswith(prompt.strip()) and len(text) > len(prompt)
    assert len(snippets) == 2 and all(text.startswith("def") for text in snippets)
    assert figures["sample_text"] == texts[0]
    assert sorted(figures) == ["parse_passed", "parse_share", "parse_total", "sample_text"]


def test_what_is_not_asked_for_is_not_written(tmp_path, tiny):
    assert written(*tiny, make_config(), tmp_path) == {}
    assert list((tmp_path / "samples").iterdir()) == []


def test_same_seed_same_text(tiny):
    settings = SampleConfig(max_new_tokens=9, temperature=1.0)
    generator = Generator(tiny[0].model, tiny[1], tiny[0].ops)
    first, again, other = (
        complete(generator, TOKENIZER, ["def "] * 2, settings, seed)[0] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]  # equal prompts are different samples


def test_counts_are_those_of_the_texts_in_the_file(tmp_path):
    program = program_of(Recitation(FUNCTION + "\nx = 1", FUNCTION.replace("+", ")") + "\nx = 1"))
    config = make_config(parse_snippets=12, max_new_tokens=len(BODY) + 7, temperature=1.0)
    figures = written(program, {"w": jnp.zeros(())}, config, tmp_path)
    snippets = texts_in(tmp_path / "samples" / f"{STEP}.python.txt")
    share, passed, total = parse_share(snippets)
    assert 0 < passed < total == 12
    assert (figures["parse_share"], figures["parse_passed"], figures["parse_total"]) == (share, passed, total)


@pytest.mark.parametrize(("room", "parsed"), [(len(BODY) + 1, 2), (len(BODY), 0)])
def test_a_text_that_the_model_ended_itself_is_whole(tmp_path, room, parsed):
    """One statement cut by the limit may go on; the same one, ended by the model, does not."""
    config = make_config(parse_snippets=2, max_new_tokens=room, temperature=0.0)
    program = program_of(Recitation(FUNCTION))
    figures = written(program, {"w": jnp.zeros(())}, config, tmp_path)
    assert texts_in(tmp_path / "samples" / f"{STEP}.python.txt") == ["def" + BODY] * 2
    assert figures["parse_passed"] == parsed
