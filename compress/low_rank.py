"""Matrices of a lower rank: products of two thin factors, nearest to the matrix or to its outputs.

I inputs, O outputs, E experts, R rank.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import choice, require
from compress.calibrate import Layer, Moments, Tree
from compress.solve import DOT, factors, output_error
from compress.steps import ENOUGH, KEEP, Material, as_matrix, change_layers, change_matrices, changes
from models.param import ParamInfo
from models.transformer import Model

METHODS = ("svd", "whitened")


@dataclass(frozen=True)
class Factorize:
    """`factorize: svd | whitened`: the matrices of projections and experts as products of two thin ones.

    share: of a matrix's numbers that its factors have, or rank: the same of all. A fused pair is one matrix.
    The model keeps the products, since no layout that others open has factors.
    """

    method: str
    share: float | None = None
    rank: int | None = None
    keep: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        choice("factorize", self.method, METHODS)
        if (self.share is None) == (self.rank is None):
            raise ValueError(f"factorize={self.method} needs share or rank, and one of them, as share: 0.5")
        require(self.share is None or 0 < self.share <= 1, "share", self.share, "above 0 and at most 1")
        whole = self.rank is None or (isinstance(self.rank, int) and self.rank >= 1)
        require(whole, "rank", self.rank, "a whole number, 1 or more")
        for name in self.keep:
            choice("keep", name, KEEP)

    def apply(self, model: Model, params: Tree, material: Material) -> tuple[Model, Tree]:
        """The same model with matrices of that rank."""
        batches = () if self.method == "svd" else material.batches
        return model, change_layers(model, params, material, self, batches)

    def layer(self, model: Model, layer: Layer) -> Tree:
        """The layer's weights, those of a lower rank merged."""

        def change(info: ParamInfo, w: Array, moments: Moments | None) -> Array:
            return of_rank(as_matrix(info, w), moments, self.rank_of(info)).reshape(info.shape)

        return change_matrices(layer, self.keep, change)

    def rank_of(self, info: ParamInfo) -> int:
        """Of a parameter's matrices. ValueError for a rank that they cannot have."""
        _, inputs, outputs = _sizes(info)
        if self.rank is None:
            assert self.share is not None
            return max(1, int(self.share * inputs * outputs / (inputs + outputs)))
        if self.rank > (most := min(inputs, outputs)):
            raise ValueError(
                f"rank={self.rank} of a matrix [{inputs}, {outputs}] must be from 1 to {most}; "
                "use share, or keep its projection"
            )
        return self.rank

    def spared(self, model: Model) -> int:
        """Numbers that the model would not need if its matrices were kept as factors."""
        total = 0
        for info in jax.tree.leaves(model.info["segments"]):
            if changes(info, self.keep):
                count, inputs, outputs = _sizes(info)
                total += count * max(0, inputs * outputs - self.rank_of(info) * (inputs + outputs))
        return total


def _sizes(info: ParamInfo) -> tuple[int, int, int]:
    """How many matrices a parameter is, their inputs, their outputs."""
    inputs = math.prod(info.shape[dim] for dim in info.reduction)
    count = math.prod(info.shape[: info.reduction[0]])
    return count, inputs, math.prod(info.shape) // (count * inputs)


@partial(jax.jit, static_argnames="rank")
def of_rank(w: Float[Array, "*E I O"], moments: Moments | None, rank: int) -> Float[Array, "*E I O"]:
    """The nearest matrices of that rank: by their outputs where enough tokens were seen, else by themselves.

    H is damped before it has a root, and of few tokens that can cost more than it gives: of both products the
    one is taken whose outputs are nearer.
    """

    def one(w: Array, moments: Moments | None) -> Array:
        plain = DOT(*factors(w, None, rank))
        if moments is None:
            return plain
        h = moments.second
        near = DOT(*factors(w, h, rank))
        better = jnp.sum(output_error(w, near, h)) <= jnp.sum(output_error(w, plain, h))
        return jnp.where(better & (moments.count >= ENOUGH), near, plain)

    return one(w, moments) if w.ndim == 2 else jax.lax.map(lambda args: one(*args), (w, moments))
