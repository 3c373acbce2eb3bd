"""What a parameter is born with: shape, logical axes, initializer and role. All later readings start here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

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
    # the key of its name (`models.transformer.init_leaf`).
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
