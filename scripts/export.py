"""A run's weights as others open them: `python scripts/export.py RUN output=DIR`.

    RUN                a directory in runs/, or a path to one
    output=DIR         the directory to make
    format=hf          hf: config.json, safetensors, tokenizer, template: transformers, vLLM and llama.cpp's
                       converter open it
    family=null        a model_type of transformers; null: the plainest whose class computes this model
    dtype=float32      float32 or bfloat16
    weights=raw        raw, ema (training.ema_decay), or mean (of the last checkpoints)
    step=latest        or a step that has a checkpoint

Written aside, read back and compared, then named. Exit status: 0 done, 1 a checkpoint that cannot be trusted,
2 bad input, such as a model that no class of theirs computes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import command

from artifacts.load import WEIGHTS, LoadedRun
from common.checks import choice
from scripts.command import parse, run

FORMATS, DTYPES = ("hf",), ("float32", "bfloat16")


@dataclass(frozen=True)
class PublishOptions:
    """The command line, each key with its type; see the module's docstring."""

    run: str
    output: Path
    format: str = "hf"
    family: str | None = None
    dtype: str = "float32"
    weights: str = "raw"
    step: str = "latest"


def do(arguments: Sequence[str]) -> int:
    """Write the directory, and say what it is. Raises ValueError for what cannot be."""
    options = parse(arguments, PublishOptions)
    for key, known in (("format", FORMATS), ("dtype", DTYPES), ("weights", WEIGHTS)):
        choice(key, getattr(options, key), known)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from artifacts.load import load
    from interop.configs import FAMILIES
    from interop.write import export
    from models.transformer import build_model
    from training.config import from_stored

    if options.family is not None:
        choice("family", options.family, FAMILIES)
    found = load(options.run, from_stored)
    tokenizer = found.tokenizer(lambda: _missing(found))
    config = _with_vocab(found, tokenizer.vocab_size)
    model = build_model(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), model.info)
    params = found.weights(abstract, step=options.step, weights=options.weights)

    def read(path: tuple[str, ...], row: int | None) -> np.ndarray:
        leaf: Any = params
        for name in path:
            leaf = leaf[name]
        return np.asarray(leaf if row is None else leaf[row])

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    family = export(
        options.output,
        config,
        model,
        read,
        family=options.family,
        dtype=jnp.bfloat16 if options.dtype == "bfloat16" else np.float32,
        files=_tokenizer_files(found.path, tokenizer),
        extra=ids,
    )
    print(f"{options.output}: {family.architecture}, {options.dtype}")
    return 0


def _missing(found: LoadedRun[Any]) -> Any:
    raise ValueError(f"{found.path} has no tokenizer.json; copy the one that it was trained with there")


def _with_vocab(found: LoadedRun[Any], size: int) -> Any:
    from training.config import with_vocab

    return with_vocab(found.config, size).model


def _tokenizer_files(path: Path, tokenizer: Any) -> dict[str, bytes]:
    """The tokenizer and what says its separators: a tokenizer.json alone has none for transformers."""
    specials = {index: token for index, token in tokenizer.specials_by_id.items()}
    bos, eos = specials[tokenizer.bos_id], specials[tokenizer.eos_id]
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": (path / "tokenizer.json").read_bytes()}
    template = path / "chat_template.jinja"
    if template.is_file():
        files["chat_template.jinja"] = template.read_bytes()
        about["chat_template"] = template.read_text("utf-8")
    files["tokenizer_config.json"] = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    files["generation_config.json"] = (json.dumps(ids, indent=2) + "\n").encode()
    return files


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(do, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
