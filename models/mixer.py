"""What a token mixer says of itself, and which there are: one file a mixer, in `models/mixers`.

A mixer is the part of a layer through which tokens see each other. Whoever needs to know more of it than its
module asks it here: the cache that decoding keeps, operations, what a layer holds for its backward pass, and
by what its tensors are split. A new one is a file whose `MIXER` is its class; `LayerSpec.mixer` names it.

B batch, T query position, D model.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.checks import choice
from kernels.int8_vectors import Int8Vectors, to_vectors
from kernels.names import Axes
from models.config import MIXERS, ModelConfig
from models.ops import Ops
from models.spec import LayerSpec

Cache = dict[str, Array]
SCALE = "_scale"  # behind the name of an array whose levels are kept


@dataclass(frozen=True)
class CacheArray:
    """One array that a layer keeps of a row while it is decoded, without the dim of the rows.

    axes: a logical axis a dim, of which `length` are the places of tokens, if it has any; the dim without an
    axis is then a token's vector. dtype: None for the compute dtype. parts: sizes of what a vector consists
    of, each with a scale of its own in eight bits; none: it is one.
    """

    shape: tuple[int, ...]
    axes: Axes
    dtype: Any = None
    parts: tuple[int, ...] = ()

    def grown(self, x: Array | None, rows: int, ops: Ops) -> Array:
        """`x` of that many rows, or zeros, with zeros behind it up to this shape, where it belongs."""
        shape = (rows, *self.shape)
        if x is None:
            return self.placed(jnp.zeros(shape, self.dtype or ops.compute_dtype), ops)
        more = [(0, new - old) for new, old in zip(shape, x.shape, strict=True)]
        return self.placed(jnp.pad(x, more), ops)

    def placed(self, x: Array, ops: Ops) -> Array:
        """`x` on the devices that its axes say."""
        # Fewer K/V heads than devices of tensor lie whole on each, and are repeated where they are used.
        whole = "act_kv_heads" if ops.repeat_kv > 1 else None
        return ops.constrain(x, ("batch", *(None if axis == whole else axis for axis in self.axes)))

    @property
    def vector(self) -> int:
        """The dim that is a token's vector."""
        return self.axes.index(None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the parts of a vector."""
        return self.parts or (self.shape[self.vector],)

    @property
    def scales(self) -> "CacheArray":
        """Float32 scales of these vectors, the parts in front: a last dim of one would be padded on TPUs."""

        def without(dims: tuple[Any, ...]) -> tuple[Any, ...]:
            return dims[: self.vector] + dims[self.vector + 1 :]

        shape, axes = (len(self.sizes), *without(self.shape)), (None, *without(self.axes))
        return CacheArray(shape, axes, jnp.float32)


@dataclass(frozen=True)
class Activations:
    """Numbers a token of what a mixer holds at once, over all of its heads.

    queries, keys_values: what goes into the mixing, which `act_heads` and `act_kv_heads` split; all else is
    split by `act_heads`. output: what the kernel's backward pass needs of its output, so that no pass of
    it is made again. products: of projections, that remat=dots keeps. statistics: float32, beside the
    output. squares: heads with a score for each pair of positions, where the backend makes them. inside:
    float32, of a layer that goes backward.
    """

    queries: float
    keys_values: float
    output: float
    products: float
    statistics: float = 0.0
    squares: int = 0
    inside: float = 0.0


@dataclass(frozen=True)
class Dim:
    """A size that meshes split: the config's key for it, and the logical axes of the dims that have it."""

    key: str
    size: int
    axes: tuple[str, ...]


class Mixer(nnx.Module):
    """A token mixer: parameters as any module, and four questions that it answers from the config alone."""

    # Whether a row's positions have to lie on one device: then mesh.context cannot split them.
    whole_rows: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The rows with their tokens mixed, or, with a cache of earlier tokens, with these as well.

        No token sees another document's, or what is padding (segment 0).
        """
        raise NotImplementedError

    @staticmethod
    def cache_arrays(config: ModelConfig, spec: LayerSpec, length: int) -> dict[str, CacheArray]:
        """What a layer keeps of a row of at most `length` tokens."""
        raise NotImplementedError

    @staticmethod
    def flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> tuple[float, float]:
        """Operations a token of a forward pass beyond the weights': over all positions, over causal ones."""
        raise NotImplementedError

    @staticmethod
    def activations(config: ModelConfig) -> Activations:
        """What a layer holds."""
        raise NotImplementedError

    @staticmethod
    def dims(config: ModelConfig) -> tuple[Dim, ...]:
        """What meshes split of its parameters and activations."""
        raise NotImplementedError


def kept(arrays: dict[str, CacheArray], bits: int | None) -> dict[str, CacheArray]:
    """The arrays as they are kept: of 8 bits, what has places of tokens as int8 levels, beside their scales.

    A state that no token adds a place to is no sum of vectors, and stays as it is.
    """
    found = dict(arrays)
    for name, array in arrays.items():
        if bits is not None and "length" in array.axes:
            found |= {name: replace(array, dtype=jnp.int8), name + SCALE: array.scales}
    return found


def vectors(cache: Cache, name: str, array: CacheArray, batch: dict[str, Array], ops: Ops) -> Any:
    """What the cache has of `name`, as attention takes it: an array in the compute dtype.

    Of pages in eight bits `Int8Vectors`: whoever reads a page makes numbers of it, and not of all of them.
    """
    if name + SCALE not in cache:
        return cache[name]
    scale = jnp.moveaxis(cache[name + SCALE], 1, 1 + array.vector)
    found = Int8Vectors(cache[name], scale, array.sizes)
    return found if "pages" in batch else found.floats(ops.compute_dtype)


def extend_cache(
    cache: Cache, new: Cache, arrays: dict[str, CacheArray], batch: dict[str, Array], ops: Ops
) -> Cache:
    """The cache with what is new of a batch [B, T] at its tokens' own places; padding has none.

    new: arrays as `arrays` describes them, of T places. Of a cache in pages, [pages, ...] with the places of
    a page as its length, `batch["pages"]` [B, M] says which a row has, in order. A cache in eight bits gets
    them so, and what it once has is never rounded again.
    """
    if ops.cache_bits is not None:
        rounded: Cache = {}
        for name, part in new.items():
            dim = 1 + arrays[name].vector
            found = to_vectors(part, dim, arrays[name].sizes)
            rounded |= {name: found.levels, name + SCALE: jnp.moveaxis(found.scale, dim, 1)}
        new, arrays = rounded, kept(arrays, ops.cache_bits)
    filled = {}
    for name, part in new.items():
        place = arrays[name].axes.index("length")
        if "pages" in batch:
            filled[name] = _written(cache[name], part.astype(cache[name].dtype), place + 1, batch)
            continue
        # A place beyond the end is nobody's: what is padding there is dropped.
        index = jnp.where(batch["segment_ids"] > 0, batch["positions"], arrays[name].shape[place])
        before = (slice(None),) * place
        # Row by row, so that where rows lie on several devices each writes its own.
        write = jax.vmap(lambda old, at, x, before=before: old.at[(*before, at)].set(x, mode="drop"))
        filled[name] = arrays[name].placed(write(cache[name], index, part.astype(cache[name].dtype)), ops)
    return filled


def _written(pool: Array, part: Array, place: int, batch: dict[str, Array]) -> Array:
    """Pages with a batch's new places, which dim `place` of both counts, each in its row's own page."""
    size = pool.shape[place]
    number, within = jnp.divmod(batch["positions"], size)
    page = jnp.take_along_axis(batch["pages"], jnp.minimum(number, batch["pages"].shape[1] - 1), axis=1)
    page = jnp.where(batch["segment_ids"] > 0, page, pool.shape[0])  # padding's is nobody's
    between = (slice(None),) * (place - 1)
    # [B, T, ...]: two indices of one shape, with slices between or not, come first in what they choose.
    return pool.at[(page, *between, within)].set(jnp.moveaxis(part, place, 1), mode="drop")


def mixer(name: str) -> type[Mixer]:
    """The class of a mixer. ValueError, with the nearest one, for a name that no file has."""
    choice("mixer", name, MIXERS)
    # By the file's name: a list here would be one more place that a new mixer has to be written into.
    found = import_module(f"models.mixers.{name}").MIXER
    assert issubclass(found, Mixer)
    return found
