"""Published weights as a model's parameters, straight onto the devices that own them.

A directory of Hugging Face's layout, or a GGUF file: either gives a config.json's values, arrays by name, and
the rules of these names.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.configs import Family, read_config
from interop.families import Rules
from interop.gguf import GGUF
from interop.gguf_model import read_model
from interop.packed.compressed_tensors import KEYS as PACKED_KEYS
from interop.packed.compressed_tensors import PackedTensors, is_packed
from interop.packed.mxfp4 import Mxfp4Tensors, is_mxfp4
from interop.places import Place, size_of
from interop.rules import Get, Slot, Stacked, read, slots, their_shape
from interop.safetensors import BLOCK, Tensors
from models.config import ModelConfig
from models.weights import QTensor

# Arrays that files carry and no model needs: tables of rotations, masks, images, Qwen's further tokens.
IDLE = re.compile(
    r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|(^|\.)(vision_tower|multi_modal_projector|visual)\."
    r"|^rope_freqs\.weight$|^mtp\."
)
PREFIXES = ("", "model.", "transformer.", "language_model.", "model.language_model.")


class Published:
    """Weights in a directory with a config.json, or in a GGUF file, whatever made them."""

    def __init__(self, path: Place):
        """Raises ValueError for what is neither, or is of a kind that is not supported."""
        self.path = self.source = path  # of the weights; and what was asked for
        self.config: ModelConfig
        self.family: Family
        self.rules: Rules
        self.tensors: Tensors | PackedTensors | Mxfp4Tensors | GGUF
        self.values: Mapping[str, Any]
        if path.is_file():
            self.format, self.tensors = "gguf", GGUF(path)
            self.values, self.config, self.family, self.rules = read_model(self.tensors)
            return
        try:
            values = json.loads((path / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path / 'config.json'} cannot be read ({error}); fetch it again") from error
        self.values = values
        self.config, self.family = read_config(_without_quantization(values))
        self.format, self.tensors = "hf", _tensors(path, values)
        further = f"model.layers.{self.config.num_layers}."
        if self.config.mtp is not None and not any(name.startswith(further) for name in self.tensors):
            # transformers keeps the key and writes no such layers: the next token is the same without them.
            self.config = dataclasses.replace(self.config, mtp=None)
        self.rules = self.family.rules(self.config)

    @property
    def says(self) -> Place:
        """The file that says which model it is."""
        return self.path if self.format == "gguf" else self.path / "config.json"

    def facts(self) -> dict[str, Any]:
        """What a run's manifest keeps of where it began: each file's bytes, the digest of their tables."""
        files = sorted({entry[0] for entry in self.tensors.entries.values()}, key=str)
        table = json.dumps({name: [str(e[1]), e[2], e[3]] for name, e in self.tensors.entries.items()})
        digest = hashlib.sha256((json.dumps(self.values, sort_keys=True) + table).encode()).hexdigest()
        sizes = {file.name: size_of(file) for file in files}
        return {"path": str(self.path), "format": self.format, "files": sizes, "digest": digest}

    def slots(self, model: Stacked) -> list[Slot]:
        """All that fills the model's parameters, checked against what is there before any is read.

        Raises ValueError where an array is missing, has another shape, or is there and would not be used.
        """
        found = list(slots(model, self.rules))
        used = set(self._copies(self.config))
        for slot in found:
            for source in slot.sources:
                name = self.named(source.name)
                there, wanted = self.tensors.entries[name][2], their_shape(source, slot.shape)
                if there != wanted:
                    raise ValueError(
                        f"{self.path}: {name} is {list(there)}, and this model's is {list(wanted)}"
                    )
                used.add(name)
        unused = sorted(name for name in self.tensors if name not in used and not IDLE.search(name))
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise ValueError(
                f"{self.path}: {unused[0]}{more} is not part of this model; is it another one's?"
            )
        return found

    def named(self, name: str) -> str:
        """The name by which the files have this array: some leave the outermost module's out, or add one."""
        bare = re.sub(r"^(model|transformer)\.", "", name)
        for prefix in PREFIXES:
            for inner in (name, bare):
                if prefix + inner in self.tensors.entries:
                    return prefix + inner
        raise ValueError(f"{self.path}: {name} is missing; fetch the files again")

    def _copies(self, config: ModelConfig) -> set[str]:
        """Names of arrays that are copies of others: they must be, and are not read."""
        copies = {}
        if config.tie_embeddings and "lm_head.weight" in self.tensors.entries:
            copies["lm_head.weight"] = self.named("model.embed_tokens.weight")
        for depth in range(config.mtp_depth):
            layer = f"model.layers.{config.num_layers + depth}."
            copies[layer + "embed_tokens.weight"] = self.named("model.embed_tokens.weight")
            copies[layer + "shared_head.head.weight"] = self.named("lm_head.weight")
        for copy, original in copies.items():
            if copy in self.tensors.entries and not np.array_equal(
                self.tensors[copy], self.tensors[original]
            ):
                raise ValueError(f"{self.path}: {copy} differs from {original}, which it must be a copy of")
        return {name for name in copies if name in self.tensors.entries}

    def infos(self, model: Stacked) -> Any:
        """The parameters' birth certificates as they lie here: a QTensor's where all of one is packed."""
        if not isinstance(self.tensors, PackedTensors):
            return model.info
        found: dict[tuple[str, ...], set[Any]] = {}
        for slot in self.slots(model):
            there = {self.tensors.scheme(self.named(source.name)) for source in slot.sources}
            found.setdefault(slot.path, set()).update(there)

        def of(path: Any, info: Any) -> Any:
            scheme, *others = found[tuple(entry.key for entry in path)]
            return info if scheme is None or others else scheme.info(info)

        return jax.tree_util.tree_map_with_path(of, model.info)

    def weights(self, abstract: Any, model: Stacked) -> Any:
        """Parameters as `abstract` (shapes, dtypes, shardings; layers stacked [count, ...]) says.

        Layer by layer: each device's slice of one layer is read, put, and written into a donated stack, so
        that a host holds one layer of one parameter beside its arrays. What is packed is read as a QTensor
        where `abstract` has one, and dequantized where it has an array.
        """
        by_path: dict[tuple[str, ...], list[Slot]] = {}
        for slot in self.slots(model):
            by_path.setdefault(slot.path, []).append(slot)

        def get(name: str) -> np.ndarray:
            return self.tensors[self.named(name)]

        def leaf(path: Any, like: Any) -> Any:
            found = by_path[tuple(entry.key for entry in path)]
            return self._packed(found, like) if isinstance(like, QTensor) else self._leaf(found, like, get)

        return jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=lambda x: isinstance(x, QTensor))

    def _packed(self, found: list[Slot], like: QTensor) -> QTensor:
        tensors = self.tensors
        assert isinstance(tensors, PackedTensors)

        def part(kind: str) -> Any:
            own = getattr(like, kind)
            shaped = [s._replace(shape=own.shape if s.row is None else own.shape[1:]) for s in found]
            return self._leaf(shaped, own, lambda name: tensors.part(self.named(name), kind))

        kinds = ("q", "scale") if like.zero is None else ("q", "scale", "zero")
        return dataclasses.replace(like, **{kind: part(kind) for kind in kinds})

    def _leaf(self, found: list[Slot], like: Any, get: Get) -> jax.Array:
        if found[0].row is None:
            return self._array(found[0], like.shape, like.sharding, like.dtype, get)
        return self._stack(found, like, get)

    def _read(self, slot: Slot, get: Get, wanted: tuple[slice, ...], dtype: Any) -> np.ndarray:
        tensors = self.tensors
        if isinstance(tensors, Mxfp4Tensors) and tensors.packs(self.named(slot.sources[0].name)):
            return tensors.read(slot, self.named, wanted, dtype)
        return read(slot, get, wanted, dtype)

    def _array(self, slot: Slot, shape: tuple[int, ...], sharding: Any, dtype: Any, get: Get) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = tuple(slice(*one.indices(n)[:2]) for one, n in zip(index, shape, strict=True))
            return self._read(slot, get, wanted, np.dtype(dtype).type)

        return jax.make_array_from_callback(shape, sharding, part)

    def _stack(self, found: list[Slot], like: Any, get: Get) -> jax.Array:
        spec, mesh = like.sharding.spec, like.sharding.mesh
        one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[1:]))
        if spec and spec[0] is not None:  # layers are split too: read each device's own
            return self._split_layers(found, like, get)
        stack = jax.jit(partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding)()
        put = _writer(like.sharding, one)
        for slot in found:
            assert slot.row is not None
            stack = put(stack, self._array(slot, slot.shape, one, like.dtype, get), slot.row)
        return stack

    def _split_layers(self, found: list[Slot], like: Any, get: Get) -> jax.Array:
        by_row = {slot.row: slot for slot in found}

        def part(index: Any) -> np.ndarray:
            rows, *inner = (slice(*one.indices(n)[:2]) for one, n in zip(index, like.shape, strict=True))
            kind = np.dtype(like.dtype).type
            return np.stack(
                [self._read(by_row[r], get, tuple(inner), kind) for r in range(rows.start, rows.stop)]
            )

        return jax.make_array_from_callback(like.shape, like.sharding, part)


def _tensors(path: Place, values: Mapping[str, Any]) -> Tensors | PackedTensors | Mxfp4Tensors:
    """A directory's arrays, of which those that are quantized stand for what they were."""
    tensors = Tensors(path)
    if is_packed(values):
        return PackedTensors(tensors, values)
    return Mxfp4Tensors(tensors) if is_mxfp4(values) else tensors


def _without_quantization(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json without the quantization that is undone here: packed, MXFP4, FP8 in blocks (DeepSeek)."""
    if is_packed(values) or is_mxfp4(values):
        return {key: value for key, value in values.items() if key not in PACKED_KEYS}
    about = values.get("quantization_config")
    undone = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    if not isinstance(about, Mapping) or {key: about.get(key) for key in undone} != undone:
        return values
    return {key: value for key, value in values.items() if key != "quantization_config"}


def _writer(stack: Any, one: Any) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def put(whole: jax.Array, layer: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, layer, row, 0)

    return jax.jit(put, donate_argnums=0, in_shardings=(stack, one, None), out_shardings=stack)
