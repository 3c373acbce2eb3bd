"""Experts in four bits as GPT-OSS's files have them: MXFP4 of the OCP Microscaling Formats, dequantized here.

A weight X [E, out, in] is `X_blocks` uint8 [E, out, G, 16], each byte two values of E2M1 with the earlier one
low, and `X_scales` uint8 [E, out, G]: values of a group of 32 inputs times 2^(scale - 127). transformers,
and the rules of `interop.families`, have X as [E, in, out]. Few bits times a power of two are held exactly by
float32 and by bfloat16: nothing is rounded.

E experts, G groups, B bytes of a group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from interop.rules import Slot, read
from interop.safetensors import Tensors

CONFIG = "quantization_config"  # of config.json
METHOD, BLOCKS, SCALES = "mxfp4", "_blocks", "_scales"
KNOWN = {"quant_method", "modules_to_not_convert", "dequantize"}  # the files' names say what is plain
GROUP, BYTES = 32, 16
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; the highest of four bits is the sign
VALUES = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], np.float32)
NO_NUMBER = 255  # as a scale
POWERS = np.ldexp(np.float32(1), np.arange(NO_NUMBER) - 127)


def is_mxfp4(values: Mapping[str, Any]) -> bool:
    """Whether a config.json says that experts are kept so; ValueError for a key beside it that is unknown."""
    about = values.get(CONFIG)
    if values.get("model_type") != "gpt_oss" or not isinstance(about, Mapping):
        return False
    if about.get("quant_method") != METHOD:
        return False
    if strange := sorted(set(about) - KNOWN):
        name = strange[0]
        raise ValueError(f"config.json: {CONFIG}.{name}={about[name]} of {METHOD} is not supported")
    return True


class Mxfp4Tensors:
    """The arrays of a directory with experts in MXFP4, each by the name of what it stands for."""

    def __init__(self, tensors: Tensors):
        """Raises ValueError for blocks and scales that do not fit each other."""
        self.tensors = tensors
        self.entries: dict[str, tuple[Any, ...]] = {}
        there = tensors.entries
        for name, entry in there.items():
            whole = name.removesuffix(BLOCKS).removesuffix(SCALES)
            if name == whole:
                self.entries[name] = entry
                continue
            if whole in there:
                raise ValueError(f"{tensors.path} holds {whole} twice, packed and plain; fetch it again")
            entries = [there.get(whole + ending) for ending in (BLOCKS, SCALES)]
            blocks, scales = (entry and entry[2] for entry in entries)
            if blocks is None or scales is None or len(scales) != 3 or blocks != (*scales, BYTES):
                shapes = [shape and list(shape) for shape in (blocks, scales)]
                raise ValueError(
                    f"{tensors.path}: {whole + BLOCKS} is {shapes[0]} and {whole + SCALES} {shapes[1]}; "
                    f"they must be [E, out, G, {BYTES}] and [E, out, G]; fetch them again"
                )
            experts, out, groups = scales
            path, kind, _, offset = there[whole + BLOCKS]
            self.entries[whole] = (path, kind, (experts, groups * GROUP, out), offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """A view [shape], or float32 [E, in, out] of what is packed; ValueError where there is none."""
        if not self.packs(name):
            return self.tensors[name]
        blocks, scales = (np.moveaxis(self.tensors[name + x], 1, -1) for x in (BLOCKS, SCALES))
        return dequantized(blocks, scales)

    def packs(self, name: str) -> bool:
        """Whether an array is kept in blocks."""
        return name + BLOCKS in self.tensors.entries

    def read(
        self, slot: Slot, named: Callable[[str], str], wanted: tuple[slice, ...], dtype: Any
    ) -> np.ndarray:
        """As `interop.rules.read`, of a parameter [E, in, ...] that is one packed array.

        Of its blocks only the groups that the slice meets are touched.
        """
        experts, inputs, *rest = wanted
        groups = slice(inputs.start // GROUP, -(-inputs.stop // GROUP))

        def part(ending: str, *inner: int) -> np.ndarray:
            count, size, *outer = slot.shape
            source = slot.sources[0]
            rule = replace(source.rule, dims=_dims(source.rule.dims, " B" if inner else ""))
            shape = (count, size // GROUP, *inner, *outer)
            shaped = slot._replace(shape=shape, sources=(source._replace(rule=rule),))
            asked = (experts, groups, *(slice(0, n) for n in inner), *rest)
            return read(shaped, lambda name: self.tensors[named(name) + ending], asked, np.uint8)

        found = dequantized(part(BLOCKS, BYTES), part(SCALES))
        begin = inputs.start - GROUP * groups.start
        return found[:, begin : begin + inputs.stop - inputs.start].astype(dtype)


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [E, in, ...] of blocks [E, G, B, ...] and scales [E, G, ...].

    Raises ValueError where a scale is no number.
    """
    if np.any(scales == NO_NUMBER):
        raise ValueError(f"a scale of {METHOD} is {NO_NUMBER}, which stands for no number; fetch it again")
    halves = np.stack([blocks & 15, blocks >> 4], axis=3)
    values = VALUES[halves] * POWERS[scales][:, :, None, None]
    return values.reshape(len(blocks), -1, *blocks.shape[3:])


def _dims(dims: str, inner: str) -> str:
    """The dims of blocks (inner: " B") or scales: of an array's such as "E F D -> E F D"."""
    left, right = dims.split(" -> ")
    (experts, _, out), (_, _, *ours) = left.split(" ", 2), right.split()
    return f"{experts} {out} G{inner} -> {experts} G{inner} {' '.join(ours)}"
