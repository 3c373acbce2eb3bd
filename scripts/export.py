"""A run's weights as others open them: `python scripts/export.py RUN output=PATH`.

    RUN                a directory in runs/, or a path to one
    output=PATH        the directory to make, or the file in .gguf
    format=hf          hf: config.json, safetensors, tokenizer, template, for transformers and vLLM
                       gguf: one file of all that, for llama.cpp
                       compressed-tensors: as hf, projections rounded to integers (scripts/compress.py
                       solves for them, and says what it costs)
                       stablehlo: programs that JAX alone runs, with their weights (docs/interop.md)
                       peft: the adapters of a run with adapter.*, alone; the others write them merged
    base=null          peft: where the weights lie that they stand on; null: as init_from says
    family=null        hf: a model_type of transformers; null: the plainest whose class computes this model
    dtype=float32      float32, bfloat16 or float16; gguf: q8_0 too
    weights=raw        raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest        or a step that has a checkpoint
    bits=8             compressed-tensors: of a weight, 2 to 8
    group=null         compressed-tensors: inputs that share a scale; null: all
    rows=1             stablehlo: texts at a time
    max_len=0          stablehlo: tokens of the longest; 0: as many as the model was made for
    platforms=cpu,cuda,tpu    stablehlo: what it can run on
    trim=true          leave out the table's rows behind the tokenizer's last token; false: keep them

Written aside, read back and compared, then named. Exit status: 0 done, 1 a checkpoint that cannot be trusted,
2 bad input, such as a model that no class of theirs computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import command

from artifacts.load import WEIGHTS, LoadedRun
from common.checks import choice
from scripts.command import parse, run

FORMATS = ("hf", "gguf", "compressed-tensors", "stablehlo", "peft")
PLATFORMS = "cpu,cuda,tpu"
KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
TABLES = (("embed", "table"), ("head", "table"))


@dataclass(frozen=True)
class PublishOptions:
    """The command line, each key with its type; see the module's docstring."""

    run: str
    output: Path
    format: str = "hf"
    base: str | None = None
    family: str | None = None
    dtype: str = "float32"
    weights: str = "raw"
    step: str = "latest"
    bits: int = 8
    group: int | None = None
    rows: int = 1
    max_len: int = 0
    platforms: str = PLATFORMS
    trim: bool = True


def do(arguments: Sequence[str]) -> int:
    """Write the directory or the file, and say what it is. Raises ValueError for what cannot be."""
    options = parse(arguments, PublishOptions)
    packed = options.format == "compressed-tensors"
    programs = options.format == "stablehlo"
    hub = packed or options.format == "hf"
    if not packed and (options.bits, options.group) != (8, None):
        raise ValueError(
            f"bits={options.bits} group={options.group} are of format=compressed-tensors, not of "
            f"{options.format}; leave them out"
        )
    if not programs and (options.rows, options.max_len, options.platforms) != (1, 0, PLATFORMS):
        raise ValueError(
            f"rows, max_len and platforms are of format=stablehlo, not of {options.format}; leave them out"
        )
    arrays = tuple(KINDS)[:-1]
    dtypes = {"gguf": tuple(KINDS), "peft": ("float32",), "stablehlo": arrays[:2]}.get(options.format, arrays)
    for key, known in (("format", FORMATS), ("dtype", dtypes), ("weights", WEIGHTS)):
        choice(key, getattr(options, key), known)
    import jax
    import numpy as np

    from artifacts.load import load
    from data.tokens.turns import give_chat
    from interop.configs import FAMILIES
    from interop.gguf import KINDS as STORED
    from interop.gguf_tokenizer import tokenizer_values
    from interop.packed.write_packed import export_packed
    from interop.tokenizer_out import hub_files
    from interop.write import export, reader
    from interop.write_gguf import export_gguf
    from models.transformer import build_model
    from training.config import from_stored
    from training.opening.initial_weights import run_weights

    if options.family is not None:
        choice("family", options.family, FAMILIES)
    found = load(options.run, from_stored)
    if options.format == "peft":
        return write_peft(found, options)
    if options.base is not None:
        raise ValueError(f"base={options.base} is for format=peft alone; leave it out")
    tokenizer = found.tokenizer(lambda: _missing(found))
    whole = _with_vocab(found, tokenizer.vocab_size)
    rows = tokenizer.vocab_size if options.trim else whole.vocab_size
    config = replace(whole, vocab_size=rows)
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    there = build_model(whole)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), there.info)
    params = run_weights(found, there, abstract, step=options.step, weights=options.weights)

    parameter = reader(params)

    def read(path: tuple[str, ...], row: int | None) -> np.ndarray:
        return parameter(path, row)[:rows] if path in TABLES else parameter(path, row)

    model, kind = build_model(config), KINDS[options.dtype]
    if packed or programs:
        tables = {
            part: {**params[part], "table": params[part]["table"][:rows]}
            for part, _ in TABLES
            if part in params
        }
        params = {**params, **tables}
    if packed:
        from compress.steps import packed_by_rounding

        params = packed_by_rounding(model, params, options.bits, options.group)
    text = (found.path / "tokenizer.json").read_text("utf-8")
    chat = give_chat(tokenizer, found.path / "tokenizer.json", found.config.data)
    template, stop_id = (chat.template.text, chat.stop_id) if chat else (None, None)
    files = hub_files(text, tokenizer, template, stop_id, config.max_seq_len)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    given = (options.output, config, model)
    if hub:
        words: dict[str, Any] = {"family": options.family, "dtype": STORED[kind].dtype}
        words |= {"files": files, "extra": ids}
        family = export_packed(*given, params, **words) if packed else export(*given, read, **words)
        written = family.architecture
    elif programs:
        from compress.stablehlo import export_programs

        sizes: dict[str, Any] = {"rows": options.rows, "max_len": options.max_len, "dtype": options.dtype}
        platforms = options.platforms.split(",")
        export_programs(options.output, model, params, platforms=platforms, files=files, extra=ids, **sizes)
        written = f"programs for {', '.join(platforms)}"
    else:
        values = tokenizer_values(tokenizer, text, rows, template)
        written = export_gguf(*given, read, kind=kind, values=values)
    padding = f", without {whole.vocab_size - rows} rows of padding" if rows < whole.vocab_size else ""
    print(f"{options.output}: {written}, {options.dtype}, a vocabulary of {rows}{padding}")
    return 0


def write_peft(found: LoadedRun[Any], options: PublishOptions) -> int:
    """Write the run's factors as PEFT opens them. ValueError for a run without, and for what PEFT cannot."""
    config = found.config
    if config.adapter is None:
        raise ValueError(f"format=peft: {options.run} has no adapters (adapter=null); use format=hf")
    import jax

    from interop.adapted import is_published, published
    from interop.config_out import write_config
    from interop.peft import factor_reader, write_adapter
    from interop.places import path_of
    from models.transformer import build_model
    from training.opening.initial_weights import factors_like
    from training.param_layout import param_layout

    base = options.base
    if base is None and is_published(path_of(config.init_from)):
        base = str(published(path_of(config.init_from)).path)
    if base is None:
        raise ValueError(
            f"format=peft: the adapters of {options.run} stand on the run {config.init_from}, which PEFT "
            f"does not open; python scripts/export.py {config.init_from} output=PATH, then base=PATH here"
        )
    size = found.tokenizer(lambda: _missing(found)).vocab_size
    sized = _with_vocab(found, size)
    model = build_model(sized)
    placement = param_layout(replace(config, model=sized), model)
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), model.info)
    like = factors_like(placement.trained, abstract)
    factors = found.weights(like, step=options.step, weights=options.weights)
    family, _ = write_config(sized, options.family)
    adapters = placement.adapters
    assert adapters is not None
    write_adapter(options.output, model, family.rules(sized), adapters, factor_reader(factors), base)
    below = f", trained over {adapters.bits} bits" if adapters.bits is not None else ""
    print(f"{options.output}: {config.adapter.kind} of rank {adapters.rank} over {base}{below}")
    return 0


def _missing(found: LoadedRun[Any]) -> Any:
    raise ValueError(f"{found.path} has no tokenizer.json; copy the one that it was trained with there")


def _with_vocab(found: LoadedRun[Any], size: int) -> Any:
    from training.config import with_vocab

    return with_vocab(found.config, size).model


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(do, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
