"""Muon's direction: momentum whose matrices are made nearly orthogonal, many at once.

Matrices of one shape, over all leaves and layers, are one stack [L, m, n] with m <= n. Where they lie in
parts on many devices, `MatrixSharing` gives each device some of them whole, so that the iteration is shared
out and needs no communication of its own. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
networks".
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonState

# f(x) = a x + b x^3 + c x^5, steepest at zero rather than exact at one: singular values come out within
# about 0.7 .. 1.2 after five rounds, which trains as well as ones (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
EPS = 1e-8  # added to the norm: a matrix of zeros stays one
Axes = tuple[str, ...]
OnStack = Callable[[Array], Array]


class Matrix(NamedTuple):
    """Which dims of a leaf are a matrix's input and output; dims in neither are batch: `[n, D, 2, F]` with
    `((1,), (3,))` is 2n matrices [D, F]. placed: of each dim, the mesh axes (or None) that split it.
    """

    reduction: tuple[int, ...]
    output: tuple[int, ...]
    placed: tuple[Any, ...] | None = None

    def batch(self, ndim: int) -> tuple[int, ...]:
        """The dims in neither."""
        return tuple(d for d in range(ndim) if d not in self.reduction + self.output)

    def axes(self, dims: Iterable[int]) -> Axes:
        """Mesh axes that split these dims."""
        entries = [self.placed[d] for d in dims if d < len(self.placed)] if self.placed else []
        return tuple(a for entry in entries for a in ((entry,) if isinstance(entry, str) else entry or ()))


@runtime_checkable  # so that a test can hold calls to their annotations
class MatrixSharing(Protocol):
    """How devices that hold parts of arrays work on whole matrices (`parallel.sharded_matrices`)."""

    def map(self, function: Callable[..., Any], specs: Sequence[Any]) -> Callable[..., Any]:
        """`function` of the parts that one device holds, as a function of the arrays; results lie alike."""

    def on_whole(self, function: OnStack, stack: Array, batch: Axes, rows: Axes, columns: Axes) -> Array:
        """`function` of whole matrices, inside `map`: the stack is [L, rows, columns], its dims split so."""


class Unsharded:
    """One device, or an array that the compiler may split as it likes."""

    def map(self, function: Callable[..., Any], specs: Sequence[Any]) -> Callable[..., Any]:
        """As it is."""
        return function

    def on_whole(self, function: OnStack, stack: Array, batch: Axes, rows: Axes, columns: Axes) -> Array:
        """As it is."""
        return function(stack)


class _View(NamedTuple):
    """How one leaf becomes [L, m, n], m <= n. Sizes are those of the whole, axes those that split them."""

    order: tuple[int, ...]  # batch dims, those of rows, those of columns
    batch: int  # number of batch dims
    rows: int
    shape: tuple[int, int]
    axes: tuple[Axes, Axes, Axes]

    @classmethod
    def of(cls, shape: Sequence[int], matrix: Matrix) -> "_View":
        def side(dims: tuple[int, ...]) -> tuple[int, Axes, tuple[int, ...]]:
            return math.prod(shape[d] for d in dims), matrix.axes(dims), dims

        # Squares are turned by what splits them, so that as many as can be are of one group.
        (m, rows, r), (n, columns, c) = sorted((side(matrix.reduction), side(matrix.output)))
        batch = matrix.batch(len(shape))
        return cls((*batch, *r, *c), len(batch), len(r), (m, n), (matrix.axes(batch), rows, columns))

    def stack(self, x: Array) -> Array:
        """[L, m, n], or the part of it that is in x."""
        x = x.transpose(self.order)
        first, second = self.batch, self.batch + self.rows
        sizes = (x.shape[:first], x.shape[first:second], x.shape[second:])
        return x.reshape([math.prod(size) for size in sizes])

    def leaf(self, stack: Array, like: Array) -> Array:
        """The inverse."""
        shape = [like.shape[d] for d in self.order]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stack.reshape(shape).transpose(inverse)


def orthogonalize(x: Float[Array, "L m n"], steps: int) -> Float[Array, "L m n"]:
    """Newton–Schulz on every matrix, m <= n: 20 m²n + 10 m³ operations each in five steps.

    Products are of x's dtype, sums float32. Rows and columns may come in any order: they go out in it.
    """
    a, b, c = NEWTON_SCHULZ
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True))
    y = x.astype(jnp.float32) / (norm + EPS)
    for _ in range(steps):
        low = y.astype(x.dtype)
        gram = _product("Lmn,Lkn->Lmk", low, low)
        g = gram.astype(x.dtype)
        polynomial = b * gram + c * _product("Lmk,Lkn->Lmn", g, g)
        y = a * y + _product("Lmk,Lkn->Lmn", polynomial.astype(x.dtype), low)
    return y.astype(x.dtype)


def _product(spec: str, left: Array, right: Array) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def on_matrices(
    function: OnStack, leaves: Sequence[Array], matrices: Sequence[Matrix], parts: MatrixSharing
) -> list[Array]:
    """`function` of stacks [L, m, n] on every matrix of all leaves: one call for each shape and placement.

    It must not care about the order of rows and columns, nor answer zeros with anything but zeros.
    """
    views = [_View.of(x.shape, m) for x, m in zip(leaves, matrices, strict=True)]
    groups: dict[Any, list[int]] = {}
    for i, view in enumerate(views):
        groups.setdefault((view.shape, view.axes), []).append(i)

    def run(*leaves: Array) -> list[Array]:
        done: dict[int, Array] = {}
        for (_, axes), members in groups.items():
            stacks = [views[i].stack(leaves[i]) for i in members]
            ends = [sum(s.shape[0] for s in stacks[: k + 1]) for k in range(len(stacks))]
            whole = parts.on_whole(function, jnp.concatenate(stacks), *axes)
            for i, stack in zip(members, jnp.split(whole, ends[:-1]), strict=True):
                done[i] = views[i].leaf(stack, leaves[i])
        return [done[i] for i in range(len(leaves))]

    return parts.map(run, [m.placed for m in matrices])(*leaves) if leaves else []


def scale_by_muon(
    matrices: Any, *, momentum: float, nesterov: bool, steps: int, dtype: Any, parts: MatrixSharing
) -> optax.GradientTransformation:
    """Gradients to directions: an exponential mean, corrected for its start, then `orthogonalize`.

    matrices: a tree of `Matrix`, one a leaf. dtype: of the iteration's products, and of what devices send.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), None)

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradients, state.mu, momentum, 1)
        ahead = optax.tree.bias_correction(mu, momentum, optax.safe_increment(count) if nesterov else count)
        if nesterov:
            now = optax.tree.bias_correction(gradients, momentum, count)
            ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        leaves, treedef = jax.tree.flatten(ahead)
        found = jax.tree.leaves(matrices, is_leaf=lambda x: isinstance(x, Matrix))
        low = [x.astype(dtype) for x in leaves]
        done = on_matrices(lambda x: orthogonalize(x, steps), low, found, parts)
        updates = [y.astype(x.dtype) for y, x in zip(done, leaves, strict=True)]
        return jax.tree.unflatten(treedef, updates), MuonState(count, mu, None)

    return optax.GradientTransformation(init, update)
