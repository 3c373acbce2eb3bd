"""A decoder-only transformer as pure functions over its parameter tree; the configuration makes it a family.

B batch, T position, S cache position, D model, V vocabulary, L layers.
The tree is {"embed", "segments": {segment: {place in the period: stacked [count, ...]}}, "final_norm",
"head"}; "head" is absent where the token table is tied.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models.config import ModelConfig, check_model
from models.layers import Block, Embedding, Head, Norm
from models.loss import LOGIT_AXES, chunked_cross_entropy, softcap_logits
from models.ops import Ops
from models.param import ParamInfo, info_of
from models.spec import LayerSpec, Segment, make_segments

Tree = dict[str, Any]


def build_model(config: ModelConfig) -> "Model":
    """The model that `config` describes, without a single array. ValueError for values that make no model."""
    check_model(config)
    if config.vocab_size < 1:
        raise ValueError(
            f"model.vocab_size={config.vocab_size} must be positive when a model is built; "
            "take the tokenizer's size rounded up to a multiple of 128"
        )
    parts: dict[str, Callable[..., nnx.Module]] = {
        "embed": partial(Embedding, config),
        "block": partial(Block, config),
        "final_norm": partial(Norm, config, config.d_model, "embed", config.norm),
    }
    if not config.tie_embeddings:
        parts["head"] = partial(Head, config)
    graphs, info = {}, {}
    for name, make in parts.items():
        graphs[name], info[name] = describe(make)
    block, segments = info.pop("block"), make_segments(config)
    info["segments"] = {str(s): stack_info(block, segment) for s, segment in enumerate(segments)}
    return Model(config, segments, info, graphs)


def stack_info(block: Tree, segment: Segment) -> Tree:
    """The ParamInfo of a segment's layers: one stacked tree a place in its period."""
    stacked = jax.tree.map(lambda leaf: leaf.stacked(segment.count), block)
    return {str(p): stacked for p in range(len(segment.period))}


def describe(make: Callable[..., nnx.Module]) -> tuple[Any, Tree]:
    """A module's structure and the ParamInfo of each of its parameters, without computing any."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state, info_of)


@dataclass(frozen=True, eq=False)
class Model:
    """What `parallel` composes and `training` drives. Holds no arrays; methods are pure and may be traced.

    A batch is a dict of [B, T] arrays: tokens, targets, positions, segment_ids (int32), loss_weights (f32).
    """

    config: ModelConfig
    segments: tuple[Segment, ...]
    info: Tree  # ParamInfo leaves, in the shape of the parameter tree
    graphs: dict[str, Any] = field(repr=False)  # structure of each nnx module, to merge parameters into

    def init(self, key: Key[Array, ""]) -> Tree:
        """Float32 parameters. A leaf's key depends on its name and layer alone, not on sharding or order."""
        tree = {
            name: jax.tree_util.tree_map_with_path(partial(init_leaf, key, name), infos)
            for name, infos in self.info.items()
            if name != "segments"
        }
        tree["segments"], first = {}, 0
        for s, segment in enumerate(self.segments):
            places = tree["segments"][str(s)] = {}
            for p in range(len(segment.period)):
                layers = first + p + len(segment.period) * jnp.arange(segment.count)
                make = partial(init_stacked, key, layers)
                places[str(p)] = jax.tree_util.tree_map_with_path(make, self.info["segments"][str(s)][str(p)])
            first += segment.count * len(segment.period)
        return tree

    def embed(self, params: Tree, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T D"]:
        """Token (and learned position) embeddings, in the compute dtype."""
        return self._module("embed", params["embed"])(batch, ops)

    def layer(
        self,
        spec: LayerSpec,
        params: Tree,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        key: Any,
        ops: Ops,
    ) -> tuple[Float[Array, "B T D"], Tree]:
        """One layer with its own (unstacked) parameters, and what it reports; `key` is for random layers."""
        del key
        x, _ = self._module("block", params)(x, batch, spec, ops)
        return x, {}

    def head(
        self, params: Tree, x: Float[Array, "B T D"], batch: dict[str, Array], ops: Ops
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Weighted sum of losses in nats, and its parts (sums): `nll`, the loss to report, and `z_loss`."""
        return chunked_cross_entropy(
            self._module("final_norm", params["final_norm"])(x),
            self._output_table(params),
            batch["targets"],
            batch["loss_weights"],
            chunk=ops.loss_chunk,
            softcap=self.config.logit_softcap,
            z_loss=ops.z_loss,
            constrain=ops.constrain,
        )

    def logits(self, params: Tree, x: Float[Array, "B T D"], ops: Ops) -> Float[Array, "B T V"]:
        """Float32 next-token logits of the residual stream after the last layer."""
        x = self._module("final_norm", params["final_norm"])(x)
        table = self._output_table(params).astype(x.dtype)
        logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
        return softcap_logits(ops.constrain(logits, LOGIT_AXES), self.config.logit_softcap)

    def apply(self, params: Tree, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T V"]:
        """Logits of a plain forward pass: needs tokens, positions and segment_ids."""
        x, _ = self._layers(params, self.embed(params, batch, ops), batch, ops, None)
        return self.logits(params, x, ops)

    def init_cache(self, batch_size: int, length: int, dtype: Any) -> Tree:
        """An empty cache: keys and values [count, B, length, K, H] of each layer, and its filled length."""
        shape = (batch_size, length, self.config.num_kv_heads, self.config.head_dim)
        places: Tree = {
            str(s): {
                str(p): {name: jnp.zeros((segment.count, *shape), dtype) for name in ("k", "v")}
                for p in range(len(segment.period))
            }
            for s, segment in enumerate(self.segments)
        }
        return {"length": jnp.zeros((), jnp.int32), "segments": places}

    def decode(
        self, params: Tree, tokens: Int[Array, "B T"], cache: Tree, ops: Ops
    ) -> tuple[Float[Array, "B T V"], Tree]:
        """Logits of the next T tokens of each row, and the cache with them: a prompt's T, then T = 1.

        All rows are equally long. The caller keeps the total within the cache's length (and, with learned
        positions, max_seq_len): past it the last entries would be overwritten.
        """
        size, length = tokens.shape[1], cache["length"]
        capacity = cache["segments"]["0"]["0"]["k"].shape[2]
        slots = jnp.broadcast_to(jnp.arange(capacity), (tokens.shape[0], capacity))
        batch = {
            "tokens": tokens,
            "positions": jnp.broadcast_to(length + jnp.arange(size), tokens.shape),
            "segment_ids": jnp.ones_like(tokens),
            "kv_positions": slots,
            "kv_segment_ids": (slots < length + size).astype(jnp.int32),
        }
        x = self.embed(params, batch, ops)
        x, segments = self._layers(params, x, batch, ops, cache["segments"])
        return self.logits(params, x, ops), {"length": length + size, "segments": segments}

    def num_params(self) -> dict[str, int]:
        """How many parameters: all, and without embedding tables and head."""
        leaves = jax.tree.leaves(self.info)
        body = [leaf for leaf in leaves if leaf.role not in ("embedding", "head")]
        return {"total": sum(map(_size, leaves)), "non_embedding": sum(map(_size, body))}

    def flops_per_token(self, seq_len: int) -> dict[str, float]:
        """Operations of a forward pass per token of a `seq_len` row; training takes three times that.

        `matmul`: two a weight, with the head; `attention_full`: scores and values over all positions that
        a window allows; `attention_causal`: over those of them that are not in the future, on average.
        """
        config = self.config
        weights = [leaf for leaf in jax.tree.leaves(self.info) if leaf.role == "matrix"]
        matmul = 2 * (sum(map(_size, weights)) + config.vocab_size * config.d_model)
        per_key = 4 * config.num_heads * config.head_dim
        full = causal = 0.0
        for segment in self.segments:
            for spec in segment.period:
                seen = min(seq_len, spec.window or seq_len)
                full += segment.count * per_key * seen
                causal += segment.count * per_key * (seen - seen * seen / (2 * seq_len))
        return {"matmul": float(matmul), "attention_full": full, "attention_causal": causal}

    def _module(self, name: str, params: Tree) -> Any:
        return nnx.merge(self.graphs[name], params)

    def _output_table(self, params: Tree) -> Float[Array, "V D"]:
        return params["embed" if self.config.tie_embeddings else "head"]["table"]

    def _layers(
        self, params: Tree, x: Array, batch: dict[str, Array], ops: Ops, caches: Tree | None
    ) -> tuple[Array, Tree]:
        """All layers in order, by one scan a segment; the caches, where there are any, ride along."""
        filled = {}
        for s, segment in enumerate(self.segments):

            def period(x: Array, stacked: Any, segment: Segment = segment) -> tuple[Array, Any]:
                params, cache = stacked
                out = {}
                for p, spec in enumerate(segment.period):
                    block = self._module("block", params[str(p)])
                    x, out[str(p)] = block(x, batch, spec, ops, cache and cache[str(p)])
                return x, out

            stacked = (params["segments"][str(s)], caches and caches[str(s)])
            x, filled[str(s)] = jax.lax.scan(period, x, stacked)
        return x, filled


def init_leaf(key: Array, part: str, path: Any, info: ParamInfo) -> Array:
    """The value of one unstacked parameter."""
    return info.init(fold_name(key, part, path), info.shape, info.dtype)


def init_stacked(key: Array, layers: Int[Array, " L"], path: Any, info: ParamInfo) -> Array:
    """The values of one parameter of the given layers, stacked; each as if it were made alone."""
    key = fold_name(key, "layer", path)
    return jax.vmap(lambda i: info.init(jax.random.fold_in(key, i), info.shape[1:], info.dtype))(layers)


def fold_name(key: Array, part: str, path: Any) -> Array:
    """A key that belongs to a parameter's name."""
    name = "/".join((part, *(str(entry.key) for entry in path)))
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _size(info: ParamInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64))
