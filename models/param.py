"""What a parameter is born with: shape, logical axes, initializer and role. All later readings start here."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from common.checks import choice
from kernels.names import LOGICAL_AXES, PROJECTIONS

# "balance" is no weight: its gradient says which experts have too much work, and the optimizer moves it by
# a fixed step against that (`optim.optimizers`). It has no part in the gradient norm.
ROLES = ("matrix", "embedding", "head", "vector", "balance")


@dataclass(frozen=True)
class ParamInfo:
    """One parameter, before it has a value.

    `axes` holds one logical axis (or None) a dim. `reduction` and `output` are the dims a matrix contracts
    with its input and the dims it produces; dims in neither are batch dims (stacked layers, a fused pair).
    Both are empty for what is not a matrix. `init(key, shape, dtype)` makes the value of one layer.
    `projection` names the product that the matrix is for (`kernels.names`), where it is one of these.
    What is not `trained` has no gradient and no moments (`training.state.TrainState.frozen`).
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    role: str
    decay: bool
    init: Callable[..., Any]
    projection: str | None = None
    trained: bool = True

    def stacked(self, count: int) -> "ParamInfo":
        """The same parameter of `count` layers in one array, layers first."""
        return replace(
            self,
            shape=(count, *self.shape),
            axes=("layers", *self.axes),
            reduction=tuple(dim + 1 for dim in self.reduction),
            output=tuple(dim + 1 for dim in self.output),
        )


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Callable[..., Any],
    *,
    reduction: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    role: str = "matrix",
    decay: bool = True,
    project: str | None = None,
) -> nnx.Param:
    """A float32 parameter that remembers, as metadata, all that ParamInfo holds.

    Raises ValueError for a logical axis or a projection that no reader knows.
    """
    assert len(axes) == len(shape) and role in ROLES, (axes, shape, role)
    for axis in filter(None, axes):
        choice("logical axis", axis, LOGICAL_AXES)
    if project is not None:
        choice("projection", project, PROJECTIONS)
    # Only shapes come of this: the model is described under eval_shape, and values are made later, each by
    # the key of its name (`init_leaf`).
    value = init(rngs.params(), shape, jnp.float32)
    # `axes`, not Flax's own sharding keys: those would make Flax look for a mesh when the value is created.
    return nnx.Param(
        value,
        axes=axes,
        init=init,
        reduction=reduction,
        output=output,
        role=role,
        decay=decay,
        projection=project,
    )


def vector(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable[..., Any]
) -> nnx.Param:
    """A scale or a bias: added or multiplied, never contracted, never decayed."""
    return param(rngs, shape, axes, init, role="vector", decay=False)


def info_of(variable: Any) -> ParamInfo:
    """The ParamInfo of an (abstract or real) Variable made by `param`."""
    metadata = variable.get_metadata()
    names = ("axes", "reduction", "output", "role", "decay", "init", "projection")
    return ParamInfo(
        shape=tuple(variable.shape), dtype=variable.dtype, **{name: metadata[name] for name in names}
    )


def init_leaf(key: Array, part: str, path: Any, info: ParamInfo) -> Array:
    """The value of one parameter that is not stacked over layers."""
    return info.init(fold_name(key, part, path), info.shape, info.dtype)


def init_stacked(key: Array, layers: Int[Array, "*stack"], path: Any, info: ParamInfo) -> Array:
    """The values of one parameter of the given layers, stacked; each as if it were made alone."""
    key = fold_name(key, "layer", path)

    def make(layer: Array) -> Array:
        return info.init(jax.random.fold_in(key, layer), info.shape[1:], info.dtype)

    # vmap over keys: the same bits as one layer at a time, in one program.
    for _ in range(layers.ndim):
        make = jax.vmap(make)
    return make(layers)


def fold_name(key: Array, part: str, path: Any) -> Array:
    """The random key that belongs to a parameter's name, by its part of the model and its path."""
    # A checksum of the name, not a counter: adding or leaving out a parameter changes no other's values.
    name = "/".join((part, *(str(entry.key) for entry in path)))
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
