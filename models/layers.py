"""The parts of a decoder layer as Flax nnx modules. Float32 where it matters: norms, rotations, activations.

B batch, T query position, S key position, D model, N query heads, K key/value heads, H head size,
F feed-forward, V vocabulary; C counts the two of a fused pair (key and value, gate and up).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, ones, zeros
from jaxtyping import Array, Float, Int

from kernels.attention import Masks, Scores
from kernels.grouped_experts import GATES, activate
from kernels.names import ATTENTION_K, ATTENTION_Q, ATTENTION_V
from models.config import ModelConfig
from models.moe import Experts
from models.ops import Ops
from models.param import param, vector
from models.rope import rope_frequencies, rotate
from models.spec import LayerSpec

RESIDUAL = ("batch", "act_length", "act_embed")  # between blocks
WHOLE = ("batch", "length", "act_embed")  # inside them
HEADS = ("batch", "length", "act_heads", None)
Cache = dict[str, Array]
Sums = dict[str, Array]


def residual_init(config: ModelConfig) -> Any:
    """Projections back into the residual: spread over sqrt(2L), so that its variance is even over depths."""
    # Each layer then begins as the identity, whatever its depth.
    if config.zero_init:
        return zeros
    return normal(config.init_std / math.sqrt(2 * config.num_layers))


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dim, computed in float32, returned in the input's dtype."""

    def __init__(
        self,
        config: ModelConfig,
        size: int,
        axis: str | None,
        kind: str,
        rngs: nnx.Rngs,
        eps: float | None = None,
    ):
        self.kind, self.offset = kind, config.norm_unit_offset
        self.eps = config.norm_eps if eps is None else eps
        self.scale = vector(rngs, (size,), (axis,), zeros if self.offset else ones)
        has_bias = config.bias and kind == "layernorm"
        self.bias = vector(rngs, (size,), (axis,), zeros) if has_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` normalized over its last dim, then scaled and shifted, in its own dtype."""
        # A mean of squares over thousands of elements: bfloat16 has eight bits for the sum.
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        # Gemma's checkpoints hold scales less one.
        y = y * (1.0 + self.scale[...] if self.offset else self.scale[...])
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with shared K/V heads; the kernel itself is `ops.attention`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        init = normal(config.init_std)
        self.q = param(
            rngs, (D, N, H), ("embed", "heads", "head_dim"), init, project="q", reduction=(0,), output=(1, 2)
        )
        # Fused, but the pair keeps a dim of its own: splitting a sharded flat [D, 2KH] costs permutes.
        kv_axes = (None, "kv_heads", "head_dim")
        self.kv = param(
            rngs, (D, 2, K, H), ("embed", *kv_axes), init, project="kv", reduction=(0,), output=(2, 3)
        )
        out_axes = ("heads", "head_dim", "embed")
        self.o = param(
            rngs, (N, H, D), out_axes, residual_init(config), project="o", reduction=(0, 1), output=(2,)
        )
        # Qwen2 has biases in these projections alone: models differ in where, so where is what config says.
        biased = config.bias or config.qkv_bias
        self.q_bias = vector(rngs, (N, H), ("heads", "head_dim"), zeros) if biased else None
        self.kv_bias = vector(rngs, (2, K, H), kv_axes, zeros) if biased else None
        self.o_bias = vector(rngs, (D,), ("embed",), zeros) if config.bias else None
        self.q_norm = Norm(config, H, "head_dim", "rmsnorm", rngs) if config.qk_norm else None
        self.k_norm = Norm(config, H, "head_dim", "rmsnorm", rngs) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attend within the batch, or, with a cache of earlier keys and values, to it and the batch."""
        q, k, v = self.project(x, batch["positions"], spec, ops)
        if cache is not None:
            # Kept heads first, as the products of attention read them: else each new token would cost a copy
            # of the whole cache into that order.
            new = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
            cache = extend_cache(cache, new, batch["positions"][0, 0], axis=2)
            k, v = (cache[name].astype(x.dtype).swapaxes(1, 2) for name in new)
        # Behind the cache, which holds each head once.
        k, v = repeat_heads(k, ops), repeat_heads(v, ops)
        # Named behind bias, norm and rotation, so that a policy that keeps them makes none of these again.
        q, k, v = name_inputs(q, k, v)
        mixed = ops.attention(q, k, v, masks_of(batch), scores_of(self.config, spec))
        out = ops.project("o", "BTNH,NHD->BTD", mixed, self.o[...])
        return add_bias(out, self.o_bias), cache

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], spec: LayerSpec, ops: Ops
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values, normalized and rotated as the family wants them."""
        q = add_bias(ops.project("q", "BTD,DNH->BTNH", x, self.q[...]), self.q_bias)
        kv = add_bias(ops.project("kv", "BTD,DCKH->BTCKH", x, self.kv[...]), self.kv_bias)
        # Said where heads appear: all that follows up to the kernel then lies by heads, whatever else splits
        # the weight.
        q = ops.constrain(q, HEADS)
        kv = ops.constrain(
            # Fewer K/V heads than devices of tensor: whole on each until they are repeated.
            kv,
            ("batch", "length", None, "act_kv_heads" if ops.repeat_kv == 1 else None, None),
        )
        k, v = kv[:, :, 0], kv[:, :, 1]
        # Before the rotation: behind it, a scale for each element would make scores hang on absolute
        # positions.
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position == "rope":
            frequencies, amplitude = rope_frequencies(self.config, spec)
            q, k = rotate((q, k), positions, frequencies, amplitude, ops.materialize)
        return q, k, v


def masks_of(batch: dict[str, Array]) -> Masks:
    """The masks of a batch [B, T] with itself or, where it is decoded, with the keys of a cache [B, S]."""
    positions, segments = batch["positions"], batch["segment_ids"]
    # A batch attends to itself; `kv_positions` are there only where a cache's places are the keys.
    return Masks(
        positions, batch.get("kv_positions", positions), segments, batch.get("kv_segment_ids", segments)
    )


def scores_of(config: ModelConfig, spec: LayerSpec, factor: float = 1.0) -> Scores:
    """The static options of a layer's scores, whose scale is multiplied by `factor`."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return Scores(window=spec.window, softcap=config.attention_softcap, scale=scale * factor)


def name_inputs(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """What attention takes, by names that say to `parallel.schedules` what the backward pass may keep."""
    return (
        checkpoint_name(q, ATTENTION_Q),
        checkpoint_name(k, ATTENTION_K),
        checkpoint_name(v, ATTENTION_V),
    )


def extend_cache(cache: Cache, new: Cache, start: Array, *, axis: int = 1) -> Cache:
    """The cache [B, S, ...] with what is new [B, T, ...] written from position `start` on; S is at `axis`."""
    # One slice for all rows: a batch is decoded in step, so rows have the same length.
    write = jax.lax.dynamic_update_slice_in_dim
    return {name: write(cache[name], new[name].astype(cache[name].dtype), start, axis=axis) for name in new}


def repeat_heads(x: Float[Array, "B S K H"], ops: Ops) -> Float[Array, "B S R H"]:
    """Each K/V head `ops.repeat_kv` times in place, so that query head n still finds its own at n // G."""
    if ops.repeat_kv == 1:
        return ops.constrain(x, ("batch", "length", "act_kv_heads", None))
    # Repeating is exact, and its gradient is the copies' sum: what a single head would have got.
    return ops.constrain(jnp.repeat(x, ops.repeat_kv, axis=2), HEADS)


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    R latent width, N heads, H = nope + rope head size of queries and keys; values have a size of their own.
    Keys (their unrotated part) and values are projections of one normed latent [B, T, R]; the rotated part of
    a key is one for all heads. Decoding caches these two, and projects them again at each step.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.mla is not None
        self.config, self.mla = config, config.mla
        D, N, R = config.d_model, config.num_heads, config.mla.kv_lora_rank
        init, queries = normal(config.init_std), config.mla.q_lora_rank

        def expand(name: str, rows: int, size: int) -> nnx.Param:
            # A latent is split like the stream: `embed` is what is gathered where it is used.
            axes = ("embed", "heads", "head_dim")
            return param(rngs, (rows, N, size), axes, init, project=name, reduction=(0,), output=(1, 2))

        def shrink(name: str, size: int) -> nnx.Param:
            axes = ("embed", None)
            return param(rngs, (D, size), axes, init, project=name, reduction=(0,), output=(1,))

        self.q_down = None if queries is None else shrink("latent", queries)
        norm = partial(Norm, config, axis=None, kind="rmsnorm", rngs=rngs, eps=config.mla.norm_eps)
        self.q_norm = None if queries is None else norm(queries)
        self.q = expand("latent_q", queries or D, config.head_dim)
        self.kv_down = shrink("latent", R)
        self.k_rope = shrink("latent_rope", self.mla.qk_rope_head_dim)
        self.kv_norm = norm(R)
        self.k = expand("latent_kv", R, self.mla.qk_nope_head_dim)
        self.v = expand("latent_kv", R, self.mla.v_head_dim)
        out_axes = ("heads", "head_dim", "embed")
        shape, out_init = (N, self.mla.v_head_dim, D), residual_init(config)
        self.o = param(rngs, shape, out_axes, out_init, project="o", reduction=(0, 1), output=(2,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attend within the batch, or, with a cache of earlier latents, to it and the batch."""
        positions = batch["positions"]
        q, latent, k_rope = self.project(x, positions, spec, ops)
        if cache is not None:
            cache = extend_cache(cache, {"latent": latent, "k_rope": k_rope}, positions[0, 0])
            latent, k_rope = cache["latent"].astype(x.dtype), cache["k_rope"].astype(x.dtype)
        q, k, v = name_inputs(q, *self.expand(latent, k_rope, ops))
        # Only a part of a key is rotated, so that YaRN's factor on both sides is on the score as a whole.
        scores = scores_of(self.config, spec, rope_frequencies(self.config, spec)[1] ** 2)
        mixed = ops.attention(q, k, v, masks_of(batch), scores)
        return ops.project("o", "BTNH,NHD->BTD", mixed, self.o[...]), cache

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], spec: LayerSpec, ops: Ops
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T R"], Float[Array, "B T rope"]]:
        """Queries, the latent of keys and values, and the part of the keys that is rotated."""
        mla = self.mla
        queries = x
        if self.q_down is not None and self.q_norm is not None:
            queries = self.q_norm(ops.project("latent", "BTD,DR->BTR", x, self.q_down[...]))
        q = ops.project("latent_q", "BTR,RNH->BTNH", queries, self.q[...])
        latent = self.kv_norm(ops.project("latent", "BTD,DR->BTR", x, self.kv_down[...]))
        k_rope = ops.project("latent_rope", "BTD,DH->BTH", x, self.k_rope[...])
        frequencies, _ = rope_frequencies(self.config, spec, mla.qk_rope_head_dim)
        turning = (q[..., mla.qk_nope_head_dim :], k_rope[:, :, None])
        q_rope, k_rope = rotate(turning, positions, frequencies, 1.0, ops.materialize)
        q = jnp.concatenate([q[..., : mla.qk_nope_head_dim], q_rope], axis=-1)
        return ops.constrain(q, HEADS), latent, k_rope[:, :, 0]

    def expand(
        self, latent: Float[Array, "B S R"], k_rope: Float[Array, "B S rope"], ops: Ops
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N V"]]:
        """Keys and values of every head."""
        k = ops.project("latent_kv", "BSR,RNH->BSNH", latent, self.k[...])
        v = ops.project("latent_kv", "BSR,RNH->BSNH", latent, self.v[...])
        # One rotated part for all heads: stored once in the cache, spread only for the kernel, which knows
        # plain heads.
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        return ops.constrain(jnp.concatenate([k, shared], axis=-1), HEADS), ops.constrain(v, HEADS)


class FeedForward(nnx.Module):
    """Gated (SwiGLU, GeGLU) or plain (GELU, ReLU²) feed-forward."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs):
        D, F = config.d_model, width
        self.activation = config.activation
        # A gate and what it lets through, side by side in a dim of their own.
        pair: tuple[int, ...] = (2,) if config.gated else ()
        pair_axes: tuple[None, ...] = (None,) if config.gated else ()
        self.up = param(
            rngs,
            (D, *pair, F),
            ("embed", *pair_axes, "mlp"),
            normal(config.init_std),
            project="up",
            reduction=(0,),
            output=(1 + len(pair),),
        )
        down_axes, down_init = ("mlp", "embed"), residual_init(config)
        self.down = param(rngs, (F, D), down_axes, down_init, project="down", reduction=(0,), output=(1,))
        self.up_bias = vector(rngs, (*pair, F), (*pair_axes, "mlp"), zeros) if config.bias else None
        self.down_bias = vector(rngs, (D,), ("embed",), zeros) if config.bias else None

    def __call__(self, x: Float[Array, "B T D"], ops: Ops) -> Float[Array, "B T D"]:
        """The projection up, the activation in float32, and the projection down."""
        # Gate and value in one product, side by side in a dim of their own: one read of x, and a split of F
        # over tensor leaves each device its pairs.
        gated = self.activation in GATES
        spec, axes = ("BTD,DCF->BTCF", (None, "act_mlp")) if gated else ("BTD,DF->BTF", ("act_mlp",))
        hidden = ops.project("up", spec, x, self.up[...])
        hidden = add_bias(hidden, self.up_bias)
        hidden = activate(ops.constrain(hidden, ("batch", "length", *axes)), self.activation)
        hidden = ops.constrain(hidden, ("batch", "length", "act_mlp"))  # and so does its gradient lie
        return add_bias(ops.project("down", "BTF,FD->BTD", hidden, self.down[...]), self.down_bias)


def add_bias(x: Array, bias: nnx.Param | None) -> Array:
    """`x` plus a bias over its last dims, if there is one."""
    return x if bias is None else x + bias[...].astype(x.dtype)


class Mixture(nnx.Module):
    """Experts, of which a token uses a few, and shared ones that it always uses, as one feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.moe is not None
        width = config.moe.num_shared_experts * config.moe.d_expert
        self.experts = Experts(config, residual_init(config), rngs)
        self.shared = FeedForward(config, width, rngs) if width else None

    def __call__(
        self, x: Float[Array, "B T D"], batch: dict[str, Array], ops: Ops, *, decoding: bool
    ) -> tuple[Float[Array, "B T D"], Sums]:
        """The sum of routed and shared experts' outputs, and what the router reports."""
        y, sums = self.experts(x, batch, ops, decoding=decoding)
        return (y if self.shared is None else y + self.shared(x, ops)), sums


class Block(nnx.Module):
    """One decoder layer: attention and feed-forward, each normed before (and, for Gemma, after) and added."""

    def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(config, config.d_model, "embed", config.norm, rngs)

        self.attention_norm, self.mlp_norm = norm(), norm()
        # Module names are parameter paths: initial weights are folded from them, and checkpoints hold them.
        self.attention = Attention(config, rngs) if config.mla is None else LatentAttention(config, rngs)
        self.mlp = Mixture(config, rngs) if moe else FeedForward(config, config.d_ff, rngs)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Sums]:
        """The residual stream after this layer, the cache with its keys and values, what it reports."""
        # Scopes name operations in the compiled program: a profile then shows layers and not fusions.
        with jax.named_scope("attention"):
            mixed, cache = self.attention(self.attention_norm(x), batch, spec, ops, cache)
            x = x + (mixed if self.attention_post_norm is None else self.attention_post_norm(mixed))
        sums: Sums = {}
        with jax.named_scope("mlp"):
            hidden = self.mlp_norm(x)
            if isinstance(self.mlp, Mixture):
                hidden, sums = self.mlp(hidden, batch, ops, decoding=cache is not None)
            else:
                hidden = self.mlp(hidden, ops)
            x = x + (hidden if self.mlp_post_norm is None else self.mlp_post_norm(hidden))
        # Between blocks the stream may be split over more axes than inside (sequence parallelism): norms and
        # sums need no whole rows.
        return ops.constrain(x, RESIDUAL), cache, sums


class Embedding(nnx.Module):
    """Token table, and position table where positions are learned."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init = normal(config.init_std)
        V, D = config.vocab_size, config.d_model
        # Gemma: the table is the head's as well, with elements of about 1/sqrt(D); in the stream they are to
        # be about one.
        self.multiplier = math.sqrt(D) if config.embed_scale else 1.0
        self.table = param(rngs, (V, D), ("vocab", "embed"), init, role="embedding")
        learned = config.position == "learned"
        shape, axes = (config.max_seq_len, D), ("positions", "embed")
        self.positions = param(rngs, shape, axes, init, role="embedding") if learned else None

    def __call__(self, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T D"]:
        """The start of the residual stream, in the compute dtype."""
        # Ids lie within the table by construction: without a bounds check it stays one gather per shard.
        # Whole rows first: looked up in a table split by its width, activations would have to change sides.
        table = ops.constrain(self.table[...], ("act_vocab", None))
        x = table.at[batch["tokens"]].get(mode="promise_in_bounds") * self.multiplier
        if self.positions is not None:
            x = x + self.positions[...].at[batch["positions"]].get(mode="clip")
        # With positions whole, the gradient of a table split over tensor is made where the rows are.
        x = ops.constrain(x.astype(ops.compute_dtype), WHOLE)
        return ops.constrain(x, RESIDUAL)


class Head(nnx.Module):
    """An output table of its own, laid out like the token table, so that tied or not is one code path."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.table = param(rngs, shape, ("vocab", "embed"), normal(config.init_std), role="head")


class MTPBlock(nnx.Module):
    """DeepSeek-V3's multi-token prediction (arXiv:2412.19437, section 2.2): one layer for one token further.

    h' = W [norm(h); norm(embedding of the token that the layer before predicts)], then a decoder layer and a
    final norm of its own; h is what the head read before, so behind a final norm. Table and head are the
    model's own.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(config, config.d_model, "embed", config.norm, rngs)

        D = config.d_model
        self.hidden_norm, self.embed_norm, self.final_norm = norm(), norm(), norm()
        # The pair keeps a dim of its own, as everywhere: nothing sharded is joined or split.
        axes, init = (None, "embed", None), normal(config.init_std)
        self.project = param(rngs, (2, D, D), axes, init, project="further", reduction=(0, 1), output=(2,))
        self.block = Block(config, config.moe is not None, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
    ) -> tuple[Float[Array, "B T D"], Sums]:
        """The residual stream for the next token further, and what the layer reports."""
        project = self.project[...]
        x = ops.project("further", "BTD,DE->BTE", self.hidden_norm(x), project[0])
        x = x + ops.project("further", "BTD,DE->BTE", self.embed_norm(embedded), project[1])
        x, _, sums = self.block(ops.constrain(x, RESIDUAL), batch, spec, ops)
        return x, sums
