"""What goes into every projection of a model, layer by layer, behind layers that are compressed already.

A recording pass is the model itself with two operations exchanged: `Ops.project`, by whose names
projections are known, and `Ops.experts`. Each layer is recorded on the stream as the compressed layers before
it leave it, compressed, and run again, so that no layer makes good what another one will not do.

B rows, T positions, D model, I inputs of a projection, E experts, k choices of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.activations import activate
from kernels.einsum import count_contracted
from kernels.grouped_experts import ExpertSpec
from models.ops import Ops
from models.param import ParamInfo
from models.spec import LayerSpec
from models.transformer import Model
from models.weights import QTensor, kind_of, merged

Tree = dict[str, Any]
Batch = dict[str, Array]
HIGHEST = jax.lax.Precision.HIGHEST
STREAM = "stream"  # what is recorded of a layer itself


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over tokens of what goes into a product; of experts [E, ...], each of its own tokens.

    second: xᵀx in float32. peak: the largest |x|. total: the sum of |x|. count: tokens. worth: of an expert,
    gate times the norm of what it says (REAP, arXiv:2510.13999).
    """

    second: Float[Array, "*E I I"]
    peak: Float[Array, "*E I"]
    total: Float[Array, "*E I"]
    count: Float[Array, "*E"]
    worth: Any = None

    def plus(self, other: "Moments") -> "Moments":
        """Of both."""
        summed = jax.tree.map(jnp.add, self, other)
        return replace(summed, peak=jnp.maximum(self.peak, other.peak))


Recorded = dict[str, Moments]


@dataclass(frozen=True)
class Layer:
    """One layer of a model with what was recorded of it: where it stands, its certificates, its weights."""

    segment: int
    place: int  # in the period
    row: int  # of the stack
    spec: LayerSpec
    infos: Tree  # of one layer
    weights: Tree
    recorded: Recorded


def key_of(path: Any, info: ParamInfo) -> str | None:
    """What a matrix's inputs are recorded under: its projection, or its name among experts."""
    kind = kind_of(info)
    return f"experts.{path[-1].key}" if kind == "experts" else kind


def one_layer(info: ParamInfo) -> ParamInfo:
    """The certificate of one layer of a stack: what `ParamInfo.stacked` makes a stack of."""
    reduction, output = (tuple(dim - 1 for dim in dims) for dims in (info.reduction, info.output))
    return replace(info, shape=info.shape[1:], axes=info.axes[1:], reduction=reduction, output=output)


def moments_of(rows: Float[Array, "N I"], real: Bool[Array, " N"]) -> Moments:
    """Of rows that are no padding."""
    x = jnp.where(real[:, None], rows.astype(jnp.float32), 0.0)
    size = jnp.abs(x)
    return Moments(
        jnp.matmul(x.T, x, precision=HIGHEST),
        jnp.max(size, axis=0),
        jnp.sum(size, axis=0),
        jnp.sum(real.astype(jnp.float32)),
    )


def recording(ops: Ops, real: Bool[Array, "B T"], found: Recorded) -> Ops:
    """The operations, which leave in `found` what they were given; to be traced once a layer."""

    def keep(name: str, moments: Moments) -> None:
        found[name] = found[name].plus(moments) if name in found else moments

    def project(name: str, spec: str, x: Array, w: Any) -> Array:
        width = x.ndim - count_contracted(spec)
        keep(name, moments_of(x.reshape(real.size, -1), real.reshape(-1)))
        assert width == real.ndim, (name, spec)  # rows are a batch's positions
        return ops.project(name, spec, x, w)

    def experts(
        x: Float[Array, "B T D"],
        chosen: Int[Array, "B T k"],
        gates: Float[Array, "B T k"],
        up: Array,
        down: Array,
        *,
        spec: ExpertSpec,
        **rest: Any,
    ) -> tuple[Array, Array]:
        rows, choices = x.reshape(real.size, -1), chosen.reshape(real.size, -1)
        weights = gates.reshape(real.size, -1)

        def one(expert: tuple[Array, ...]) -> tuple[Moments, Moments]:
            number, up, down, *bias = expert
            hit = choices == number
            mine = jnp.any(hit, axis=1) & real.reshape(-1)
            hidden = jnp.tensordot(rows, up, 1) + (bias[0] if bias else 0.0)
            hidden = activate(hidden, spec.activation)
            said = jnp.linalg.norm(jnp.matmul(hidden, down).astype(jnp.float32), axis=-1)
            worth = jnp.sum(jnp.sum(jnp.where(hit, weights, 0.0), axis=1) * said * mine)
            return moments_of(rows, mine), replace(moments_of(hidden, mine), worth=worth)

        given = (jnp.arange(up.shape[0]), up, down)
        given += (rest["up_bias"],) if rest.get("up_bias") is not None else ()
        into_up, into_down = jax.lax.map(one, given)
        keep("experts.up", into_up)
        keep("experts.down", into_down)
        # As while decoding, nothing is dropped: an expert is to be known by all that it is chosen for.
        return ops.experts(x, chosen, gates, up, down, spec=replace(spec, capacity=None), **rest)

    return replace(ops, project=project, experts=experts)


def walk(
    model: Model,
    params: Tree,
    batches: Sequence[Batch],
    ops: Ops,
    change: Callable[[Layer], Tree],
    announce: Callable[[int], None] = lambda number: None,
) -> Tree:
    """The parameters with every layer's as `change` makes them of what was recorded, layer after layer.

    batches: [B, T] arrays of the calibration text; none: nothing is recorded. A layer that predicts further
    tokens stays as it is.
    """
    streams = [_embed(model, ops, {"embed": params["embed"]}, batch) for batch in batches]
    segments: Tree = {}
    number = 0
    for s, segment in enumerate(model.segments):
        rows: dict[str, list[Tree]] = {str(p): [] for p in range(len(segment.period))}
        for row in range(segment.count):
            for p, spec in enumerate(segment.period):
                infos = jax.tree.map(one_layer, model.info["segments"][str(s)][str(p)])
                weights = jax.tree.map(
                    lambda x, i=row: x[i], params["segments"][str(s)][str(p)], is_leaf=is_weight
                )
                recorded: Recorded = {}
                plain = merged(weights)
                for x, batch in zip(streams, batches, strict=True):
                    more = _record(model, ops, spec, plain, x, batch)
                    recorded = {k: recorded[k].plus(v) if k in recorded else v for k, v in more.items()}
                new = change(Layer(s, p, row, spec, infos, weights, recorded))
                rows[str(p)].append(new)
                plain = merged(new)
                streams = [
                    _run(model, ops, spec, plain, x, batch) for x, batch in zip(streams, batches, strict=True)
                ]
                announce(number := number + 1)
        segments[str(s)] = {p: jax.tree.map(lambda *x: jnp.stack(x), *layers) for p, layers in rows.items()}
    return {**params, "segments": segments}


# By model, operations and kind of layer, so that all layers and all recipes of a model share the programs.


@partial(jax.jit, static_argnums=(0, 1))
def _embed(model: Model, ops: Ops, params: Tree, batch: Batch) -> Float[Array, "B T D"]:
    return model.embed(params, batch, ops)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _record(model: Model, ops: Ops, spec: LayerSpec, layer: Tree, x: Array, batch: Batch) -> Recorded:
    found: Recorded = {}
    y, _ = model.layer(spec, layer, x, batch, None, recording(ops, batch["segment_ids"] > 0, found))
    found[STREAM] = influence(x, y, batch["segment_ids"].reshape(-1) > 0)
    return found


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _run(
    model: Model, ops: Ops, spec: LayerSpec, layer: Tree, x: Float[Array, "B T D"], batch: Batch
) -> Float[Array, "B T D"]:
    return model.layer(spec, layer, x, batch, None, ops)[0]


def is_weight(leaf: Any) -> bool:
    """Whether a node of a parameter tree is a weight that is more than an array."""
    return isinstance(leaf, QTensor)


def influence(x: Float[Array, "B T D"], y: Float[Array, "B T D"], real: Bool[Array, " N"]) -> Moments:
    """How much a layer turns the stream, as `worth`: 1 - cos, summed over tokens (arXiv:2403.03853)."""
    before, after = (z.reshape(real.size, -1).astype(jnp.float32) for z in (x, y))
    sizes = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    turned = 1.0 - jnp.sum(before * after, axis=-1) / jnp.maximum(sizes, 1e-20)
    nothing = jnp.zeros((0,), jnp.float32)
    count = jnp.sum(real.astype(jnp.float32))
    return Moments(nothing[:, None], nothing, nothing, count, jnp.sum(jnp.where(real, turned, 0.0)))
