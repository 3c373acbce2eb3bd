"""Backward in two parts: gradients by inputs now, gradients by weights later, from what was left in between.

Every projection of a layer passes through `ops.project`, so nothing of the model need be known: a tap is the
pair (input, gradient by output) of one projection. In the first part each projection gives its pair away as
the gradient of a tap that it never reads; in the second the layer is traced again with projections that only
contract their pair with the weights, and everything else in it is dead code.
Parameters that no projection holds (norms, biases) get their gradients in the first part.

Where the two arrays of a pair lie is said by the projection's name (`kernels.names.PROJECTIONS`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.names import PROJECTIONS, dims_of
from parallel.schedules.accumulate import LayerScan, Params, Sums

Taps = list[tuple[Array, Array]]
Project = Callable[[str, str, Array, Array], Array]
Product = Callable[[Array, Array], Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(product: Product, x: Array, w: Array, tap: tuple[Array, Array]) -> Array:
    return product(x, w)


def _forward(product: Product, x: Array, w: Array, tap: tuple[Array, Array]) -> Any:
    return product(x, w), (x, w)


def _backward(product: Product, residuals: tuple[Array, Array], dy: Array) -> Any:
    x, w = residuals
    # By its input alone: the product for the weights is what waits.
    _, pull = jax.vjp(lambda x: product(x, w), x)
    # A cotangent has the form of its argument: a tap is shaped like (x, y), so the pair fits into it. None is
    # one of zeros for every part of a weight that is more than an array.
    return pull(dy)[0], jnp.zeros_like(w) if isinstance(w, jax.Array) else None, (x, dy)


_tapped.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class DeferredGradients:
    """A stretch of layers whose gradients by projections' weights are left in `taps`."""

    scan: LayerScan

    def __call__(self, stacked: Params, x: Array, layers_before: Any, taps: Taps) -> tuple[Array, Sums]:
        """As LayerScan; the taps of each projection are [repetitions, ...] and never read."""

        def period(x: Array, item: tuple[Params, Array, Taps]) -> tuple[Array, Sums]:
            params, first, taps = item
            rest = iter(taps)

            def project(name: str, spec: str, x: Array, w: Array) -> Array:
                product = partial(self.scan.ops.project, name, spec)
                # No gradient to w here: it is made of the tap.
                return _tapped(product, x, jax.lax.stop_gradient(w), next(rest))

            return with_project(self.scan, project).period_of_layers(x, (params, first))

        return self.scan.over(period, x, (stacked, self.scan.layer_numbers(stacked, layers_before), taps))


@dataclasses.dataclass(frozen=True)
class ReplayedGradients:
    """The same stretch as a scalar whose gradient by the parameters is what `DeferredGradients` left out."""

    scan: LayerScan

    def __call__(self, stacked: Params, x: Array, layers_before: Any, taps: Taps) -> Array:
        """Sum over projections of <projection(tap's input), tap's gradient>."""

        def period(x: Array, item: tuple[Params, Array, Taps]) -> tuple[Array, Sums]:
            params, first, taps = item
            rest, totals = iter(taps), []

            def project(name: str, spec: str, x: Array, w: Array) -> Array:
                # In the order of the trace, which is the same in both parts: the layer's code is the same.
                tap_x, tap_dy = next(rest)
                y = self.scan.ops.project(name, spec, tap_x, w)
                # <y, dy> has the gradient x dy by w: the one product that was left out.
                totals.append(jnp.sum(y.astype(jnp.float32) * tap_dy.astype(jnp.float32)))
                # Zeros end the chain: what follows in the layer depends on nothing, and XLA drops it.
                return jnp.zeros_like(y)

            frozen = with_project(self.scan, project)
            frozen.period_of_layers(x, (params, first))
            return x, {"total": sum(totals, jnp.zeros((), jnp.float32))}

        _, sums = self.scan.over(
            # Nothing is recomputed here: the taps are all that it needs.
            period,
            x,
            (stacked, self.scan.layer_numbers(stacked, layers_before), taps),
            remat=False,
        )
        return sums["total"]


def with_project(scan: LayerScan, project: Project) -> LayerScan:
    """The same stretch of layers with another function for its projections."""
    return dataclasses.replace(scan, ops=dataclasses.replace(scan.ops, project=project))


@dataclasses.dataclass(frozen=True)
class TapShape:
    """One array of a pair, before it has a value."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


def tap_shapes(scan: LayerScan, params: Params, x: jax.ShapeDtypeStruct) -> list[tuple[TapShape, TapShape]]:
    """The pairs that one period of layers leaves behind, in the order in which they are met."""
    shapes: list[tuple[TapShape, TapShape]] = []

    def project(name: str, spec: str, x: Array, w: Array) -> Array:
        y, known = scan.ops.project(name, spec, x, w), PROJECTIONS[name]
        pair = (TapShape(a.shape, a.dtype, dims_of(axes, a.ndim)) for a, axes in ((x, known.x), (y, known.y)))
        shapes.append((next(pair), next(pair)))
        return y

    watching = with_project(scan, project)
    jax.eval_shape(lambda p, x: watching.period_of_layers(x, (p, jnp.zeros((), jnp.int32))), params, x)
    return shapes
