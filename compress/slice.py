"""A smaller model of the same kind: units of its width, layers or experts that say least are left out.

Which dims a unit has is what the logical axes of the parameters say (`models.param`), so that width is one
`take` along every dim of that name. What is left out is what the calibration text hears least of: units by
their mean magnitude (Minitron, arXiv:2407.14679), experts by gate times output (REAP, arXiv:2510.13999),
layers by how little they turn the stream (arXiv:2403.03853). What units of feed-forwards and heads would have
said is given to those that stay, as far as they go along: by least squares over the calibration text.

D model, N query heads, K key/value heads, H head size, F feed-forward, E experts, L layers.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from common.checks import choice, require, within
from compress.calibrate import STREAM, Layer, Tree, walk
from compress.solve import DAMPING, DOT
from compress.steps import Material
from models.config import ModelConfig
from models.param import ParamInfo
from models.transformer import Model, build_model
from models.weights import QTensor

KINDS = ("width", "depth", "experts")
OF_EXPERTS = ("router", "router_bias", "bias")  # whose last dim is the experts, and has no name
Place = tuple[int, int]  # segment and place in its period
Scores = dict[str, dict[Place, list[np.ndarray]]]  # by axis: of each layer's units
Choice = dict[str, dict[Place, np.ndarray]]  # by axis: which units of each layer stay, [count, k]


@dataclass(frozen=True)
class Slice:
    """`slice: width | depth | experts`, and how much stays.

    mlp, heads, embed: the share of the width of feed-forwards, of key/value heads with their queries, of the
    stream. keep: layers, or experts of each layer. refit: whether units that stay take over what goes.
    """

    method: str
    mlp: float = 1.0
    heads: float = 1.0
    embed: float = 1.0
    keep: int | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        choice("slice", self.method, KINDS)
        within("keep", self.keep, 1)
        shares = {"mlp": self.mlp, "heads": self.heads, "embed": self.embed}
        for key, share in shares.items():
            require(0 < share <= 1, key, share, "above 0 and at most 1, as 0.67 is")
        wide = self.method == "width"
        require(wide or set(shares.values()) == {1.0}, "slice", self.method, "width for mlp, heads or embed")
        if wide:
            require(min(shares.values()) < 1, "slice", "width", "given a share of mlp, heads or embed")
        require(wide == (self.keep is None), "keep", self.keep, "a number for depth and experts, and theirs")

    def apply(self, model: Model, params: Tree, material: Material) -> tuple[Model, Tree]:
        """The model without what says least, and its config; what predicts further tokens is left out."""
        _refuse(self, model, params)
        scores: Scores = {}
        config = self.config(model.config)

        def look(layer: Layer) -> Tree:
            found = scores_of(layer, model.config)
            for axis, score in found.items():
                scores.setdefault(axis, {}).setdefault((layer.segment, layer.place), []).append(score)
            return self.taken_over(layer, found, config) if self.refit else layer.weights

        params = walk(model, params, material.batches, material.ops(model.config), look)
        chosen = self.choose(scores, config)
        params = {name: tree for name, tree in params.items() if name != "mtp"}
        infos = {name: model.info[name] for name in params}
        smaller = jax.tree_util.tree_map_with_path(
            lambda path, info, w: take(path, info, w, chosen), infos, params
        )
        if "embed" in chosen:
            smaller = _norms_scaled(smaller, model.config, config)
        return build_model(config), smaller

    def taken_over(self, layer: Layer, scores: dict[str, np.ndarray], config: ModelConfig) -> Tree:
        """The layer's weights as those units need them that will stay, the others silent already."""
        weights, counts = layer.weights, {"mlp": config.d_ff, "kv_heads": config.num_kv_heads}
        shares = {"mlp": self.mlp, "kv_heads": self.heads}
        for axis, (part, name) in {"mlp": ("mlp", "down"), "kv_heads": ("attention", "o")}.items():
            if shares[axis] == 1 or axis not in scores:
                continue
            w, h = weights[part][name], layer.recorded[name].second
            stays = np.zeros(len(scores[axis]), bool)
            stays[_best(scores[axis][None], counts[axis])[0]] = True
            rows = w.reshape(len(h), -1)
            new = refitted(rows, h, np.repeat(stays, len(h) // len(stays)))
            weights = {**weights, part: {**weights[part], name: new.reshape(w.shape).astype(w.dtype)}}
        return weights

    def config(self, config: ModelConfig) -> ModelConfig:
        """Of what is left. ValueError where it is no model."""
        config = replace(config, mtp=None)
        if self.method == "depth":
            assert self.keep is not None
            require(self.keep < config.num_layers, "keep", self.keep, f"below {config.num_layers} layers")
            return replace(config, num_layers=self.keep)
        if self.method == "experts":
            assert self.keep is not None and config.moe is not None
            moe = config.moe
            least, most = moe.experts_per_token, moe.num_experts - 1
            within("keep", self.keep, least, most)
            return replace(config, moe=replace(moe, num_experts=self.keep))
        kv_heads = max(1, round(self.heads * config.num_kv_heads))
        return replace(
            config,
            d_ff=_size(self.mlp, config.d_ff),
            d_model=_size(self.embed, config.d_model),
            num_kv_heads=kv_heads,
            num_heads=kv_heads * (config.num_heads // config.num_kv_heads),
        )

    def choose(self, scores: Scores, config: ModelConfig) -> Choice:
        """Which units stay, in their order."""
        if self.method == "depth":
            ((place, turned),) = scores["layers"].items()
            return {"layers": {place: _best(np.array(turned)[None, :, 0], config.num_layers)}}
        if self.method == "experts":
            assert self.keep is not None
            return {"experts": {at: _best(np.stack(s), self.keep) for at, s in scores["experts"].items()}}
        chosen: Choice = {}
        if self.mlp < 1:
            chosen["mlp"] = {at: _best(np.stack(s), config.d_ff) for at, s in scores["mlp"].items()}
        if self.heads < 1:
            groups = config.num_heads // config.num_kv_heads
            kept = {at: _best(np.stack(s), config.num_kv_heads) for at, s in scores["kv_heads"].items()}
            chosen["kv_heads"] = kept
            spread = np.arange(groups)
            chosen["heads"] = {
                at: (index[..., None] * groups + spread).reshape(len(index), -1) for at, index in kept.items()
            }
        if self.embed < 1:
            # One choice for all layers: they read and write the same stream.
            total = sum(sum(own) for own in scores["embed"].values())
            chosen["embed"] = {(-1, -1): _best(np.asarray(total)[None], config.d_model)}
        return chosen


def refitted(w: Float[Array, "I O"], h: Float[Array, "I I"], stays: Bool[np.ndarray, " I"]) -> Array:
    """The matrix with zeros for inputs that go, and for the others what makes the least error without them.

    h: the sum of xᵀx. With S those that stay and R the rest: W_S + H_SS⁻¹ H_SR W_R, H damped as in GPTQ.
    """
    kept, gone = np.flatnonzero(stays), np.flatnonzero(~stays)
    h = h + DAMPING * jnp.mean(jnp.diagonal(h)) * jnp.eye(len(h))
    w = w.astype(jnp.float32)
    factor = jax.scipy.linalg.cho_factor(h[kept][:, kept])
    more = jax.scipy.linalg.cho_solve(factor, DOT(h[kept][:, gone], w[gone]))
    return jnp.zeros_like(w).at[kept].set(w[kept] + more)


def scores_of(layer: Layer, config: ModelConfig) -> dict[str, np.ndarray]:
    """How much is heard of each unit of a layer, by the axis that it lies along."""
    recorded = layer.recorded
    found = {"layers": recorded[STREAM].worth[None]}
    if "down" in recorded:
        found["mlp"] = recorded["down"].total
    if layer.spec.mixer == "attention":
        found["kv_heads"] = jnp.sum(recorded["o"].total.reshape(config.num_kv_heads, -1), axis=1)
    inputs = [recorded[name].total / recorded[name].count for name in ("q", "up") if name in recorded]
    if inputs:
        found["embed"] = sum(inputs[1:], inputs[0])
    if "experts.down" in recorded:
        own = recorded["experts.down"]
        found["experts"] = own.worth / jnp.maximum(own.count, 1)
    return {axis: np.asarray(score, np.float64) for axis, score in found.items()}


def take(path: Any, info: ParamInfo, w: Any, chosen: Choice) -> Any:
    """A parameter, stacked if a layer's, without what is not chosen along each of its dims."""
    names = [entry.key for entry in path]
    stacked = names[0] == "segments"
    place = (int(names[1]), int(names[2])) if stacked else (-1, -1)
    axes = list(info.axes)
    if names[-1] in OF_EXPERTS:
        axes[-1] = "experts"
    for dim, axis in enumerate(axes):
        axis = "embed" if axis == "expert_embed" else axis
        if axis is None or axis not in chosen:
            continue
        if axis in ("layers", "embed"):  # one choice for the model
            (index,) = chosen[axis].values()
            w = jnp.take(w, jnp.asarray(index[0]), axis=dim)
        elif place in chosen[axis]:
            rows = jnp.asarray(chosen[axis][place])
            w = jax.vmap(lambda x, i, d=dim: jnp.take(x, i, axis=d - 1))(w, rows)
    return w


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """[rows, count]: the places of each row's largest, in order."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :count], axis=-1)


def _size(share: float, size: int) -> int:
    """A share of a width in eights, as far as there are any."""
    if share == 1:
        return size
    eights = round(share * size / 8) * 8
    return eights if 0 < eights < size else max(1, round(share * size))


def _norms_scaled(params: Tree, was: ModelConfig, now: ModelConfig) -> Tree:
    """Norms over the stream with the mean over as many units as before: those left out count as zeros."""
    factor = (was.d_model / now.d_model) ** 0.5

    def scaled(path: Any, w: Any) -> Any:
        names = [entry.key for entry in path]
        of_stream = names[-1] == "scale" and names[-2].endswith("_norm") and w.shape[-1] == now.d_model
        if not of_stream or names[-2] in ("q_norm", "k_norm"):
            return w
        return (1.0 + w) * factor - 1.0 if was.norm_unit_offset else w * factor

    def final(path: Any, w: Any) -> Any:
        if path[-1].key != "scale":
            return w
        return (1.0 + w) * factor - 1.0 if was.norm_unit_offset else w * factor

    layers = jax.tree_util.tree_map_with_path(scaled, params["segments"])
    norm = jax.tree_util.tree_map_with_path(final, params["final_norm"])
    return {**params, "segments": layers, "final_norm": norm}


def _refuse(step: Slice, model: Model, params: Tree) -> None:
    """ValueError for models of which that cannot be sliced."""
    config = model.config
    packed = any(
        isinstance(w, QTensor) for w in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    )
    one_kind = len(model.segments) == 1 and len(model.segments[0].period) == 1
    others = {*config.mixers} != {"attention"}
    reasons = {
        "comes behind a step that quantizes; quantize last": packed,
        "needs layers of one kind, and this model's differ": step.method == "depth" and not one_kind,
        "needs a mixture of experts, and this model has none": step.method == "experts"
        and config.moe is None,
        "of experts in groups is not supported": step.method == "experts"
        and config.moe is not None
        and config.moe.num_groups > 1,
        "of mlp leaves experts as they are; use slice=experts": step.mlp < 1 and config.moe is not None,
        "of heads and embed is of attention alone": others and (step.heads < 1 or step.embed < 1),
        "of embed needs RMSNorm and embed_scale=false": step.embed < 1
        and (config.embed_scale or config.norm != "rmsnorm" or config.position == "learned"),
        "of heads is not supported with qk_norm=joint": step.heads < 1 and config.qk_norm == "joint",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"slice={step.method} {reason}")
