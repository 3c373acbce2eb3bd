"""Text from a run's checkpoint: `python scripts/generate.py RUN prompt="def "`.

    RUN                   a directory in runs/, or a path to one
    prompt="def "         what the text begins with
    max_new_tokens=128    tokens to write after it
    samples=1             texts to write
    temperature=0.8       0 takes the likeliest token each time
    top_k=0               draw from the k likeliest tokens; 0: all
    top_p=1.0             draw from the fewest tokens that hold this share; 1: all
    seed=0                the same seed writes the same texts
    weights=raw           raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest           or a step that has a checkpoint
    chat=auto             true: the prompt is a user's turn; auto: where a chat template taught the run
    cache_bits=null       8: keys and values as int8 levels and a scale a vector; null: as they are computed
    tensor=1              devices to split the model over

The text goes to stdout, what was loaded to stderr. Exit status: 0 done, 1 a checkpoint that cannot be
trusted, 2 bad input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

if __name__ == "__main__":
    import command

from artifacts.load import WEIGHTS
from common.checks import as_text, choice, within
from data.tokens.turns import CHAT, give_chat
from scripts.command import parse, run
from serving.settings import check_cache_bits


@dataclass(frozen=True)
class GenerateOptions:
    """The command line, each key with its type; see the module's docstring."""

    run: str
    prompt: str = "def "
    max_new_tokens: int = 128
    samples: int = 1
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    weights: str = "raw"
    step: str = "latest"
    chat: str = "auto"
    cache_bits: int | None = None
    tensor: int = 1


def parse_options(arguments: Sequence[str]) -> GenerateOptions:
    """The command line, each value in its range. ValueError, in one line, for anything else."""
    options = parse(arguments, GenerateOptions)
    options = replace(options, prompt=as_text("prompt", options.prompt))
    for key in ("samples", "tensor", "max_new_tokens"):
        within(key, getattr(options, key), 1)
    within("seed", options.seed, 0, 2**31 - 1)
    choice("weights", options.weights, WEIGHTS)
    choice("chat", options.chat, CHAT)
    check_cache_bits(options.cache_bits)
    return options


def generate_text(options: GenerateOptions) -> list[str]:
    """The texts, each with its prompt. ValueError for bad input, RunFault for a corrupt checkpoint."""
    from artifacts.load import load
    from training.config import from_stored

    loaded = load(options.run, from_stored)  # first: JAX and Orbax take their seconds

    from data.pipeline import prepare
    from serving.generator import Generator
    from serving.sampling import Sampling, sample_keys
    from serving.text import encode_prompt, shown, stop_id
    from training.opening.opened import trained_model

    config = loaded.config
    tokenizer = loaded.tokenizer(lambda: prepare(config.data, config.tokenizer, progress=False).tokenizer)
    give_chat(tokenizer, loaded.path / "tokenizer.json", config.data, options.chat)
    trained = trained_model(
        loaded, tokenizer.vocab_size, tensor=options.tensor, step=options.step, weights=options.weights
    )
    prompt = encode_prompt(tokenizer, options.prompt)
    tails = Generator(*trained, cache_bits=options.cache_bits).complete(
        [prompt] * options.samples,
        Sampling(options.temperature, options.top_k, options.top_p, tokenizer.vocab_size),
        sample_keys(options.seed, range(options.samples)),
        max_new_tokens=options.max_new_tokens,
        stop_id=stop_id(tokenizer),
    )
    return [shown(tokenizer, options.prompt, prompt, tail) for tail in tails]


def print_texts(arguments: Sequence[str]) -> int:
    """Print the texts asked for; the exit status."""
    texts = generate_text(parse_options(arguments))
    for number, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- {number}")
        print(text)
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(print_texts, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
