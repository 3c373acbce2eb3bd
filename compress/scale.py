"""Inputs of projections made easier to round: each times a factor, by which whatever gives it is divided.

AWQ (Lin et al. 2023, arXiv:2306.00978) looks for the factors with the least error of the rounded weights,
SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) evens out what is large in inputs and in weights. Before any
rounding the model computes what it did: factors go into the norm before, into the values before `o`, and into
the linear half of `up` before `down`. Layers of other mixers, and experts, which share their input with a
router, stay as they are.

I inputs, O outputs, D model, N query heads, K key/value heads, H head size, F feed-forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compress.calibrate import Layer, Moments, Tree
from compress.solve import Grid, fit, output_error, rounded
from models.config import ModelConfig

SHARES = tuple(i / 20 for i in range(20))  # exponents of a mean input, tried by AWQ; 0: as it is
LEAST = 1e-4  # of an input's size, so that one that was never there does not divide by zero
SMOOTH = 0.5  # how much of what is large moves into the weights


@dataclass(frozen=True)
class Fold:
    """Inputs that may be scaled: recorded as `key`, read by these weights, and what divides their source."""

    key: str
    readers: tuple[tuple[str, str], ...]
    divide: Callable[[Tree, Array], Tree]
    shared: tuple[int, int, int] | None = None  # (K, G, H): one factor for the G heads that share a value


def rescaled(layer: Layer, config: ModelConfig, method: str, grid: Grid) -> Layer:
    """The layer as another one that computes the same, with what was recorded of it."""
    weights, recorded = layer.weights, dict(layer.recorded)
    for fold in folds(layer, config):
        moments = recorded[fold.key]
        matrices = [_get(weights, path) for path in fold.readers]
        flat = [w.reshape(moments.peak.shape[0], -1) for w in matrices]
        factors = find_factors(flat, moments, method, grid, fold.shared)
        for path, w in zip(fold.readers, matrices, strict=True):
            weights = _with(weights, path, (w.reshape(factors.size, -1) * factors[:, None]).reshape(w.shape))
        weights = fold.divide(weights, factors)
        for path in fold.readers:
            recorded[path[1]] = divided(recorded[path[1]], factors)
    return replace(layer, weights=weights, recorded=recorded)


def folds(layer: Layer, config: ModelConfig) -> list[Fold]:
    """The places of a layer where a factor can be taken out of one weight and put into another."""
    found = []
    attention, mlp = layer.weights["attention"], layer.weights["mlp"]
    norms = {name: layer.weights.get(name) for name in ("attention_norm", "mlp_norm")}
    offset = config.norm_unit_offset
    if layer.spec.mixer == "attention" and norms["attention_norm"] is not None:
        readers = tuple(("attention", name) for name in ("q", "kv", "gate") if name in attention)
        found.append(Fold("q", readers, partial(_divide_norm, "attention_norm", offset)))
    if not layer.spec.moe and norms["mlp_norm"] is not None:
        found.append(Fold("up", (("mlp", "up"),), partial(_divide_norm, "mlp_norm", offset)))
    if layer.spec.mixer == "attention":
        heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
        found.append(Fold("o", (("attention", "o"),), _divide_values, heads))
    if not layer.spec.moe and config.activation in ("swiglu", "geglu"):
        assert mlp["up"].ndim == 3
        found.append(Fold("down", (("mlp", "down"),), _divide_linear))
    return found


def find_factors(
    weights: Sequence[Float[Array, "I O"]],
    moments: Moments,
    method: str,
    grid: Grid,
    shared: tuple[int, int, int] | None = None,
) -> Float[Array, " I"]:
    """The factor of each input, their geometric middle at one."""

    def even(x: Array, middle: Callable[..., Array]) -> Array:
        if shared is None:
            return x
        parts = x.reshape(shared)
        return jnp.broadcast_to(middle(parts, axis=1, keepdims=True), shared).reshape(-1)

    if method == "smooth":
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(w), axis=1) for w in weights]), axis=0)
        size, other = even(moments.peak, jnp.max), even(largest, jnp.max)
        return _centred(_least(size) ** SMOOTH / _least(other) ** (1 - SMOOTH))
    return _searched(
        list(weights), moments, grid, even(moments.total / jnp.maximum(moments.count, 1), jnp.mean)
    )


@partial(jax.jit, static_argnames="grid")
def _searched(weights: list[Array], moments: Moments, grid: Grid, size: Array) -> Array:
    def error(share: Array) -> Array:
        factors = _centred(_least(size) ** share)
        total = jnp.zeros(())
        for w in weights:
            scaled = w * factors[:, None]
            weight = jnp.diagonal(moments.second) / jnp.square(factors)
            back = rounded(scaled, fit(scaled, grid, weight)) / factors[:, None]
            total = total + jnp.sum(output_error(w, back, moments.second))
        return total

    shares = jnp.array(SHARES)
    best = shares[jnp.argmin(jax.lax.map(error, shares))]
    return _centred(_least(size) ** best)


def divided(moments: Moments, factors: Float[Array, " I"]) -> Moments:
    """Of inputs that are divided by the factors."""
    second = moments.second / factors[:, None] / factors
    return replace(moments, second=second, peak=moments.peak / factors, total=moments.total / factors)


def _least(x: Array) -> Array:
    return jnp.maximum(x, LEAST * jnp.max(x) + 1e-12)


def _centred(factors: Array) -> Array:
    return factors / jnp.sqrt(jnp.max(factors) * jnp.min(factors))


def _divide_norm(name: str, offset: bool, weights: Tree, factors: Array) -> Tree:
    norm = weights[name]
    scale = (1.0 + norm["scale"]) / factors - 1.0 if offset else norm["scale"] / factors
    bias = {"bias": norm["bias"] / factors} if "bias" in norm else {}
    return {**weights, name: {**norm, "scale": scale, **bias}}


def _divide_values(weights: Tree, factors: Array) -> Tree:
    attention = weights["attention"]
    kv = attention["kv"]
    own = factors.reshape(kv.shape[2], -1, kv.shape[3])[:, 0]  # [K, H]: of a group's heads all the same
    changed = {"kv": kv.at[:, 1].divide(own)}
    if "kv_bias" in attention:
        changed["kv_bias"] = attention["kv_bias"].at[1].divide(own)
    return {**weights, "attention": {**attention, **changed}}


def _divide_linear(weights: Tree, factors: Array) -> Tree:
    mlp = weights["mlp"]
    changed = {"up": mlp["up"].at[:, 1].divide(factors)}
    if "up_bias" in mlp:
        changed["up_bias"] = mlp["up_bias"].at[1].divide(factors)
    return {**weights, "mlp": {**mlp, **changed}}


def _get(weights: Tree, path: tuple[str, str]) -> Any:
    return weights[path[0]][path[1]]


def _with(weights: Tree, path: tuple[str, str], value: Array) -> Tree:
    return {**weights, path[0]: {**weights[path[0]], path[1]: value}}
