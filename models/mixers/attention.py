"""Causal self-attention with shared key/value heads; the kernel itself is `ops.attention`.

B batch, T query position, S key position, D model, N query heads, K key/value heads, H head size; C counts
the two of a fused pair (key and value).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Float, Int, Num

from kernels.attention import Masks, Scores
from kernels.names import ATTENTION_K, ATTENTION_Q, ATTENTION_V
from models.config import ModelConfig
from models.layers import HEADS, Norm, add_bias, residual_init
from models.mixer import Activations, Cache, CacheArray, Dim, Mixer, extend_cache, vectors
from models.ops import Ops
from models.param import param, vector
from models.rope import rope_frequencies, rotate
from models.spec import LayerSpec


class Attention(Mixer):
    """Attention of N query heads to K heads of keys and values, each for N/K of them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        init = normal(config.init_std)
        # As wide as the queries; named apart, so that each may be kept in full precision by itself.
        query = partial(
            param,
            *(rngs, (D, N, H), ("embed", "heads", "head_dim"), init),
            reduction=(0,),
            output=(1, 2),
        )
        self.q = query(project="q")
        self.gate = query(project="gate") if config.output_gate else None
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
        biased = config.has_bias("qkv")
        self.q_bias = vector(rngs, (N, H), ("heads", "head_dim"), zeros) if biased else None
        self.kv_bias = vector(rngs, (2, K, H), kv_axes, zeros) if biased else None
        self.o_bias = vector(rngs, (D,), ("embed",), zeros) if config.has_bias("o") else None

        # At zero it weighs as much as a key whose score is zero.
        self.sinks = vector(rngs, (N,), ("heads",), zeros) if config.attention_sinks else None

        def norm(heads: int, axis: str) -> Norm:
            size, axes = ((heads, H), (axis, "head_dim")) if config.qk_norm == "joint" else (H, "head_dim")
            return Norm(config, size, axes, "rmsnorm", rngs)

        self.q_norm = norm(N, "heads") if config.qk_norm else None
        self.k_norm = norm(K, "kv_heads") if config.qk_norm else None

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
            arrays = self.cache_arrays(self.config, spec, batch["kv_positions"].shape[1])
            new = {"k": k.transpose(0, 2, 3, 1), "v": v.swapaxes(1, 2)}
            cache = extend_cache(cache, new, arrays, batch, ops)
            k, v = (vectors(cache, name, arrays[name], batch, ops) for name in ("k", "v"))
            # Of eight bits levels and scales alike.
            k = jax.tree.map(lambda x: x.transpose(0, 3, 1, 2), k)
            v = jax.tree.map(lambda x: x.swapaxes(1, 2), v)
        # Behind the cache, which holds each head once.
        k, v = jax.tree.map(partial(repeat_heads, ops=ops), (k, v))
        # Named behind bias, norm and rotation, so that a policy that keeps them makes none of these again.
        q, k, v = name_inputs(q, k, v)
        sinks = () if self.sinks is None else (self.sinks[...],)
        mixed = ops.attention(q, k, v, masks_of(batch), scores_of(self.config, spec), *sinks)
        if self.gate is not None:
            # A head may say nothing at a position, which a softmax alone cannot.
            gate = ops.constrain(ops.project("gate", "BTD,DNH->BTNH", x, self.gate[...]), HEADS)
            mixed = mixed * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(mixed.dtype)
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
        if self.config.position == "rope" and spec.rope:
            q, k = self.rotate(q, k, positions, spec, ops)
        return q, k, v

    def rotate(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        spec: LayerSpec,
        ops: Ops,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
        """Queries and keys with the first share of each head turned by its position."""
        turning = round(self.config.head_dim * self.config.rope_fraction)
        frequencies, amplitude = rope_frequencies(self.config, spec, turning)
        if turning == self.config.head_dim:
            q, k = rotate((q, k), positions, frequencies, amplitude, ops.materialize)
            return q, k
        parts = (q[..., :turning], k[..., :turning])
        q_first, k_first = rotate(parts, positions, frequencies, amplitude, ops.materialize)
        q = jnp.concatenate([q_first, q[..., turning:]], axis=-1)
        return q, jnp.concatenate([k_first, k[..., turning:]], axis=-1)

    @staticmethod
    def cache_arrays(config: ModelConfig, spec: LayerSpec, length: int) -> dict[str, CacheArray]:
        """Keys [B, K, H, length] and values [B, K, length, H], as the products of attention read them."""
        # In any other order each new token would cost a copy of the whole cache.
        K, H = config.num_kv_heads, config.head_dim
        return {
            "k": CacheArray((K, H, length), ("act_kv_heads", None, "length")),
            "v": CacheArray((K, length, H), ("act_kv_heads", "length", None)),
        }

    @staticmethod
    def flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> tuple[float, float]:
        """Of scores and values over all positions that the window allows, and over those of the past."""
        return attention_flops(2 * config.head_dim, config, spec, seq_len)

    @staticmethod
    def activations(config: ModelConfig) -> Activations:
        """Queries (and, as large, the output), keys and values, the softmax's statistics and its scores."""
        return attention_activations(config, config.head_dim)

    @staticmethod
    def dims(config: ModelConfig) -> tuple[Dim, ...]:
        """Heads and their size."""
        return attention_dims(config)


def attention_flops(sizes: int, config: ModelConfig, spec: LayerSpec, seq_len: int) -> tuple[float, float]:
    """Operations a token of attention whose key and value heads have `sizes` numbers: full and causal."""
    per_key = 2 * config.num_heads * sizes
    # A window's first queries see fewer keys: the triangle at a row's begin, seen² / 2 of seen * T.
    seen = min(seq_len, spec.window or seq_len)
    return per_key * seen, per_key * (seen - seen * seen / (2 * seq_len))


def attention_activations(config: ModelConfig, value_dim: int) -> Activations:
    """Of attention with these values: queries and output have the mean of both sizes."""
    both, heads = config.head_dim + value_dim, config.num_heads
    queries, keys_values = heads * both / 2, config.num_kv_heads * both
    products = queries + keys_values + (queries if config.output_gate else 0)
    return Activations(queries, keys_values, queries, products, statistics=heads, squares=heads)


def attention_dims(config: ModelConfig) -> tuple[Dim, ...]:
    """What splits attention's tensors, by the config keys that say how large they are."""
    return (
        Dim("model.num_heads", config.num_heads, ("heads", "act_heads")),
        Dim("model.num_kv_heads", config.num_kv_heads, ("kv_heads", "act_kv_heads")),
        Dim("model.head_dim", config.head_dim, ("head_dim",)),
    )


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


def repeat_heads(x: Num[Array, "B S K H"], ops: Ops) -> Num[Array, "B S R H"]:
    """Each K/V head `ops.repeat_kv` times in place, so that query head n still finds its own at n // G."""
    if ops.repeat_kv == 1:
        return ops.constrain(x, ("batch", "length", "act_kv_heads", None))
    # Repeating is exact, and its gradient is the copies' sum: what a single head would have got.
    return ops.constrain(jnp.repeat(x, ops.repeat_kv, axis=2), HEADS)


MIXER = Attention
