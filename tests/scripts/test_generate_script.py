"""`scripts/generate.py` on a run directory made by hand."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml

from artifacts.checkpoints.manager import Checkpoints
from artifacts.config import CheckpointConfig, RunConfig
from artifacts.load import load
from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from optim.config import ConstantConfig, LionConfig
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from scripts.generate import GenerateOptions, main, parse_options
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from serving.text import encode_prompt
from training.config import Config, from_stored
from training.state import TrainState, abstract_state, nothing_seen, shardings

MODEL = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32)
RULES = {
    "embed": ["fsdp"],
    "heads": ["tensor"],
    "kv_heads": ["tensor"],
    "mlp": ["tensor"],
    "vocab": ["tensor"],
}


def weights(model, seed):
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.init(jax.random.key(seed)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([], TokenizerConfig(kind="byte"))


@pytest.fixture(scope="module")
def model():
    return build_model(replace(MODEL, vocab_size=384))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, model):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tokenizer, model)


def make_run(path, tokenizer, model, steps=(1, 2)):
    """Checkpoints with different weights, an average beside each."""
    path.mkdir()
    config = Config(
        run=RunConfig(name="tiny", dir=str(path)),
        model=MODEL,
        tokenizer=TokenizerConfig(kind="byte"),
        mesh=MeshConfig(rules=RULES),
        optim=LionConfig(),
        schedule=ConstantConfig(),
        checkpoint=CheckpointConfig(every=1, keep=2),
    )
    (path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    tokenizer.save(path / "tokenizer.json")
    tx = optax.sgd(0.1, momentum=0.9)
    layout = build_layout(MeshConfig(data=1), jax.devices()[:1])
    placed = shardings(abstract_state(model, tx, layout, ema=True))
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoint)
    for step in steps:
        params = weights(model, step)
        state = TrainState(
            jnp.int32(step), params, tx.init(params), weights(model, 10 + step), guard=nothing_seen()
        )
        checkpoints.save(step, jax.device_put(state, placed), {})
        checkpoints.wait()
    checkpoints.close()
    return path


def expected(model, tokenizer, params, **settings):
    prompt = encode_prompt(tokenizer, "def f")
    (tail,) = Generator(model, params, Ops()).complete(
        [prompt],
        Sampling(**settings, vocab_size=tokenizer.vocab_size),
        sample_keys(0, [0]),
        max_new_tokens=12,
        stop_id=tokenizer.eos_id,
    )
    return tokenizer.decode([*prompt[1:], *tail]) + "\n"


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        ([], [2]),
        (["step=1"], [1]),
        (["weights=ema"], [12]),
        (["weights=mean"], [1, 2]),
        (["tensor=2"], [2]),
    ],
)
def test_the_text_is_that_of_the_weights_asked_for(run, model, tokenizer, capsys, words, seeds):
    status = main([str(run), "prompt=def f", "max_new_tokens=12", "temperature=0", *words])
    assert status == 0
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *(weights(model, seed) for seed in seeds))
    assert capsys.readouterr().out == expected(model, tokenizer, mean, temperature=0)


def test_samples_are_numbered_and_repeat_under_their_seed(run, capsys):
    def texts(seed):
        words = [str(run), "samples=2", "max_new_tokens=8", "temperature=1.5", "top_k=50", f"seed={seed}"]
        assert main(words) == 0
        return capsys.readouterr().out

    first = texts(4)
    assert first.startswith("--- 0\n") and "\n--- 1\n" in first
    assert texts(4) == first and texts(5) != first


def test_a_config_comes_back_from_its_file_as_it_was(run):
    config = load(str(run), from_stored).config
    assert isinstance(config.optim, LionConfig) and isinstance(config.schedule, ConstantConfig)
    assert config.model == MODEL and asdict(config) == yaml.safe_load((run / "config.yaml").read_text())


def test_a_prompt_may_hold_an_equals_sign():
    assert parse_options(["a", "prompt=x = 1"]) == GenerateOptions(run="a", prompt="x = 1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "run=nothing is no run's name or directory"),
        ([], "RUN is missing"),
        (["RUN", "more"], "'more' is no key=value"),
        (["RUN", "temprature=1"], "temprature is no key of this command; did you mean temperature?"),
        (["RUN", "top_k=many"], "top_k=many is not a whole number"),
        (["RUN", "temperature=hot"], "temperature=hot is not a number"),
        (["RUN", "temperature=-1"], "temperature=-1.0 must be "),
        (["RUN", "max_new_tokens=0"], "max_new_tokens=0 must be "),
        (["RUN", "samples=0"], "samples=0 must be "),
        (["RUN", "cache_bits=4"], "cache_bits=4 must be 8, or null"),
        (["RUN", "seed=-1"], "seed=-1 must be "),
        (["RUN", "weights=best"], "weights=best is not one of raw, ema, mean"),
        (["RUN", "step=7"], "step=7 has no checkpoint; use latest or one of 1, 2"),
        (["RUN", "tensor=99"], "tensor=99 is more than the 8 devices here"),
    ],
)
def test_a_malformed_command_is_one_line_and_status_2(run, capsys, words, message):
    assert main([word.replace("RUN", str(run)) for word in words]) == 2
    output = capsys.readouterr()
    last = output.err.splitlines()[-1]
    assert last.startswith(f"error: {message}") and "Traceback" not in output.err and output.out == ""


def test_a_run_without_checkpoints_or_with_a_broken_config_says_so(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    assert main([str(tmp_path)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model: [")
    assert main([str(tmp_path)]) == 2
    assert "is no run's config" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
