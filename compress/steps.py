"""What a recipe's steps do to a model: numbers on a grid, zeros. Each takes a model and gives one.

I inputs, O outputs, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from common.checks import choice, require
from compress.calibrate import Batch, Layer, Moments, Tree, key_of, walk
from compress.scale import rescaled
from compress.solve import Grid, Sparsity, fit, gptq, levels_on, magnitude, rounded, solve, wanda
from kernels.names import PROJECTIONS
from models.ops import Ops
from models.param import ParamInfo
from models.transformer import Model
from models.weights import TABLES, QTensor, kind_of, of_levels, quantizable, quantize, quantized_info

ENOUGH = 256  # tokens that an expert must have seen to be solved for; with fewer it is rounded
ROUNDING = ("rtn", "gptq", "awq", "smooth")
PRUNING = ("magnitude", "wanda", "sparsegpt")
SCALES = ("float32", "float16")
KEEP = (*PROJECTIONS, "experts")


@dataclass(frozen=True)
class Material:
    """What steps work with: operations for a model's config, the calibration text, and whom to tell."""

    ops: Callable[[Any], Ops]
    batches: Sequence[Batch]
    announce: Callable[[str], None] = lambda line: None

    @property
    def tokens(self) -> int:
        """Of the calibration text, without padding."""
        return sum(int((batch["segment_ids"] > 0).sum()) for batch in self.batches)


class Step(Protocol):
    """One step of a recipe."""

    def apply(self, model: Model, params: Tree, material: Material) -> tuple[Model, Tree]:
        """The model behind it."""


@dataclass(frozen=True)
class Quantize:
    """`quantize: rtn | gptq | awq | smooth`: the weights of projections and experts on a grid.

    tables: bits of token tables and heads, which are rounded by rows; null: they stay as they are. keep:
    projections (or "experts") that stay. ordered: GPTQ takes the inputs that count most first.
    scales: float16 for those that GGUF's blocks can hold, float32 for any.
    """

    method: str
    bits: int = 4
    group: int | None = None
    symmetric: bool = True
    floating: bool = False
    clip: bool = False
    ordered: bool = True
    tables: int | None = None
    keep: list[str] = field(default_factory=list)
    scales: str = "float32"

    def __post_init__(self) -> None:
        choice("quantize", self.method, ROUNDING)
        choice("scales", self.scales, SCALES)
        for name in self.keep:
            choice("keep", name, KEEP)
        assert self.grid  # or it would have been refused

    @property
    def grid(self) -> Grid:
        """Of every matrix."""
        half = self.scales == "float16"
        return Grid(self.bits, self.group, self.symmetric, self.floating, self.clip, half)

    def apply(self, model: Model, params: Tree, material: Material) -> tuple[Model, Tree]:
        """Tables first, so that what reads them is calibrated behind them."""

        def table(info: ParamInfo, w: Any) -> Any:
            if info.role not in TABLES or not quantizable(info):
                return w
            assert self.tables is not None
            return jax.jit(partial(quantize, info, bits=self.tables, half=self.grid.half))(w)

        if self.tables is not None:
            there = [name for name in ("embed", "head") if name in params]
            rest: Tree = {name: jax.tree.map(table, model.info[name], params[name]) for name in there}
            params = {**params, **rest}
        batches = () if self.method == "rtn" else material.batches
        return model, change_layers(model, params, material, self, batches)

    def layer(self, model: Model, layer: Layer) -> Tree:
        """The layer's weights on their grid."""
        if self.method in ("awq", "smooth"):
            layer = rescaled(layer, model.config, self.method, self.grid)

        def change(info: ParamInfo, w: Array, moments: Moments | None) -> QTensor:
            like = quantized_info(
                info, self.bits, self.group, symmetric=self.symmetric, floating=self.floating
            )
            solved = moments if self.method == "gptq" else None
            levels, scale, zero = onto_grid(
                as_matrix(info, w), moments, self.grid, solved is not None, self.ordered
            )
            return of_levels(like, levels.reshape(info.shape), scale, zero)

        return change_matrices(layer, self.keep, change)


@dataclass(frozen=True)
class Prune:
    """`prune: magnitude | wanda | sparsegpt`: zeros in the weights of projections and experts.

    sparsity: the share of a matrix; pattern: "N:M" of every M inputs instead.
    """

    method: str
    sparsity: float = 0.5
    pattern: str | None = None
    keep: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        choice("prune", self.method, PRUNING)
        for name in self.keep:
            choice("keep", name, KEEP)
        assert self.wanted

    @property
    def wanted(self) -> Sparsity:
        """How many weights of each matrix go."""
        if self.pattern is None:
            return Sparsity(self.sparsity)
        kept, _, of = self.pattern.partition(":")
        require(kept.isdecimal() and of.isdecimal(), "pattern", self.pattern, "N:M, as 2:4 is")
        return Sparsity(keep=int(kept), of=int(of))

    def apply(self, model: Model, params: Tree, material: Material) -> tuple[Model, Tree]:
        """The same model with zeros."""
        batches = () if self.method == "magnitude" else material.batches
        return model, change_layers(model, params, material, self, batches)

    def layer(self, model: Model, layer: Layer) -> Tree:
        """The layer's weights with zeros."""

        def change(info: ParamInfo, w: Array, moments: Moments | None) -> Array:
            return pruned(as_matrix(info, w), moments, self.method, self.wanted).reshape(info.shape)

        return change_matrices(layer, self.keep, change)


def packed_by_rounding(model: Model, params: Tree, bits: int, group: int | None) -> Tree:
    """The parameters with projections and experts on a grid, whatever goes into them."""
    step = Quantize("rtn", bits, group)
    return step.apply(model, params, Material(lambda config: Ops(), ()))[1]


def change_layers(
    model: Model, params: Tree, material: Material, step: Any, batches: Sequence[Batch]
) -> Tree:
    """The parameters with each layer's as the step makes them."""
    total = sum(segment.count * len(segment.period) for segment in model.segments)

    def announce(number: int) -> None:
        material.announce(f"{step.method}: layer {number} of {total}")

    return walk(model, params, batches, material.ops(model.config), partial(step.layer, model), announce)


def change_matrices(
    layer: Layer, keep: Sequence[str], change: Callable[[ParamInfo, Array, Moments | None], Any]
) -> Tree:
    """The layer's weights with the matrices of projections (but those of `keep`) and experts changed."""

    def of(path: Any, info: ParamInfo, w: Any) -> Any:
        if not changes(info, keep):
            return w
        if isinstance(w, QTensor):
            raise ValueError("a step changes weights that an earlier one has quantized; quantize last")
        return change(info, w, layer.recorded.get(key_of(path, info) or ""))

    return jax.tree_util.tree_map_with_path(of, layer.infos, layer.weights)


def changes(info: ParamInfo, keep: Sequence[str]) -> bool:
    """Whether a parameter is one of those matrices."""
    return info.role == "matrix" and quantizable(info) and kind_of(info) not in keep


def as_matrix(info: ParamInfo, w: Array) -> Array:
    """[I, O], of experts [E, I, O]: a product contracts a weight's first dims, and makes the others."""
    inputs = math.prod(info.shape[dim] for dim in info.reduction)
    return w.reshape(*info.shape[: info.reduction[0]], inputs, -1)


@partial(jax.jit, static_argnames=("grid", "solved", "ordered"))
def onto_grid(
    w: Array, moments: Moments | None, grid: Grid, solved: bool, ordered: bool
) -> tuple[Array, Array, Array | None]:
    """Levels [*E, I, O], scale and zero by group, of the nearest numbers or by GPTQ."""

    def one(w: Array, moments: Moments | None) -> tuple[Array, Array, Array | None]:
        weight = None if moments is None else jnp.diagonal(moments.second)
        fitted = fit(w, grid, weight)
        values = rounded(w, fitted)
        if solved:
            assert moments is not None
            better = gptq(w, moments.second, fitted, ordered=ordered)
            values = jnp.where(moments.count >= ENOUGH, better, values)
        return levels_on(values, fitted), fitted.scale, fitted.zero

    return one(w, moments) if w.ndim == 2 else jax.lax.map(lambda args: one(*args), (w, moments))


@partial(jax.jit, static_argnames=("method", "sparsity"))
def pruned(w: Array, moments: Moments | None, method: str, sparsity: Sparsity) -> Array:
    """Weights [*E, I, O] with zeros; an expert that has seen too little loses its smallest."""

    def one(w: Array, moments: Moments | None) -> Array:
        small = magnitude(w, sparsity)
        if moments is None:
            return small
        by = wanda if method == "wanda" else lambda w, h, s: solve(w, h, None, s)
        return jnp.where(moments.count >= ENOUGH, by(w, moments.second, sparsity), small)

    return one(w, moments) if w.ndim == 2 else jax.lax.map(lambda args: one(*args), (w, moments))
