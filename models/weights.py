"""Weights that are more than an array: `QTensor` of few levels, `LowRank` with factors beside it.

Both are pytree nodes that stand where an array would: a scan slices them, a checkpoint names their parts, and
a module reads them by `[...]` and `astype`. Of each there is also the tree of its parts' birth certificates,
so that shardings, optimizer states and checkpoints follow as for any parameter.

D model or inputs, C the two of a fused pair, F outputs, R rank, V vocabulary.
"""

import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Float, Int, Int8, Key

from common.checks import choice, require
from kernels.einsum import Einsum, letters_of, multiply
from kernels.names import PROJECTIONS
from models.grid import BITS, FLOAT8, blocks_along, grid_of, in_blocks, levels_of, pack
from models.param import ParamInfo

STORED = {8: "int8", 4: "uint8"}
TABLES = ("embedding", "head")
RANK = "Z"  # a letter that no projection uses


def static(**values: Any) -> Any:
    """A field of a node that belongs to its structure, not to its arrays."""
    return field(metadata={"static": True}, **values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A weight as integers on a grid: (levels - zero) * scale, a scale for each block of it.

    q: int8 (or float8_e4m3fn) of the weight's shape; in four bits uint8, two along the dim `packed` in a
    byte, the even one low, each plus 8. scale: float32, as many dims, each as long as there are blocks along
    it (1: one for all of it). zero: int8 like scale; None: level 0. packed counts from the end: leading dims
    come and go. grid: bits of the levels that are used, where they are fewer than those stored; None: all.
    """

    q: Any
    scale: Any
    zero: Any = None
    bits: int = static(default=8)
    packed: int = static(default=-1)
    grid: int | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, not of what holds it."""
        shape = list(self.q.shape)
        if self.bits == 4:
            shape[self.packed] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Dims of the weight."""
        return len(self.q.shape)

    @property
    def dtype(self) -> Any:
        """What it is computed in."""
        return self.scale.dtype

    def astype(self, dtype: Any) -> Array:
        """The weight as an array: made in float32, rounded once."""
        shape = self.shape
        blocks = [size // count for size, count in zip(shape, self.scale.shape, strict=True)]
        levels = in_blocks(self.levels().astype(jnp.float32), blocks)
        ones = [1] * self.ndim
        if self.zero is not None:
            levels = levels - in_blocks(self.zero.astype(jnp.float32), ones)
        return (levels * in_blocks(self.scale, ones)).reshape(shape).astype(dtype)

    def bits_a_weight(self, *, stored: bool = False) -> float:
        """What a weight takes with its share of scales and zeros: on its grid, or as it is stored."""
        used = self.bits if stored or self.grid is None else self.grid
        scales = math.prod(self.scale.shape) * jnp.dtype(self.scale.dtype).itemsize * 8
        zeros = 0 if self.zero is None else math.prod(self.zero.shape) * (8 if stored else used)
        return used + (scales + zeros) / math.prod(self.shape)

    def levels(self) -> Int8[Array, "..."]:
        """Of the weight's shape: int8, or what float8 holds."""
        if self.bits == 8:
            return self.q
        # Neighbours share a byte: however the dim is split over devices, each unpacks its own.
        place = self.q.ndim + self.packed + 1
        both = jnp.stack([self.q & 15, self.q >> 4], axis=place).astype(jnp.int8) - 8
        return both.reshape(self.shape)

    def multiply(self, product: Einsum, plain: Einsum, spec: str, x: Array) -> Array:
        """The product with an activation, of the weight dequantized where it is read.

        With one scale an output it is behind the product, whose factors are then the levels, exact in any
        dtype: of a text that is decoded, those are all that is read of the weight.
        """
        left, right, out = letters_of(spec)
        inner = {c for c in right if c in left and c not in out}
        whole = all(self.scale.shape[dim] == 1 for dim, c in enumerate(right) if c in inner)
        if self.zero is not None or not whole:
            return product(spec, x, self.astype(x.dtype))
        y = product(spec, x, self.levels().astype(x.dtype))
        made = [c for c in right if c not in inner]
        scale = self.scale.reshape([self.scale.shape[right.index(c)] for c in made])
        scale = jnp.transpose(scale, [made.index(c) for c in out if c in made])
        scale = jnp.expand_dims(scale, [dim for dim, c in enumerate(out) if c not in made])
        return (y.astype(jnp.float32) * scale).astype(y.dtype)

    def rows(self, ids: Int[Array, "..."], mode: str) -> Float[Array, "... D"]:
        """Rows of a table [V, D]: gathered as they are stored, dequantized behind that."""
        return jax.tree.map(lambda part: part.at[ids].get(mode=mode), self).astype(jnp.float32)

    def __getitem__(self, index: Any) -> "QTensor":
        """Itself for `...`, or an entry of the first dim."""
        if index is Ellipsis:
            return self
        refuse_index(self, index)
        if self.bits == 4 and -self.packed == self.ndim:
            raise TypeError(f"a QTensor {self.shape} in 4 bits has no entries along the dim that it packs")
        block = index * self.scale.shape[0] // self.shape[0]
        zero = None if self.zero is None else self.zero[block]
        return replace(self, q=self.q[index], scale=self.scale[block], zero=zero)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A weight w + scale * a b, of which only the thin factors learn (Hu et al. 2021, arXiv:2106.09685).

    w: an array or a QTensor (Dettmers et al. 2023, arXiv:2305.14314), to which no gradient goes. a: w's dims
    without its outputs, and R behind them; b: without its inputs, R in the first one's place. So [D, C, F]
    has [D, C, R] and [R, C, F], a pair of its own for each of C. reduction, output: dims of w, from the end.
    m: a magnitude for each output, w's dims without its inputs: that sum gives then the direction alone, of
    norm 1 over the inputs (DoRA: Liu et al. 2024, arXiv:2402.09353); None: its norm stays.
    """

    w: Any
    a: Any
    b: Any
    m: Any = None
    scale: float = static(default=1.0)
    reduction: tuple[int, ...] = static(default=())
    output: tuple[int, ...] = static(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.w.shape)

    @property
    def ndim(self) -> int:
        """Dims of the weight."""
        return len(self.w.shape)

    @property
    def dtype(self) -> Any:
        """Of the factors."""
        return self.a.dtype

    @property
    def batch(self) -> tuple[int, ...]:
        """Dims that are neither reduced nor made: stacked layers, experts, a fused pair."""
        return tuple(dim for dim in range(-self.ndim, 0) if dim not in self.reduction + self.output)

    def astype(self, dtype: Any) -> Array:
        """The weight as one array, merged in float32 and rounded once; gradients go to the factors alone."""
        whole = self.sum()
        if self.m is not None:
            whole = whole * jnp.expand_dims(self.stretch(whole), self.reduction)
        return whole.astype(dtype)

    def sum(self) -> Array:
        """The base and the product of the factors, in float32."""
        letters = "abcdefgh"[: self.ndim]
        a, b = self.factor_letters(letters)
        product = jnp.einsum(f"{a},{b}->{letters}", self.a, self.b, precision="highest")
        return jax.lax.stop_gradient(self.w).astype(jnp.float32) + self.scale * product

    def stretch(self, whole: Array) -> Array:
        """What each output of `sum` is multiplied by to have its magnitude, of m's shape."""
        # No gradient through the norm, as published (section 4.3): half the memory, and nothing lost.
        return self.m / jax.lax.stop_gradient(norms(whole, self.reduction))

    def multiply(self, product: Einsum, plain: Einsum, spec: str, x: Array) -> Array:
        """As x w + scale * (x a) b: two thin products beside the one by w, which stays as it is."""
        left, right, out = letters_of(spec)
        inner = [right[dim] for dim in self.reduction]
        if {*inner} != {c for c in right if c in left and c not in out}:
            return product(spec, x, self.astype(x.dtype))  # not the product that the factors are made for
        a, b = self.factor_letters(right)
        low = "".join(c for c in left + a if c not in inner)
        base = multiply(jax.lax.stop_gradient(self.w), product, plain, spec, x)
        # `plain`, whatever multiplies w: the factors are what learns, and eight bits would save nothing.
        thin = plain(f"{left},{a}->{low}", x, self.a)
        # A pair's dim is in the activation then and in b, which no plain projection has.
        second = jnp.einsum if self.batch else plain
        y = base + self.scale * second(f"{low},{b}->{out}", thin, self.b.astype(x.dtype))
        if self.m is None:
            return y
        made = [c for c in right if c not in inner]
        stretch = jnp.transpose(self.stretch(self.sum()), [made.index(c) for c in out if c in made])
        stretch = jnp.expand_dims(stretch, [dim for dim, c in enumerate(out) if c not in made])
        # In float32: near 1, bfloat16 has steps of half a percent.
        return (y.astype(jnp.float32) * stretch).astype(y.dtype)

    def factor_letters(self, letters: str) -> tuple[str, str]:
        """The letters of a's dims and of b's, of those of w's dims."""
        named = dict(zip(range(-self.ndim, 0), letters, strict=True))
        a = [c for dim, c in named.items() if dim not in self.output]
        named[self.reduction[0]] = RANK
        return "".join([*a, RANK]), "".join(c for d, c in named.items() if d not in self.reduction[1:])

    def __getitem__(self, index: Any) -> Any:
        """Itself for `...`, or an entry of the first dim."""
        if index is Ellipsis:
            return self
        refuse_index(self, index)
        first = -self.ndim
        if self.reduction == (first,):
            raise TypeError(f"a LowRank {self.shape} has no entries along the one dim that it reduces")
        if first in self.reduction and self.m is not None:
            return self.astype(jnp.float32)[index]  # an array: its norms are over all entries
        a = self.a if first in self.output else self.a[index]
        b = self.b if first in self.reduction else self.b[index]
        dims = ((d for d in group if d != first) for group in (self.reduction, self.output))
        reduction, output = map(tuple, dims)
        m = None if self.m is None else self.m[index]
        return replace(self, w=self.w[index], a=a, b=b, m=m, reduction=reduction, output=output)


def norms(w: Array, reduction: tuple[int, ...]) -> Array:
    """The Euclidean norm of each output of a weight, over the dims that its product sums."""
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=reduction))


def refuse_index(weight: Any, index: Any) -> None:
    """Raise TypeError for anything but a whole number: no other part of a grid or of factors is one."""
    if not isinstance(index, int) and getattr(index, "shape", None) != ():
        name = type(weight).__name__
        raise TypeError(
            f"a {name} {weight.shape} is read by [...] or [number], not [{index}]; merge it first"
        )


def dequantize(weight: QTensor) -> Array:
    """The numbers that the levels are, in float32."""
    return weight.astype(jnp.float32)


def merge(weight: Any) -> Array:
    """The array that a weight stands for, in float32 where it is more than one; any array is itself."""
    return weight.astype(jnp.float32) if isinstance(weight, QTensor | LowRank) else weight


def merged(tree: Any) -> Any:
    """A parameter tree whose weights are arrays."""
    return jax.tree.map(merge, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor | LowRank))


def rows(table: Any, ids: Int[Array, "..."], mode: str) -> Float[Array, "... D"]:
    """Rows of a table [V, D] that is an array or a QTensor."""
    return table.rows(ids, mode) if isinstance(table, QTensor) else table.at[ids].get(mode=mode)


# -- eight and four bits -----------------------------------------------------------------------------------


def quantizable(info: ParamInfo) -> bool:
    """Whether whoever reads the parameter takes a QTensor: projections, experts and tables."""
    return info.role in TABLES or (info.role == "matrix" and kind_of(info) is not None)


def kind_of(info: ParamInfo) -> str | None:
    """What adapters name a matrix by: its projection, or "experts" for those that experts hold."""
    return "experts" if info.projection is None and "experts" in info.axes else info.projection


def reduced(info: ParamInfo) -> tuple[int, ...]:
    """The dims along which a weight's numbers share a scale: those that its product sums over."""
    return (len(info.shape) - 1,) if info.role in TABLES else info.reduction


def block_sizes(info: ParamInfo, group: int | None) -> tuple[int, ...]:
    """How many numbers along each dim share a scale: `group` in a row along the reduced dims, None: all.

    Raises ValueError where the group is no whole part of them.
    """
    return blocks_along(info.shape, reduced(info), group)


def quantized_info(
    info: ParamInfo,
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    floating: bool = False,
) -> QTensor:
    """The birth certificates of what `quantize` makes, none of which trains.

    Raises ValueError for bits that are none of BITS, a group that does not divide, and a parameter whose
    readers take an array alone (norms, biases, a router, balance).
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not one of {', '.join(map(str, BITS))}")
    if floating and (bits != 8 or not symmetric):
        raise ValueError(f"float8 is a grid of its own; use bits=8 symmetric=true, not bits={bits}")
    used, bits = bits, 8 if bits > 4 else 4
    if not quantizable(info):
        raise ValueError(
            f"a {info.role} {info.shape} without a projection cannot be quantized; "
            "take projections, experts and tables, and leave the rest as arrays"
        )
    dims, blocks = reduced(info), block_sizes(info, group)
    shape, packed = list(info.shape), dims[-1] - len(info.shape)
    if bits == 4:
        require(shape[packed] % 2 == 0, f"bits={used}: a reduced dim", shape[packed], "even; use bits=8")
        shape[packed] //= 2
    counts = tuple(size // block for size, block in zip(info.shape, blocks, strict=True))
    # One scale for a whole dim is everybody's; several lie with the numbers that they are of.
    axes = tuple(None if dim in dims and counts[dim] == 1 else axis for dim, axis in enumerate(info.axes))
    part = replace(info, decay=False, trained=False)
    scale = replace(part, shape=counts, axes=axes)
    return QTensor(
        q=replace(part, shape=tuple(shape), dtype=FLOAT8 if floating else jnp.dtype(STORED[bits])),
        scale=scale,
        zero=None if symmetric else replace(scale, dtype=jnp.dtype("int8")),
        bits=bits,
        packed=packed,
        grid=None if used == bits else used,
    )


def quantize(
    info: ParamInfo,
    w: Array,
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    floating: bool = False,
    half: bool = False,
) -> QTensor:
    """Round to the nearest level (RTN): at most half a scale from w, wherever it lies on its block's grid.

    symmetric: levels to 127 (of 8 bits; to 7 of 4, to 1 of 2) either side of 0, the largest magnitude of a
    block on the last. Else from the least to the largest number of a block, 0 among them, over all 256 (or
    16, or 4) levels. floating: the numbers of float8_e4m3fn, the largest magnitude on 448.
    Raises ValueError as `quantized_info`, and for what is quantized already.
    """
    like = quantized_info(info, bits, group, symmetric=symmetric, floating=floating)
    if isinstance(w, QTensor | LowRank):
        raise ValueError(f"a {type(w).__name__} {w.shape} is no array to be quantized; merge it first")
    assert w.shape == info.shape, (w.shape, info.shape)
    blocks = in_blocks(w.astype(jnp.float32), block_sizes(info, group))
    within = tuple(range(1, blocks.ndim, 2))
    scale, zero = grid_of(blocks, within, None if floating else bits, symmetric=symmetric, half=half)
    if floating:
        levels = (blocks / scale).astype(FLOAT8).reshape(w.shape)
    else:
        levels = levels_of(blocks, scale, zero, bits).astype(jnp.int8).reshape(w.shape)
    return of_levels(like, levels, scale, zero)


def rounded_product(
    spec: str, w: Float[Array, "..."], *, bits: int, group: int | None
) -> Float[Array, "..."]:
    """A projection's weight as `quantize` would keep it, to the bit; its gradient is the weight's own.

    spec: the product's, which says along which dims it sums. The gradient goes through the rounding as if it
    were none (Bengio et al. 2013, arXiv:1308.3432): quantization-aware training on the grid of the export.
    """
    left, right, out = letters_of(spec)
    dims = [dim for dim, c in enumerate(right) if c in left and c not in out]
    blocks = in_blocks(jax.lax.stop_gradient(w).astype(jnp.float32), blocks_along(w.shape, dims, group))
    scale, zero = grid_of(blocks, tuple(range(1, blocks.ndim, 2)), bits)
    near = (levels_of(blocks, scale, zero, bits) * scale).reshape(w.shape)
    # A difference of the weight with itself: 0, and not the rounding's own error again.
    return near + (w - jax.lax.stop_gradient(w))


def of_levels(like: QTensor, levels: Array, scale: Array, zero: Array | None) -> QTensor:
    """Levels of the weight's shape, int8 or float8, as the QTensor that the certificates `like` describe."""
    shape = like.scale.shape
    return replace(
        like,
        q=levels if like.bits == 8 else pack(levels, like.packed),
        scale=scale.reshape(shape),
        zero=None if like.zero is None or zero is None else zero.astype(jnp.int8).reshape(shape),
    )


# -- low rank ----------------------------------------------------------------------------------------------


def low_rank_info(
    info: ParamInfo, rank: int, scale: float = 1.0, base: Any = None, *, dora: bool = False
) -> LowRank:
    """The birth certificates of a weight that learns by its factors alone, and with `dora` its magnitudes.

    base: of the weight itself, if it is not `info`, such as `quantized_info`'s. Raises ValueError for a rank
    that is not below the matrix's own, and for what is no projection's matrix and no expert's.
    """
    if info.role != "matrix" or not quantizable(info):
        raise ValueError(
            f"a {info.role} {info.shape} without a projection has no factors; take projections and experts"
        )
    fan_in, fan_out = (math.prod(info.shape[d] for d in dims) for dims in (info.reduction, info.output))
    most = min(fan_in, fan_out)
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} of a matrix [{fan_in}, {fan_out}] must be from 1 to {most}")
    count, first = len(info.shape), info.reduction[0]
    inputs = [dim for dim in range(count) if dim not in info.output]
    outputs = [dim for dim in range(count) if dim not in info.reduction[1:]]
    part = partial(replace, info, trained=True, dtype=jnp.dtype("float32"), projection=None)
    a = part(
        shape=(*(info.shape[dim] for dim in inputs), rank),
        axes=(*(info.axes[dim] for dim in inputs), None),
        reduction=tuple(map(inputs.index, info.reduction)),
        output=(len(inputs),),
        # Of an activation of ones' size one of ones' size; b's zeros make the weight begin as it was.
        init=normal(fan_in**-0.5),
    )
    b = part(
        shape=tuple(rank if dim == first else info.shape[dim] for dim in outputs),
        axes=tuple(None if dim == first else info.axes[dim] for dim in outputs),
        reduction=(outputs.index(first),),
        output=tuple(map(outputs.index, info.output)),
        init=zeros,
    )
    made = [dim for dim in range(count) if dim not in info.reduction]
    m = part(
        shape=tuple(info.shape[dim] for dim in made),
        axes=tuple(info.axes[dim] for dim in made),
        reduction=(),
        output=(),
        role="vector",
        decay=False,
    )
    base = replace(info, trained=False) if base is None else base
    reduction, output = (tuple(dim - count for dim in dims) for dims in (info.reduction, info.output))
    return LowRank(base, a, b, m if dora else None, scale, reduction, output)


def low_rank(
    info: ParamInfo, w: Any, rank: int, key: Key[Array, ""], scale: float = 1.0, *, dora: bool = False
) -> LowRank:
    """A weight with a drawn at random and b zero, so that it begins as it is; w: an array or a QTensor.

    Raises ValueError as `low_rank_info`, and for a weight that has factors already.
    """
    if isinstance(w, LowRank):
        raise ValueError(f"a LowRank {w.shape} has factors already; merge it first")
    like = low_rank_info(info, rank, scale, dora=dora)
    # All layers in one draw: by their place in row-major order, which stages of a pipeline do not change.
    return replace(
        like,
        w=w,
        a=like.a.init(key, like.a.shape, like.a.dtype),
        b=like.b.init(key, like.b.shape, like.b.dtype),
        m=norms(w.astype(jnp.float32), like.reduction) if dora else None,
    )


# -- a whole model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapters:
    """Low-rank factors for some projections of a model, all else of which is frozen.

    names: of the projections (`kernels.names`), and "experts". bits, group: of every weight that can be
    quantized, below the factors and elsewhere (QLoRA); None: weights stay as they are. dora: whether
    magnitudes learn beside the factors.
    """

    rank: int
    scale: float = 1.0
    names: Collection[str] = ("q", "kv", "o", "up", "down")
    bits: int | None = None
    group: int | None = None
    dora: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            choice("adapter projection", name, (*PROJECTIONS, "experts"))

    def adapts(self, info: ParamInfo) -> bool:
        """Whether a parameter gets factors."""
        return info.role == "matrix" and kind_of(info) in self.names

    def base(self, info: ParamInfo, w: Array) -> Any:
        """A weight as it lies frozen."""
        if self.bits is None or not quantizable(info):
            return w
        return quantize(info, w, self.bits, self.group)

    def info(self, infos: Any) -> Any:
        """The certificates of the model's weights as they will be."""

        def of(info: ParamInfo) -> Any:
            base: Any = replace(info, trained=False)
            if self.bits is not None and quantizable(info):
                base = quantized_info(info, self.bits, self.group)
            if not self.adapts(info):
                return base
            return low_rank_info(info, self.rank, self.scale, base, dora=self.dora)

        return jax.tree.map(of, infos)

    def make(self, infos: Any, params: Any, key: Key[Array, ""]) -> Any:
        """The weights, from those of the plain model; to be traced. A factor's key depends on its name."""

        def of(path: Any, info: ParamInfo, w: Array) -> Any:
            base = self.base(info, w)
            if not self.adapts(info):
                return base
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return low_rank(info, base, self.rank, own, self.scale, dora=self.dora)

        return jax.tree_util.tree_map_with_path(of, infos, params)
