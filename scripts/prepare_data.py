"""Make an experiment's token stores before training it: `python scripts/prepare_data.py +experiment=NAME`.

Takes the overrides that `train.py` takes. Training does the same by itself when the stores are missing; this
is for doing it elsewhere or beforehand. Done again, it finds everything made and only prints the table;
killed, it goes on from its finished shards.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    import command

from scripts.command import refuse

if TYPE_CHECKING:
    from data.prepared import Prepared
    from training.config import Config

PURPOSE = """\
Make an experiment's token stores (data.cache_dir) before training it, for instance on another machine.
Of an experiment, data.* and tokenizer.* count; train.py with the same finds them and starts at once.
Killed and started again, it goes on from the shards that are finished.

  --append                  tokenize only the files that are new in data.path, and add them to the corpus;
                            its tokenizer stays, and what is there is not written again
  --workers N               processes that tokenize, as data.workers=N
  --runner NAME             tokenize by Apache Beam (extra `beam`): `direct` runs here, any other name is
                            handed on to Beam; data.cache_dir must lie where all of its workers see it
  --runner-option KEY=VALUE an option of Beam's, any number of times: --runner-option region=europe-west4"""
DIRECT = "DirectRunner"


def prepare_data(config: "Config", options: argparse.Namespace | None = None) -> int:
    """Tokenize, and print what there is."""
    from data.pipeline import prepare

    options = options or split_options([])[0]
    engine = None
    if options.runner:
        from data.tokens.beam import beam_engine

        engine = beam_engine(beam_options(options.runner, options.runner_option))
    tokenizer = config.tokenizer
    if tokenizer.kind == "inherit":  # only then: it imports JAX
        from training.opening.initial_weights import tokenizer_config

        tokenizer = tokenizer_config(config, None, None)
    prepared = prepare(config.data, tokenizer, append=options.append, engine=engine)
    for name, part in (prepared.components or {"": prepared}).items():
        if name:
            print(f"{name}:")
        print_table(part, config.data.seq_len)
    return 0


def split_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this script's own options, and the words that are left for the config.

    Raises ValueError where an option lacks its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage as well
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--runner")
    parser.add_argument("--runner-option", action="append", default=[])
    options, words = parser.parse_known_args(list(argv))
    if options.runner_option and not options.runner:
        _refuse("--runner-option needs --runner, such as --runner direct")
    return options, words + ([f"data.workers={options.workers}"] if options.workers is not None else [])


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; --help lists the options")


def beam_options(runner: str, options: Sequence[str]) -> list[str]:
    """Return Beam's own command line: `KEY=VALUE` becomes `--KEY=VALUE`."""
    name = DIRECT if runner.lower() in ("direct", DIRECT.lower()) else runner
    return [f"--runner={name}", *(f"--{option.lstrip('-')}" for option in options)]


def print_table(prepared: "Prepared", seq_len: int) -> None:
    """Documents, bytes and tokens of each split; bytes per token say how well the tokenizer fits."""
    stores = {"train": prepared.train, "validation": prepared.validation}
    lines: list[tuple[str, ...]] = [("split", "documents", "bytes", "tokens", "bytes/token", "rows")]
    for split, store in stores.items():
        if store is None:  # streaming reads the corpus while training
            continue
        counts = (store.num_documents, store.num_bytes, store.num_tokens)
        ratio = store.num_bytes / max(store.num_tokens, 1)
        rows = store.num_tokens // seq_len
        lines.append((split, *(f"{count:,}" for count in counts), f"{ratio:.2f}", f"{rows:,}"))
    for split, *numbers in lines:
        print(
            f"{split:10}", *(f"{n:>{width}}" for n, width in zip(numbers, (10, 15, 15, 12, 10), strict=True))
        )
    for split, store in stores.items():
        if store is not None:
            print(f"{split}: {store.path}")


def run(argv: Sequence[str]) -> int:
    """Do what a command line asks; return the exit status."""
    from configs.cli import main

    try:
        options, words = split_options(argv)
    except ValueError as error:
        return refuse(error)
    task: Callable[[Config], int] = partial(prepare_data, options=options)
    return main(task, words, script="python scripts/prepare_data.py", purpose=PURPOSE)


if __name__ == "__main__":
    command.start(run)
