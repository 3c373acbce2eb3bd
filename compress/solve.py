"""A matrix with fewer levels or fewer weights, so that its output changes as little as the inputs allow.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) and SparseGPT (2023, arXiv:2301.00774) are one loop: input by
input a row of weights is rounded, zeroed, or both, and what that costs is made good by the rows behind it, as
far as their inputs go along: by the Cholesky factor of the inverse of H = XᵀX. Each output is a problem of
its own.

I inputs, O outputs, G groups of inputs with a scale, M inputs of which a pattern keeps N.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from common.checks import require, within
from models.grid import BITS, FLOAT8, grid_of, levels_of

BLOCK = 128  # inputs whose errors are handed on together
DAMPING = 0.01  # of the mean of H's diagonal, added to it
SHRUNK = tuple(1.0 - 0.05 * i for i in range(11))  # of a block's range, tried for the least error
DOT = partial(jnp.matmul, precision="highest")  # elsewhere than on a CPU float32 would be rounded


@dataclass(frozen=True)
class Grid:
    """Which levels a weight may have: bits of each, inputs that share a scale (None: all), 0 in the middle.

    floating: float8_e4m3fn. clip: look for the scale with the least error, by how large each input is. half:
    scales are numbers of float16.
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = True
    floating: bool = False
    clip: bool = False
    half: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} is not one of {', '.join(map(str, BITS))}")
        within("group", self.group, 2)


@dataclass(frozen=True)
class Sparsity:
    """How much of a matrix becomes zero: a share of it, or all but `keep` of every `of` inputs in a row."""

    share: float = 0.5
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "sparsity", self.share, "between 0 and 1, as 0.5 is")
        require(0 <= self.keep <= self.of, "pattern", f"{self.keep}:{self.of}", "N of M, as 2:4 is")

    @property
    def unit(self) -> int:
        """Inputs among which weights are chosen; 1: no pattern says."""
        return self.of or 1


@dataclass(frozen=True)
class Fitted:
    """A grid's scale and zero for each weight of a matrix [I, O], by group [G, 1, O]."""

    grid: Grid
    scale: Float[Array, "G 1 O"]
    zero: Float[Array, "G 1 O"] | None

    def rows(self, inputs: int) -> tuple[Float[Array, "I O"], Float[Array, "I O"] | None]:
        """Scale and zero of every weight."""

        def wide(x: Array) -> Array:
            return jnp.repeat(x[:, 0], inputs // x.shape[0], axis=0)

        return wide(self.scale), None if self.zero is None else wide(self.zero)


jax.tree_util.register_dataclass(Fitted, data_fields=["scale", "zero"], meta_fields=["grid"])


def nearest(x: Array, scale: Array, zero: Array | None, grid: Grid) -> Array:
    """The number of the grid that is nearest to each of x, in float32."""
    if grid.floating:
        return (x / scale).astype(FLOAT8).astype(jnp.float32) * scale
    levels = levels_of(x, scale, zero, grid.bits)
    return (levels if zero is None else levels - zero) * scale


def fit(w: Float[Array, "I O"], grid: Grid, weight: Float[Array, " I"] | None = None) -> Fitted:
    """The grid of each group; weight: of the error that each input makes, where the range is looked for."""
    inputs, outputs = w.shape
    size = grid.group or inputs
    if inputs % size:
        raise ValueError(f"group={size} does not divide {inputs} inputs; use one of {divisors(inputs)}")
    blocks = w.astype(jnp.float32).reshape(-1, size, outputs)
    bits = None if grid.floating else grid.bits
    of = partial(grid_of, within=(1,), bits=bits, symmetric=grid.symmetric, half=grid.half)
    if not grid.clip:
        return Fitted(grid, *of(blocks))
    of_input = jnp.ones(inputs) if weight is None else weight
    of_input = of_input.reshape(-1, size, 1)
    best: tuple[Array, Array, Array | None] | None = None
    for share in SHRUNK:  # the whole range first: of equals the widest stays
        scale, zero = of(share * blocks)
        error = jnp.square(nearest(blocks, scale, zero, grid) - blocks) * of_input
        total = jnp.sum(error, axis=1, keepdims=True)
        if best is None:
            best = total, scale, zero
            continue
        less = total < best[0]
        zeros = None if zero is None or best[2] is None else jnp.where(less, zero, best[2])
        best = jnp.where(less, total, best[0]), jnp.where(less, scale, best[1]), zeros
    assert best is not None
    return Fitted(grid, *best[1:])


def divisors(size: int) -> str:
    """The groups that a dim may be cut into, for a message."""
    return ", ".join(str(n) for n in range(2, size + 1) if size % n == 0)


def rounded(w: Float[Array, "I O"], fitted: Fitted) -> Float[Array, "I O"]:
    """Round to nearest (RTN): whatever the inputs are."""
    return nearest(w.astype(jnp.float32), *fitted.rows(w.shape[0]), fitted.grid)


def levels_on(values: Float[Array, "I O"], fitted: Fitted) -> Array:
    """The levels, int8 or float8, of numbers that are on the grid."""
    scale, zero = fitted.rows(values.shape[0])
    if fitted.grid.floating:
        return (values / scale).astype(FLOAT8)
    return levels_of(values, scale, zero, fitted.grid.bits).astype(jnp.int8)


def gptq(
    w: Float[Array, "I O"],
    h: Float[Array, "I I"],
    fitted: Fitted,
    *,
    ordered: bool = True,
) -> Float[Array, "I O"]:
    """Rounded by GPTQ, each output by RTN where that is the nearer one; what is zero already stays so.

    ordered: the inputs that count most first.
    """
    solved = solve(w, h, fitted, keep=w != 0, ordered=ordered)
    # It is greedy: with few inputs that go along, a late row may have to take more than it saved. An output
    # knows nothing of the others, so that each may be had by the better way.
    plain = rounded(w, fitted)
    worse = output_error(w, solved, h) > output_error(w, plain, h)
    return jnp.where(worse, plain, solved)


@partial(jax.jit, static_argnames=("sparsity", "ordered", "block", "damping"))
def solve(
    w: Float[Array, "I O"],
    h: Float[Array, "I I"],
    fitted: Fitted | None = None,
    sparsity: Sparsity | None = None,
    *,
    keep: Bool[Array, "I O"] | None = None,
    ordered: bool = False,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> Float[Array, "I O"]:
    """The matrix with every row on its grid (where there is one) and zeros where sparsity wants them.

    h: the sum of xᵀx. keep: weights that may be other than zero, where no sparsity says. Given back are
    values, not levels: those of a grid are found again by rounding. Scales are of the matrix as it was, so
    that rows may be taken in any order.
    """
    inputs = w.shape[0]
    w, diagonal = w.astype(jnp.float32), jnp.diagonal(h)
    # An input that was never there cannot be made good by any other, and makes no error itself.
    h = h + jnp.diag(jnp.where(diagonal == 0, 1.0, damping * jnp.mean(diagonal)))
    grids = None if fitted is None else fitted.rows(inputs)
    order = jnp.argsort(-diagonal, stable=True) if ordered and not (sparsity and sparsity.of) else None
    if order is not None:
        w, h, keep = w[order], h[order][:, order], None if keep is None else keep[order]
        grids = jax.tree.map(lambda x: x[order], grids)
    root = inverse_root(h)
    unit = sparsity.unit if sparsity else 1
    if inputs % unit:
        raise ValueError(f"pattern: {inputs} inputs are no whole number of {unit}; use another pattern")
    size = unit * max(n for n in range(1, block // unit + 1) if inputs // unit % n == 0)

    def rows_of(x: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def solve_block(number: Array, w: Array) -> Array:
        start = number * size
        part, above = rows_of(w, start), rows_of(root, start)
        inner = jax.lax.dynamic_slice_in_dim(above, start, size, axis=1)
        pivots = jnp.diagonal(inner)
        own = None if fitted is None else jax.tree.map(lambda x: rows_of(x, start), grids)
        stay = None if keep is None else rows_of(keep, start)
        if sparsity and not sparsity.of:
            stay = largest(jnp.square(part / pivots[:, None]), sparsity, whole=True)

        def one(i: Array, part: Array, errors: Array, keep: Array | None) -> tuple[Array, Array]:
            row = target = part[i]
            if keep is not None:
                target = jnp.where(keep, target, 0.0)
            if fitted is not None:
                assert own is not None
                scale, zero = (None if x is None else x[i] for x in own)
                assert scale is not None
                target = nearest(target, scale, zero, fitted.grid)
            error = (row - target) / pivots[i]
            part = part - inner[i][:, None] * error  # rows that were solved before: zeros there
            return part.at[i].set(target), errors.at[i].set(error)

        def some(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            part, errors = carry
            first = i * unit
            chosen = stay
            if sparsity and sparsity.of:
                these = jax.lax.dynamic_slice_in_dim(part, first, unit)
                by = jax.lax.dynamic_slice_in_dim(pivots, first, unit)
                chosen = largest(jnp.square(these / by[:, None]), sparsity)
            for k in range(unit):
                row = None if chosen is None else chosen[k if sparsity and sparsity.of else first]
                part, errors = one(first + k, part, errors, row)
            return part, errors

        part, errors = jax.lax.fori_loop(0, size // unit, some, (part, jnp.zeros_like(part)))
        later = jnp.arange(inputs) >= start + size
        w = w - DOT((above * later).T, errors)
        return jax.lax.dynamic_update_slice_in_dim(w, part, start, axis=0)

    w = jax.lax.fori_loop(0, inputs // size, solve_block, w)
    return w if order is None else jnp.zeros_like(w).at[order].set(w)


def inverse_root(h: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """The upper triangular U with UᵀU = H⁻¹: what elimination from the first input on divides by."""
    # Reversed, H's own factor is the inverse of it: no inverse of H is ever made.
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], jnp.eye(h.shape[0]), lower=False)


def output_error(w: Array, other: Array, h: Float[Array, "I I"]) -> Float[Array, " O"]:
    """The squared error of each output over what H was summed of: the diagonal of dᵀ H d."""
    d = w.astype(jnp.float32) - other
    return jnp.sum(d * DOT(h, d), axis=0)


# -- which weights go --------------------------------------------------------------------------------------


def largest(score: Float[Array, "I O"], sparsity: Sparsity, *, whole: bool = False) -> Bool[Array, "I O"]:
    """Which weights stay: those with the largest scores, of each output or (whole) of the matrix.

    A pattern keeps so many of every M neighbours among the inputs; of equals the later ones stay.
    """
    inputs, outputs = score.shape
    if sparsity.of:
        if inputs % sparsity.of:
            raise ValueError(
                f"pattern={sparsity.keep}:{sparsity.of} needs whole groups, and a matrix has {inputs} inputs"
                f"; use N of one of {divisors(inputs)}"
            )
        groups = score.reshape(-1, sparsity.of, outputs)
        return (_ranks(groups, 1) >= sparsity.of - sparsity.keep).reshape(score.shape)
    if whole:
        flat = score.reshape(-1, 1)
        return (_ranks(flat, 0) >= round(sparsity.share * flat.shape[0])).reshape(score.shape)
    return _ranks(score, 0) >= round(sparsity.share * inputs)


def _ranks(x: Array, axis: int) -> Array:
    """How many along the axis are smaller, or as large and before it."""
    return jnp.argsort(jnp.argsort(x, axis=axis, stable=True), axis=axis, stable=True)


@partial(jax.jit, static_argnames="sparsity")
def magnitude(w: Float[Array, "I O"], sparsity: Sparsity) -> Float[Array, "I O"]:
    """Without its smallest weights, of the whole matrix."""
    return jnp.where(largest(jnp.abs(w), sparsity, whole=True), w, 0.0)


@partial(jax.jit, static_argnames="sparsity")
def wanda(w: Float[Array, "I O"], h: Float[Array, "I I"], sparsity: Sparsity) -> Float[Array, "I O"]:
    """Without the weights of each output with the least |w| times its input's norm (arXiv:2306.11695)."""
    norms = jnp.sqrt(jnp.diagonal(h))
    return jnp.where(largest(jnp.abs(w) * norms[:, None], sparsity), w, 0.0)


@partial(jax.jit, static_argnames=("rank", "damping"))
def factors(
    w: Float[Array, "I O"], h: Float[Array, "I I"] | None, rank: int, *, damping: float = DAMPING
) -> tuple[Float[Array, "I R"], Float[Array, "R O"]]:
    """The product of that rank whose output is nearest to the matrix's: an SVD behind H's root.

    With H = L Lᵀ the error is |Lᵀ(w - a b)|², whose best b and a are those of Lᵀ w (arXiv:2403.07378).
    h: None for the product that is nearest to the matrix itself.
    """
    w, lower = w.astype(jnp.float32), None
    if h is not None:
        diagonal = jnp.diagonal(h)
        added = jnp.where(diagonal == 0, 1.0, damping * jnp.mean(diagonal))
        lower = jnp.linalg.cholesky(h + jnp.diag(added))
    left, sizes, right = jnp.linalg.svd(w if lower is None else DOT(lower.T, w), full_matrices=False)
    half = jnp.sqrt(sizes[:rank])
    a = left[:, :rank] * half
    if lower is not None:
        a = jax.scipy.linalg.solve_triangular(lower.T, a, lower=False)
    return a, half[:, None] * right[:rank]
