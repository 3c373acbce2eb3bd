"""A model's parameters as one GGUF file, with its tokenizer, as llama.cpp opens it."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replacing
from interop.config_out import difference, write_config
from interop.gguf import GGUF, restored, write_gguf
from interop.gguf_model import (
    ARCHITECTURES,
    EPSILONS,
    HEAD,
    ROUTER,
    STRETCHES,
    TABLE,
    Architecture,
    read_model,
    stretches_of,
)
from interop.packed.gguf_blocks import Packed, grids, kinds_of
from interop.rules import Read, Stacked, arrays, slots, their_shape
from models.config import ModelConfig

# What files say and llama.cpp leaves out: it looks further back. Read as the family has it, and not written.
UNHEEDED = {("phi3", "attention.sliding_window")}
# What llama.cpp calls a file by most of its numbers.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


def export_gguf(
    output: Path,
    config: ModelConfig,
    model: Stacked,
    read: Read,
    *,
    kind: str = "F32",
    values: Mapping[str, Any] | None = None,
    packed: Packed | None = None,
) -> str:
    """Write a file that gets its name when it is whole and read back; the architecture's name.

    kind: of matrices; vectors and routers stay F32, and of Q8_0 rows that are no blocks of 32 are F16.
    values: of the tokenizer. packed: parameters whose levels are written as they are, of which `read` is not
    asked. Raises ValueError where llama.cpp computes no such model, GGUF has no blocks of such levels, or
    `output` is taken.
    """
    if output.exists():
        raise ValueError(f"output={output} is there already; remove it or choose another")
    found = describe(config)
    packed = packed or {}
    places = list(slots(model, found.architecture.rules(config)))
    levels = [slot for slot in places if slot.path in packed]
    plain = [slot for slot in places if slot.path not in packed]
    shapes = {source.name: their_shape(source, slot.shape) for slot in places for source in slot.sources}
    every = {name: array.shape for name, array in found.extra.items()} | shapes
    blocks = kinds_of(model, levels, packed)
    if both := sorted(blocks.keys() & {source.name for slot in plain for source in slot.sources}):
        raise ValueError(f"{both[0]} would be quantized in part; quantize all projections in it, or keep all")
    kinds = {name: _kind(name, shape, kind) for name, shape in every.items()} | blocks
    numbers: Counter[str] = Counter()
    for name, shape in every.items():
        numbers[kinds[name]] += math.prod(shape)
    metadata = {
        **found.values,
        "general.name": config.name,
        "general.file_type": FILE_TYPES[numbers.most_common(1)[0][0] if blocks else kind],
        "general.quantization_version": 2,
        **(values or {}),
    }

    def content() -> Iterator[tuple[str, Any]]:
        return itertools.chain(arrays(plain, read, shapes), grids(levels, packed, shapes))

    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as path:
        write_gguf(path, metadata, every, kinds, itertools.chain(found.extra.items(), content()))
        file = GGUF(path)
        for name, array in content():
            if not np.array_equal(file[name], restored(array, kinds[name])):
                raise ValueError(f"{output}: {name} was not written as it is; is the disk sound?")
    return found.architecture.name


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or ROUTER in name:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


@dataclass(frozen=True)
class Description:
    """A model in GGUF's words: its values, its rules, and arrays that are no parameters."""

    architecture: Architecture
    values: dict[str, Any]
    extra: dict[str, np.ndarray]


def describe(config: ModelConfig) -> Description:
    """The first architecture that computes this model: what is written reads back as the same model.

    Raises ValueError where none does, with the reason of the plainest that came nearest.
    """
    reason = ""
    for architecture in ARCHITECTURES:
        try:
            _, values = write_config(config, architecture.family)
        except ValueError as error:
            reason = reason or str(error)
            continue
        found = _described(config, architecture, values)
        try:
            _, back, _, _ = read_model(_Probe(config, found))
        except ValueError as error:
            reason = str(error)
            continue
        if not (differs := difference(config, back)):
            return found
        reason = f"{architecture.name} cannot say {differs}"
    names = ", ".join(sorted({a.name for a in ARCHITECTURES}))
    raise ValueError(f"llama.cpp's {names} do not compute this model: {reason}")


class _Probe(GGUF):
    """A description as if it were a file: what reading asks of one."""

    def __init__(self, config: ModelConfig, found: Description):
        self.path, self.metadata, self.extra = "the GGUF", found.values, found.extra  # type: ignore[assignment]
        shapes = {TABLE: (config.vocab_size, config.d_model)}
        shapes |= {} if config.tie_embeddings else {HEAD: shapes[TABLE]}
        biases = {"blk.0.attn_q.bias": (0,), "blk.0.ffn_up.bias": (0,)} if config.bias else {}
        arrays = {name: array.shape for name, array in found.extra.items()}
        self.entries = {
            n: (self.path, "F32", shape, 0) for n, shape in {**shapes, **biases, **arrays}.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self.extra[name]


def _described(config: ModelConfig, architecture: Architecture, values: Mapping[str, Any]) -> Description:
    head = architecture.name + "."
    written = {
        head + key: values[name]
        for key, name in architecture.words.items()
        # Such a file has no word for none: it leaves the key out.
        if values.get(name) is not None and (architecture.name, key) not in UNHEEDED
    }
    written[head + "vocab_size"] = config.vocab_size
    if architecture.rotates:
        written[head + "rope.dimension_count"] = round(config.head_dim * config.rope_fraction)
        written[head + "attention.value_length"] = config.head_dim
    for key in (*(f"attention.layer_norm_{x}" for x in EPSILONS), "rope.freq_base", "rope.freq_base_swa"):
        if head + key in written:
            written[head + key] = float(written[head + key])
    extra: dict[str, np.ndarray] = {}
    if (scaling := config.rope_scaling) is not None and scaling.kind == "llama3":
        extra[STRETCHES] = stretches_of(scaling, config.rope_theta, config.head_dim).astype(np.float32)
    elif scaling is not None:
        written |= {
            head + "rope.scaling.type": scaling.kind,
            head + "rope.scaling.factor": float(scaling.factor),
        }
        if scaling.kind == "yarn":
            written[head + "rope.scaling.original_context_length"] = scaling.original_length
    return Description(architecture, {"general.architecture": architecture.name, **written}, extra)
