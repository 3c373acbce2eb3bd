"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one small latent.

B batch, T query position, S key position, D model, N heads, R latent, H head size of queries and keys.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from kernels.int8_vectors import Int8Vectors
from models.config import MLAConfig, ModelConfig
from models.layers import HEADS, Norm, residual_init
from models.mixer import Activations, Cache, CacheArray, Dim, Mixer, extend_cache, vectors
from models.mixers.attention import (
    attention_activations,
    attention_dims,
    attention_flops,
    masks_of,
    name_inputs,
    scores_of,
)
from models.ops import Ops
from models.param import param
from models.rope import rope_frequencies, rotate
from models.spec import LayerSpec


class LatentAttention(Mixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    R latent width, N heads, H = nope + rope head size of queries and keys; values have a size of their own.
    Keys (their unrotated part) and values are projections of one normed latent [B, T, R]; the rotated part of
    a key is one for all heads. Decoding caches these two side by side, and never expands them: `absorb`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.mla = config, sizes_of(config)
        D, N, R = config.d_model, config.num_heads, self.mla.kv_lora_rank
        init, queries = normal(config.init_std), self.mla.q_lora_rank

        def expand(name: str, rows: int, size: int) -> nnx.Param:
            # A latent is split like the stream: `embed` is what is gathered where it is used.
            axes = ("embed", "heads", "head_dim")
            return param(rngs, (rows, N, size), axes, init, project=name, reduction=(0,), output=(1, 2))

        def shrink(name: str, size: int) -> nnx.Param:
            axes = ("embed", None)
            return param(rngs, (D, size), axes, init, project=name, reduction=(0,), output=(1,))

        self.q_down = None if queries is None else shrink("latent", queries)
        norm = partial(Norm, config, axis=None, kind="rmsnorm", rngs=rngs, eps=self.mla.norm_eps)
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
        # Only a part of a key is rotated, so that YaRN's factor on both sides is on the score as a whole; one
        # that is given is on the waves, as files mean it.
        given = self.config.rope_scaling is not None and self.config.rope_scaling.attention_factor
        scores = scores_of(self.config, spec, 1.0 if given else rope_frequencies(self.config, spec)[1] ** 2)
        masks = masks_of(batch)

        def attend(q: Array, k: Array, v: Array) -> Array:
            return ops.attention(q, k, v, masks, scores)

        if cache is not None:
            arrays = self.cache_arrays(self.config, spec, batch["kv_positions"].shape[1])
            joined = jnp.concatenate([latent, k_rope], axis=-1)
            cache = extend_cache(cache, {"latent": joined}, arrays, batch, ops)
            joined = vectors(cache, "latent", arrays["latent"], batch, ops)
            if not isinstance(joined, Int8Vectors):
                latent, k_rope = jnp.split(joined, [latent.shape[-1]], axis=-1)
        if cache is not None and (x.shape[1] == 1 or "pages" in batch):  # of all pages nothing is expanded
            mixed = self.absorb(q, joined, attend, ops)
        else:
            # The many queries of a prompt share what is expanded: less work than in a latent's width each.
            mixed = attend(*name_inputs(q, *self.expand(latent, k_rope, ops)))
        return ops.project("o", "BTNH,NHD->BTD", mixed, self.o[...]), cache

    def absorb(
        self,
        q: Float[Array, "B T N H"],
        cache: Float[Array, "B S W"] | Int8Vectors,
        attend: Callable[..., Array],
        ops: Ops,
    ) -> Float[Array, "B T N V"]:
        """Attention to the latents themselves, one key and value for all heads: the sums in another order.

        cache: of W = R + rope. q·(W_k c) = (W_k^T q)·c, and the mean of W_v c is W_v of the mean: nothing of
        [B, S, N, H] is made.
        """
        nope = self.mla.qk_nope_head_dim
        inner = jnp.einsum("BTNH,RNH->BTNR", q[..., :nope], self.k[...].astype(q.dtype))
        q = ops.constrain(jnp.concatenate([inner, q[..., nope:]], axis=-1), HEADS)
        shared = jax.tree.map(lambda x: x[:, :, None], cache)
        # Rotated parts are mixed as well and cut off again: a slice of the cache would be a copy of it.
        mixed = attend(q, shared, shared)[..., : self.mla.kv_lora_rank]
        return ops.constrain(jnp.einsum("BTNR,RNH->BTNH", mixed, self.v[...].astype(q.dtype)), HEADS)

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
        frequencies, factor = rope_frequencies(self.config, spec, mla.qk_rope_head_dim)
        own = self.config.rope_scaling is None or self.config.rope_scaling.attention_factor is None
        turning = (q[..., mla.qk_nope_head_dim :], k_rope[:, :, None])
        q_rope, k_rope = rotate(turning, positions, frequencies, 1.0 if own else factor, ops.materialize)
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

    @staticmethod
    def cache_arrays(config: ModelConfig, spec: LayerSpec, length: int) -> dict[str, CacheArray]:
        """The normed latent and behind it the keys' rotated part, [B, length, R + rope].

        What keys and values are made of, instead of their 2 * N * H numbers a token.
        """
        mla = sizes_of(config)
        # The rotated part passes no norm, and may be far larger: in eight bits each has a scale of its own.
        parts = mla.kv_lora_rank, mla.qk_rope_head_dim
        return {"latent": CacheArray((length, sum(parts)), ("length", None), parts=parts)}

    @staticmethod
    def flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> tuple[float, float]:
        """Of scores and values over all positions that the window allows, and over those of the past."""
        return attention_flops(config.head_dim + sizes_of(config).v_head_dim, config, spec, seq_len)

    @staticmethod
    def activations(config: ModelConfig) -> Activations:
        """As of attention whose keys and values every head has for itself."""
        return attention_activations(config, sizes_of(config).v_head_dim)

    @staticmethod
    def dims(config: ModelConfig) -> tuple[Dim, ...]:
        """Heads, and the latents, which are gathered like the stream."""
        mla = sizes_of(config)
        return (
            *attention_dims(config),
            Dim("model.mla.kv_lora_rank", mla.kv_lora_rank, ("embed",)),
            Dim("model.mla.q_lora_rank", mla.q_lora_rank or config.d_model, ("embed",)),
            Dim("model.mla.qk_nope_head_dim", mla.qk_nope_head_dim, ("head_dim",)),
            Dim("model.mla.v_head_dim", mla.v_head_dim, ("head_dim",)),
        )


def sizes_of(config: ModelConfig) -> MLAConfig:
    """The sizes of latent attention, which a model with such layers has."""
    assert config.mla is not None
    return config.mla


MIXER = LatentAttention
