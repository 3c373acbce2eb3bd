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
from functools import lru_cache
from typing import Any

import numpy as np

from interop.safetensors import Tensors
from models.param import ParamInfo
from models.weights import QTensor, quantized_info

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
