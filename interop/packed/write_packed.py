"""A model with quantized weights as a directory that the `compressed-tensors` package reads."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.config_out import write_config
from interop.configs import Family
from interop.packed.compressed_tensors import (
    CONFIG,
    FLOATS,
    GRIDS,
    INTEGERS,
    METHOD,
    PACKED,
    SCALE,
    SHAPE,
    WORD,
    ZERO,
    PackedTensors,
    Scheme,
)
from interop.rules import Read, Slot, Stacked, arrays, letters, slots, their_shape
from interop.safetensors import SHARD, Tensors, write_tensors
from interop.write import check_written, publishing, reader, refuse_taken
from models.config import ModelConfig
from models.grid import FLOAT8
from models.param import ParamInfo
from models.weights import QTensor, reduced


def export_packed(
    output: Path,
    config: ModelConfig,
    model: Stacked,
    params: Any,
    *,
    family: str | None = None,
    dtype: Any = np.float32,
    files: Mapping[str, bytes] | None = None,
    extra: Mapping[str, Any] | None = None,
    shard: int = SHARD,
) -> Family:
    """As `interop.write.export`, of parameters some of which are QTensors; dtype: of those that are arrays.

    Raises ValueError also where theirs keeps such a weight otherwise than as [outputs, inputs].
    """
    refuse_taken(output)
    chosen, values = write_config(config, family)
    found = list(slots(model, chosen.rules(config)))
    leaves = {path: leaf for path, leaf in leaves_by_path(params)}
    schemes: dict[str, Scheme] = {}  # by the template of a name
    for slot in found:
        leaf = leaves[slot.path]
        if isinstance(leaf, QTensor):
            info = info_at(model, slot.path)
            for source in slot.sources:
                _check_layout(source, slot, info)
                template = source.rule.names[source.pair if len(source.rule.names) > 1 else 0]
                schemes[template] = scheme_of(leaf, info)
    plain = [slot for slot in found if not isinstance(leaves[slot.path], QTensor)]
    read = reader(params)
    shapes = {source.name: their_shape(source, slot.shape) for slot in plain for source in slot.sources}
    kinds: dict[str, Any] = dict.fromkeys(shapes, dtype)
    streams: list[Iterator[tuple[str, np.ndarray]]] = [arrays(plain, read, dict(shapes))]
    checks: list[tuple[str, list[Slot], Read]] = []
    for part in ("q", "scale", "zero"):
        mine = [s for s in found if getattr(leaves[s.path], part, None) is not None]
        mine = [s for s in mine if isinstance(leaves[s.path], QTensor)]
        if not mine:
            continue
        shaped = [_shaped(slot, getattr(leaves[slot.path], part)) for slot in mine]
        read_part = _reader_of(leaves, part)
        theirs = {source.name: their_shape(source, slot.shape) for slot in shaped for source in slot.sources}
        by_name = {source.name: leaves[slot.path] for slot in mine for source in slot.sources}
        for name, shape in theirs.items():
            for stored, size, kind in _stored(part, name, shape, by_name[name]):
                shapes[stored], kinds[stored] = size, kind
        streams.append(_renamed(part, arrays(shaped, read_part, theirs), by_name))
        checks.append((part, shaped, read_part))
    values = {**values, **_config(schemes)}
    with publishing(output, values, dtype, extra or {}, files or {}) as aside:
        write_tensors(aside, shapes, chain(*streams), kinds, shard)
        back = PackedTensors(Tensors(aside), values)
        check_written(aside, plain, read, back.__getitem__, dtype)
        for part, shaped, read_part in checks:
            for slot in shaped:  # one by one: dtypes of levels differ
                kind = np.dtype(read_part(slot.path, slot.row).dtype)
                check_written(aside, [slot], read_part, partial(back.part, kind=part), kind)
    return chosen


def scheme_of(weight: QTensor, info: ParamInfo) -> Scheme:
    """How a weight is kept; info: of it, stacked as it is."""
    dims = reduced(info)
    size = int(np.prod([info.shape[d] for d in dims]))
    groups = int(np.prod([weight.scale.shape[d] for d in dims]))
    floating = jnp.dtype(weight.q.dtype) == FLOAT8
    group = None if groups == 1 else size // groups
    return Scheme(weight.bits, group, weight.zero is None, floating, weight.grid)


def _check_layout(source: Any, slot: Slot, info: ParamInfo) -> None:
    groups, right = letters(source.rule)
    first = 0 if slot.row is None else 1
    inner = tuple(right[dim - first] for dim in reduced(info))
    if len(groups) != 2 or groups[1] != inner or source.rule.add:
        raise ValueError(
            f"{source.name} is not [outputs, inputs] in this family, and cannot be packed; "
            "use another family, or keep its projection as it is"
        )


def _stored(
    part: str, name: str, shape: tuple[int, ...], weight: QTensor
) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, shape, dtype) of the arrays that a part [out, ...] of a weight becomes."""
    per_word, floating = WORD // weight.bits, jnp.dtype(weight.q.dtype) == FLOAT8
    if part == "scale":
        yield name + SCALE, shape, np.float32
    elif part == "zero":
        yield name + ZERO, (-(-shape[0] // per_word), shape[1]), np.int32
    elif floating:
        yield name, shape, FLOAT8
    else:
        size = shape[1] * (2 if weight.bits == 4 else 1)
        yield name + PACKED, (shape[0], -(-size // per_word)), np.int32
        yield name + SHAPE, (2,), np.int64


def _renamed(
    part: str, given: Iterator[tuple[str, np.ndarray]], weights: Mapping[str, QTensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """A part's arrays [out, ...] as they are stored."""
    for name, array in given:
        bits, (out, size) = weights[name].bits, array.shape
        if part == "scale":
            yield name + SCALE, array
        elif part == "zero":
            yield name + ZERO, np.ascontiguousarray(_words(np.ascontiguousarray(array.T), bits).T)
        elif array.dtype == FLOAT8:
            yield name, array
        elif bits == 8:
            yield name + PACKED, _words(array, 8)
            yield name + SHAPE, np.array([out, size])
        else:
            padded = np.pad(array, ((0, 0), (0, -size % 4)))
            yield name + PACKED, np.ascontiguousarray(padded).view(np.int32)
            yield name + SHAPE, np.array([out, 2 * size])


def _config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """What config.json says of the templates' modules: a group a scheme."""
    groups: dict[str, Any] = {}
    grids = {}
    for number, scheme in enumerate(dict.fromkeys(schemes.values())):
        templates = [template for template, own in schemes.items() if own == scheme]
        targets = [_expression(template.removesuffix(".weight")) for template in templates]
        name = f"group_{number}"
        kind = FLOATS if scheme.floating else INTEGERS
        rest = {"input_activations": None, "output_activations": None, "format": kind}
        groups[name] = {"targets": targets, "weights": scheme.values(), **rest}
        if scheme.grid is not None:
            grids[name] = scheme.grid
    kinds = {group["format"] for group in groups.values()}
    about: dict[str, Any] = {
        "quant_method": METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
    }
    return {CONFIG: about} | ({GRIDS: grids} if grids else {})


def _expression(template: str) -> str:
    """The target that matches the modules of a template, whatever layer and expert."""
    return "re:^" + re.escape(template).replace(r"\{n\}", r"\d+").replace(r"\{e\}", r"\d+") + "$"


def leaves_by_path(params: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Parameters with their paths, QTensors whole."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QTensor))[0]
    return ((tuple(entry.key for entry in path), leaf) for path, leaf in flat)


def info_at(model: Stacked, path: tuple[str, ...]) -> ParamInfo:
    """The certificate of a parameter, stacked as it is."""
    info = model.info
    for name in path:
        info = info[name]
    return info


def _shaped(slot: Slot, part: Any) -> Slot:
    return slot._replace(shape=tuple(part.shape if slot.row is None else part.shape[1:]))


def _reader_of(leaves: Mapping[tuple[str, ...], Any], part: str) -> Read:
    def read(path: tuple[str, ...], row: int | None) -> np.ndarray:
        array = getattr(leaves[path], part)
        return np.asarray(array if row is None else array[row])

    return read


def _words(levels: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [rows, words] of levels int8 [rows, size], zeros behind the last."""
    per_word = WORD // bits
    raised = (levels.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
    raised = np.pad(raised, ((0, 0), (0, -levels.shape[1] % per_word)))
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    parts = raised.reshape(levels.shape[0], -1, per_word) << shifts
    return np.bitwise_or.reduce(parts, axis=-1).view(np.int32)
