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

from common.checks import as_text
from common.terminal import steady_streams

if TYPE_CHECKING:
    from artifacts.checkpoints.manager import Checkpoints
    from training.config import Config

WEIGHTS = ("raw", "ema", "mean")
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
    # Said once more below, but before JAX and Orbax take their seconds.
    directory = find_run(options.run)
    config = load_config(directory / "config.yaml")

    from models.transformer import build_model
    from parallel.config import MeshConfig
    from parallel.mesh import build_layout
    from serving.generator import generate
    from serving.text import encode_prompt, shown, stop_id
    from training.program import build_ops, padded_vocab

    tokenizer = load_run_tokenizer(directory, config)
    with_chat(tokenizer, directory, config, options.chat)
    if config.model.vocab_size == -1:
        config.model.vocab_size = padded_vocab(tokenizer.vocab_size)
    mesh = MeshConfig(data=1, tensor=options.tensor, rules=config.mesh.rules)
    layout = build_layout(mesh, _devices(options.tensor))
    model, ops = build_model(config.model), build_ops(config, layout)
    params = load_weights(directory, config, model, layout, options)
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


def find_run(name: str) -> Path:
    """The directory of a run, by name or path. ValueError, naming the runs there are."""
    for directory in (Path("runs") / name, Path(name)):
        if (directory / "config.yaml").is_file():
            return directory
    there = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    remedy = f"runs/ has {', '.join(there[:8])}" if there else "runs/ has none; train one with train.py"
    raise ValueError(f"run={name} is no run's name or directory; {remedy}")


def load_config(path: Path) -> "Config":
    """The config that a run was made with. ValueError where the file is none."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from configs.schema import from_hydra
    from models.config import regrouped
    from optim.config import OPTIMIZERS, SCHEDULES
    from training.config import Config

    try:
        # As it was written: OmegaConf's own reader would make a number of a run's name such as 1e3.
        stored = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")))
        stored.model = regrouped(dict(stored.model))
        optim = {schema.name: schema for schema in OPTIMIZERS}[stored.optim.name]()
        schedule = {schema.name: schema for schema in SCHEDULES}[stored.schedule.name]()
        typed = OmegaConf.merge(OmegaConf.structured(Config(optim=optim, schedule=schedule)), stored)
        return from_hydra(typed)  # type: ignore[arg-type]
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, KeyError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} is no run's config ({reason}); restore it, or choose another run="
        ) from None


def load_run_tokenizer(directory: Path, config: "Config") -> Any:
    """The tokenizer that the run was trained with: its own copy, or the cache's, if it is still the same."""
    import json

    from data.pipeline import prepare
    from data.tokens.tokenizer import load_tokenizer

    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(directory / "tokenizer.json")
    tokenizer = prepare(config.data, config.tokenizer, progress=False).tokenizer
    expected = json.loads((directory / "manifest.json").read_text("utf-8"))["tokenizer"]["digest"]
    if tokenizer.digest != expected:
        raise ValueError(
            f"{directory} was trained with tokenizer {expected[:9]}, and its data now gives "
            f"{tokenizer.digest[:9]}; put the right tokenizer.json into {directory}"
        )
    return tokenizer


def with_chat(tokenizer: Any, directory: Path, config: "Config", chat: str) -> None:
    """Give the tokenizer the run's chat template, or take it away, as `chat` says."""
    from data.tokens.chat import ChatEncoder
    from data.tokens.chat_template import find_template

    tokenizer.chat = None
    if chat == "true" or (chat == "auto" and config.data.format == "chat"):
        template = find_template(None, directory / "tokenizer.json", tokenizer)
        tokenizer.chat = ChatEncoder(tokenizer, template)


def _devices(count: int) -> list[Any]:
    import jax

    if count > len(jax.devices()):
        raise ValueError(f"tensor={count} is more than the {len(jax.devices())} devices here; use fewer")
    return jax.devices()[:count]


def load_weights(directory: Path, config: "Config", model: Any, layout: Any, options: GenerateOptions) -> Any:
    """The verified parameters that `weights` and `step` ask for, placed by the layout."""
    import jax

    from artifacts.checkpoints.location import open_checkpoints_of, place
    from common.buckets import is_remote
    from training.state import is_info

    where = config.checkpoint.directory
    if not (is_remote(where) or place(directory, where).is_dir()):
        raise ValueError(f"{directory} has no checkpoint yet; the first comes at checkpoint.every")
    checkpoints = open_checkpoints_of(directory, config.checkpoint, read_only=True)
    steps = wanted_steps(checkpoints, options.step)
    abstract = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        model.info,
        layout.tree(model.info, is_info),
        is_leaf=is_info,
    )
    if options.weights == "mean":
        steps = steps[-(config.checkpoint.average_last or len(steps)) :]
        print(f"{directory}: mean of steps {', '.join(map(str, steps))}", file=sys.stderr)
        return checkpoints.mean_weights(steps, abstract)
    print(f"{directory}: step {steps[-1]}, {options.weights} weights", file=sys.stderr)
    item = "ema" if options.weights == "ema" else "params"
    return checkpoints.restore_weights(steps[-1], abstract, item=item)


def wanted_steps(checkpoints: "Checkpoints", step: str) -> list[int]:
    """Steps that have a checkpoint, up to the wanted one. ValueError where that has none."""
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{checkpoints.directory} is empty; the first checkpoint comes at checkpoint.every")
    if step == "latest":
        return steps
    if step not in map(str, steps):
        raise ValueError(f"step={step} has no checkpoint; use latest or one of {', '.join(map(str, steps))}")
    return [s for s in steps if s <= int(step)]


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
