"""Text from a run's checkpoint: `python scripts/generate.py run=NAME prompt="def "`.

    run=NAME              a directory in runs/, or a path to one
    prompt="def "         what the text begins with
    max_new_tokens=128    tokens to write after it
    samples=1             texts to write
    temperature=0.8       0 takes the likeliest token each time
    top_k=0               draw from the k likeliest tokens; 0: all
    top_p=1.0             draw from the fewest tokens that hold this share; 1: all
    seed=0                the same seed writes the same texts
    weights=raw           raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest           or a step that has a checkpoint
    chat=auto             true: the prompt is a user's turn; auto: where the run learnt conversations
    tensor=1              devices to split the model over

The text goes to stdout, what was loaded to stderr. Exit status: 0 done, 1 a checkpoint that cannot be
trusted, 2 bad input.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from artifacts.load import WEIGHTS
from common.checks import as_text
from common.terminal import steady_streams

if TYPE_CHECKING:
    from training.config import Config

CHAT = ("auto", "true", "false")


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
    tensor: int = 1


def parse_options(arguments: Sequence[str]) -> GenerateOptions:
    """`key=value` words to Options. ValueError, in one line, for anything else."""
    from common.checks import choice, did_you_mean, within

    types = {item.name: item.type for item in fields(GenerateOptions)}
    values: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is no key=value; --help lists the keys")
        if key not in types:
            raise ValueError(f"{key} is no key of generate.py; {did_you_mean(key, types)}")
        values[key] = _value(key, text, types[key])
    if not values.get("run"):
        raise ValueError("run= is missing; give the name of a run, as in run=quickstart")
    options = GenerateOptions(**values)
    options = replace(options, prompt=as_text("prompt", options.prompt))
    for key in ("samples", "tensor", "max_new_tokens"):
        within(key, getattr(options, key), 1)
    within("seed", options.seed, 0, 2**31 - 1)
    choice("weights", options.weights, WEIGHTS)
    choice("chat", options.chat, CHAT)
    return options


def _value(key: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        a_number = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}={text} is not {a_number}") from None


def generate_text(options: GenerateOptions) -> list[str]:
    """The texts, each with its prompt. ValueError for bad input, RunFault for a corrupt checkpoint."""
    from artifacts.load import load
    from training.config import from_stored

    run = load(options.run, from_stored)  # first: JAX and Orbax take their seconds

    from data.pipeline import prepare
    from serving.generator import generate
    from serving.text import encode_prompt, shown, stop_id
    from training.samples import trained_model

    config = run.config
    tokenizer = run.tokenizer(lambda: prepare(config.data, config.tokenizer, progress=False).tokenizer)
    with_chat(tokenizer, run.path, run.config, options.chat)
    model, ops, params = trained_model(
        run, tokenizer.vocab_size, tensor=options.tensor, step=options.step, weights=options.weights
    )
    prompt = encode_prompt(tokenizer, options.prompt)
    tails = generate(
        model,
        params,
        ops,
        [prompt] * options.samples,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_id=stop_id(tokenizer),
        seed=options.seed,
        vocab_size=tokenizer.vocab_size,
    )
    return [shown(tokenizer, options.prompt, prompt, tail) for tail in tails]


def with_chat(tokenizer: Any, directory: Path, config: "Config", chat: str) -> None:
    """Give the tokenizer the run's chat template, or take it away, as `chat` says."""
    from data.tokens.chat import ChatEncoder
    from data.tokens.chat_template import find_template

    tokenizer.chat = None
    if chat == "true" or (chat == "auto" and config.data.format == "chat"):
        template = find_template(None, directory / "tokenizer.json", tokenizer)
        tokenizer.chat = ChatEncoder(tokenizer, template)


def main(arguments: Sequence[str]) -> int:
    """Print the texts; the exit status."""
    from common.errors import RunFault

    if "--help" in arguments or "-h" in arguments:
        print(__doc__, end="")
        return 0
    try:
        texts = generate_text(parse_options(arguments))
    except (ValueError, OSError, RunFault) as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        print("error: " + "; ".join(str(error).split("\n")), file=sys.stderr)
        return 1 if isinstance(error, RunFault) else 2
    for number, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- {number}")
        print(text)
    return 0


if __name__ == "__main__":
    steady_streams()
    sys.exit(main(sys.argv[1:]))
