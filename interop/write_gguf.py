"""A model's parameters as one GGUF file, with its tokenizer, as llama.cpp opens it."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replacing
from interop.gguf import GGUF, restored, write_gguf
from interop.gguf_model import ROUTER, describe
from interop.rules import Stacked, slots, their_shape
from interop.write import Read, arrays
from models.config import ModelConfig

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # what llama.cpp calls a file by most of its arrays


def export_gguf(
    output: Path,
    config: ModelConfig,
    model: Stacked,
    read: Read,
    *,
    kind: str = "F32",
    values: Mapping[str, Any] | None = None,
) -> str:
    """Write a file that gets its name when it is whole and read back; the architecture's name.

    kind: of matrices; vectors and routers stay F32, and of Q8_0 rows that are no blocks of 32 are F16.
    values: of the tokenizer. Raises ValueError where llama.cpp computes no such model, or `output` is taken.
    """
    if output.exists():
        raise ValueError(f"output={output} is there already; remove it or choose another")
    found = describe(config)
    places = list(slots(model, found.architecture.rules(config)))
    shapes = {source.name: their_shape(source, slot.shape) for slot in places for source in slot.sources}
    every = {name: array.shape for name, array in found.extra.items()} | shapes
    kinds = {name: _kind(name, shape, kind) for name, shape in every.items()}
    metadata = {
        **found.values,
        "general.name": config.name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        **(values or {}),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as path:
        content = itertools.chain(found.extra.items(), arrays(places, read, shapes))
        write_gguf(path, metadata, every, kinds, content)
        file = GGUF(path)
        for name, array in arrays(places, read, shapes):
            if not np.array_equal(file[name], restored(array, kinds[name])):
                raise ValueError(f"{output}: {name} was not written as it is; is the disk sound?")
    return found.architecture.name


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or ROUTER in name:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind
