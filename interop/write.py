"""A model's parameters as a directory of Hugging Face's layout, with all that others want to open it."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from interop.config_out import write_config
from interop.configs import FAMILIES, Family
from interop.rules import Get, Read, Slot, Stacked, arrays, slots, their_shape
from interop.rules import read as assemble
from interop.safetensors import SHARD, Tensors, write_tensors
from models.config import ModelConfig


def export(
    output: Path,
    config: ModelConfig,
    model: Stacked,
    read: Read,
    *,
    family: str | None = None,
    dtype: Any = np.float32,
    files: dict[str, bytes] | None = None,
    extra: dict[str, Any] | None = None,
    shard: int = SHARD,
) -> Family:
    """Write config.json and the weights; the directory gets its name when it is whole and read back.

    family: a model_type, where several could hold the model; None: the plainest that can. files: what lies
    beside them, by name. extra: further keys of config.json. Raises ValueError where no class of theirs
    computes this model, or where `output` is taken.
    """
    refuse_taken(output)
    chosen, values = write_config(config, family)
    found = list(slots(model, chosen.rules(config)))
    with publishing(output, values, dtype, extra or {}, files or {}) as aside:
        shapes = {source.name: their_shape(source, slot.shape) for slot in found for source in slot.sources}
        write_tensors(aside, shapes, arrays(found, read, shapes), dtype, shard)
        check_written(aside, found, read, Tensors(aside).__getitem__, dtype)
    return chosen


def refuse_taken(output: Path) -> None:
    """Raise ValueError where there is something of that name already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={output} is there already; remove it or choose another")


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A directory aside that gets its name at the end, or goes."""
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def publishing(
    output: Path,
    values: Mapping[str, Any],
    dtype: Any,
    extra: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Iterator[Path]:
    """Such a directory with config.json and the files beside it."""
    with whole(output) as aside:
        kind = str(np.dtype(dtype))  # transformers 5 calls it otherwise than 4
        text = json.dumps({**values, "torch_dtype": kind, "dtype": kind, **extra}, indent=2)
        (aside / "config.json").write_text(text + "\n", "utf-8")
        for name, content in files.items():
            (aside / name).write_bytes(content)
        yield aside


def reader(params: Any) -> Read:
    """`Read` of a tree of parameters."""

    def read(path: tuple[str, ...], row: int | None) -> np.ndarray:
        leaf = params
        for name in path:
            leaf = leaf[name]
        return np.asarray(leaf if row is None else leaf[row])

    return read


def check_written(where: Path, found: Sequence[Slot], read: Read, get: Get, dtype: Any) -> None:
    """Compare every array with what is read back: what was written must be what was meant, to the bit."""
    kind = np.dtype(dtype)
    for slot in found:
        ours = read(slot.path, slot.row).astype(kind)
        if not np.array_equal(assemble(slot, get, dtype=kind.type), ours):
            raise ValueError(f"{where}: {'/'.join(slot.path)} was not written as it is; is the disk sound?")


def families_for(config: ModelConfig) -> list[str]:
    """The model types whose class computes this model, the plainest first."""
    found = []
    for name in FAMILIES:
        try:
            write_config(config, name)
        except ValueError:
            continue
        found.append(name)
    return found
