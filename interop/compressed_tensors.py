"""Quantized weights as the `compressed-tensors` package keeps them, which vLLM and transformers open too.

A module's `weight` is then `weight_packed` (int32 words of as many levels as fit in one, the first lowest,
each plus half of the range), `weight_scale` [out, groups], `weight_zero_point` where 0 is not in the middle,
and `weight_shape`; in float8 it stays `weight`. Read as bytes the words of four bits are our own packing, so
that the rules of names and dims (`interop.rules`) say of every part where it belongs, as they do of arrays.
A grid of 2, 3, 5, 6 bits goes out in words of four or eight; `grid_bits` in config.json says what it is.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.config_out import write_config
from interop.configs import Family
from interop.rules import Read, Slot, Stacked, arrays, letters, slots, their_shape
from interop.safetensors import SHARD, Tensors, write_tensors
from interop.write import check_written, publishing, reader, refuse_taken
from models.config import ModelConfig
from models.param import ParamInfo
from models.weights import FLOAT8, QTensor, quantized_info, reduced

GRIDS, CONFIG = "grid_bits", "quantization_config"
KEYS = (GRIDS, CONFIG)  # of config.json, beside the model's own
METHOD, INTEGERS, FLOATS = "compressed-tensors", "pack-quantized", "float-quantized"
PACKED, SCALE, ZERO, SHAPE = "_packed", "_scale", "_zero_point", "_shape"  # behind "weight"
WORD = 32  # bits


@dataclass(frozen=True)
class Scheme:
    """How a module's weight is kept: bits of a level and of the grid, inputs to a scale (None: all)."""

    bits: int
    group: int | None
    symmetric: bool
    floating: bool = False
    grid: int | None = None

    def info(self, info: ParamInfo) -> QTensor:
        """The certificates of such a weight."""
        bits = self.grid or self.bits
        return quantized_info(info, bits, self.group, symmetric=self.symmetric, floating=self.floating)

    def values(self) -> dict[str, Any]:
        """As config.json has it."""
        size = {"strategy": "channel" if self.group is None else "group", "group_size": self.group}
        kind = "float" if self.floating else "int"
        return {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric, "dynamic": False, **size}


def is_packed(values: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are kept so."""
    about = values.get(CONFIG)
    return isinstance(about, Mapping) and about.get("quant_method") == METHOD


class PackedTensors:
    """The arrays of a directory with quantized weights, each by the name of the weight that it stands for.

    `[name]` is float32, dequantized; `part(name, "q" | "scale" | "zero")` what a QTensor is made of.
    """

    def __init__(self, tensors: Tensors, values: Mapping[str, Any]):
        """Raises ValueError for a scheme that is not supported, or a weight whose parts do not fit."""
        self.tensors = tensors
        self._schemes = _read_schemes(values)
        self._kinds: dict[str, Scheme] = {}
        self.entries: dict[str, tuple[Any, ...]] = {}
        for name, entry in tensors.entries.items():
            weight = name.removesuffix(PACKED).removesuffix(SCALE).removesuffix(ZERO).removesuffix(SHAPE)
            if weight + SCALE not in tensors.entries:
                self.entries[name] = entry
            elif name in (weight, weight + PACKED):
                scheme = self._kinds[weight] = self._scheme_of(weight)
                shape = entry[2]
                if name != weight:
                    shape = tuple(int(size) for size in tensors[weight + SHAPE])
                self.entries[weight] = (entry[0], entry[1], shape, entry[3])
                self._check(weight, scheme, shape)
        self._dequantized = lru_cache(maxsize=2)(self._dequantize)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """A view [shape], or float32 of what is packed; ValueError where there is none."""
        return self._dequantized(name) if name in self._kinds else self.tensors[name]

    def scheme(self, name: str) -> Scheme | None:
        """How a weight is packed; None: it is an array."""
        return self._kinds.get(name)

    def part(self, name: str, kind: str) -> np.ndarray:
        """Of a packed weight [out, in]: levels as a QTensor stores them, scale and zero [out, groups]."""
        scheme = self._kinds[name]
        if kind == "scale":
            return np.asarray(self.tensors[name + SCALE], np.float32)
        out, size = self.entries[name][2]
        if kind == "zero":
            groups = self.tensors.entries[name + SCALE][2][1]
            return _unpacked(self.tensors[name + ZERO].T, scheme.bits, out).T.reshape(out, groups)
        if scheme.floating:
            return self.tensors[name]
        words = np.ascontiguousarray(self.tensors[name + PACKED])
        if scheme.bits == 8:
            return _unpacked(words, 8, size)
        return words.view(np.uint8)[:, : size // 2]  # our own bytes: the even one low, each plus 8

    def _dequantize(self, name: str) -> np.ndarray:
        scheme = self._kinds[name]
        levels, scale = self.part(name, "q"), self.part(name, "scale")
        if scheme.bits == 4:
            levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(self.entries[name][2]) - 8.0
        levels = levels.astype(np.float32)
        size = levels.shape[1] // scale.shape[1]
        if not scheme.symmetric:
            levels = levels - np.repeat(self.part(name, "zero").astype(np.float32), size, axis=1)
        return levels * np.repeat(scale, size, axis=1)

    def _scheme_of(self, weight: str) -> Scheme:
        module = weight.removesuffix(".weight")
        for targets, scheme in self._schemes:
            if any(_targets(target, module) for target in targets):
                return scheme
        raise ValueError(f"{self.tensors.path}: no group of {CONFIG} says how {weight} is packed")

    def _check(self, weight: str, scheme: Scheme, shape: tuple[int, ...]) -> None:
        there, out, size = self.tensors.entries, *shape
        per_word, groups = WORD // scheme.bits, size // (scheme.group or size)
        wanted = {SCALE: (out, groups)}
        if not scheme.floating:
            wanted[PACKED] = (out, -(-size // per_word))
        if not scheme.symmetric:
            wanted[ZERO] = (-(-out // per_word), groups)
        for ending, fits in wanted.items():
            found = there[weight + ending][2] if weight + ending in there else None
            if found != fits:
                raise ValueError(
                    f"{self.tensors.path}: {weight + ending} is {found and list(found)}; of a weight "
                    f"{list(shape)} it must be {list(fits)}"
                )


def _read_schemes(values: Mapping[str, Any]) -> list[tuple[list[str], Scheme]]:
    about = values[CONFIG]
    found = []
    grids = values.get(GRIDS) or {}
    if about.get("kv_cache_scheme"):
        raise ValueError(f"config.json: {CONFIG}.kv_cache_scheme is not supported; use weights alone")
    for name, group in (about.get("config_groups") or {}).items():
        where = f"config.json: {CONFIG}.config_groups.{name}"
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError(f"{where} quantizes activations, which is not supported; use weights alone")
        weights = group.get("weights") or {}
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        floating, strategy = kind == "float", weights.get("strategy")
        bits = int(bits or 0)
        if bits not in ((8,) if floating else (4, 8)) or strategy not in ("channel", "group"):
            raise ValueError(
                f"{where}: {kind} num_bits={bits} strategy={strategy} is not supported; "
                "use int of 4 or 8 bits, or float of 8, by channel or group"
            )
        size = weights.get("group_size") if strategy == "group" else None
        scheme = Scheme(bits, size, weights.get("symmetric", True), floating, grids.get(name))
        found.append((list(group.get("targets") or []), scheme))
    return found


def _targets(target: str, module: str) -> bool:
    """Whether a group's target names a module: by an expression, its name, or the class of all of them."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear")


def _unpacked(words: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Levels int8 [rows, size] of int32 words [rows, words]."""
    per_word = WORD // bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    parts = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return (parts.reshape(words.shape[0], -1)[:, :size].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _words(levels: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [rows, words] of levels int8 [rows, size], zeros behind the last."""
    per_word = WORD // bits
    raised = (levels.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
    raised = np.pad(raised, ((0, 0), (0, -levels.shape[1] % per_word)))
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    parts = raised.reshape(levels.shape[0], -1, per_word) << shifts
    return np.bitwise_or.reduce(parts, axis=-1).view(np.int32)


# -- out ---------------------------------------------------------------------------------------------------


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
    leaves = {path: leaf for path, leaf in _leaves(params)}
    schemes: dict[str, Scheme] = {}  # by the template of a name
    for slot in found:
        leaf = leaves[slot.path]
        if isinstance(leaf, QTensor):
            info = _info(model, slot.path)
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


def _leaves(params: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QTensor))[0]
    return ((tuple(entry.key for entry in path), leaf) for path, leaf in flat)


def _info(model: Stacked, path: tuple[str, ...]) -> ParamInfo:
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
