"""The gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464): attention that is a recurrence.

A head has a state S [H, V], float32, instead of a cache that grows. With unit keys k, gates beta in (0, 1)
and decays a = exp(g), g <= 0, token t takes out what its key finds, and writes what it has to say instead:

    S_t = a_t S_{t-1} + k_t u_t',   u_t = beta_t (v_t - a_t S_{t-1}' k_t),   o_t = S_t' q_t

In training a row is cut into chunks, within which u is the solution of a triangular system (the WY form of
Yang et al. 2024, arXiv:2406.06484), so that all but the state's way from chunk to chunk is products of
matrices; a chunk of one token is the recurrence, which decoding is. The short convolution before it, the norm
with a gate behind it and the parametrization of decays are those of Qwen3-Next.

B batch, T position, D model, K key heads, G value heads to each, N = K G value heads, H and V head sizes of
keys and values, n chunks of C positions, J width of the convolution; X counts a pair (q and k, beta and a).
"""

import math
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, ones
from jaxtyping import Array, Bool, Float, Int

from models.config import DeltaConfig, ModelConfig
from models.layers import residual_init
from models.mixer import Activations, Cache, CacheArray, Dim, Mixer
from models.mixers.attention import name_inputs
from models.ops import Ops
from models.param import param, vector
from models.spec import LayerSpec

EPS = 1e-6  # beside the squared length of a query or key
DECAYS = (1e-4, 16.0)  # exp(A) at the beginning, uniform
STEPS = (1e-3, 0.1)  # softplus(dt) at the beginning, uniform in its logarithm (Mamba-2, arXiv:2405.21060)
F32 = jnp.float32


class GatedDelta(Mixer):
    """N heads of the gated delta rule; G of them share queries and keys."""

    # The state goes through a row from its first position to its last.
    whole_rows: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.delta = config, sizes_of(config)
        D, d = config.d_model, self.delta
        K, N, H, V = d.num_key_heads, d.num_value_heads, d.key_head_dim, d.value_head_dim
        init, keys, values = normal(config.init_std), ("heads", "head_dim"), (N, V)
        project = partial(param, rngs, init=init, reduction=(0,))
        self.qk = project((D, 2, K, H), ("embed", None, *keys), project="delta_qk", output=(2, 3))
        self.v = project((D, *values), ("embed", *keys), project="delta_v", output=(1, 2))
        self.z = project((D, *values), ("embed", *keys), project="delta_z", output=(1, 2))
        self.ba = project((D, 2, N), ("embed", None, "heads"), project="delta_ba", output=(2,))
        # A filter a channel, of the last J tokens: added up and never contracted, so no matrix.
        taps = normal(1 / math.sqrt(d.conv_width))
        self.qk_conv = vector(rngs, (d.conv_width, 2, K, H), (None, None, *keys), taps)
        self.v_conv = vector(rngs, (d.conv_width, *values), (None, *keys), taps)
        self.decay = vector(rngs, (N,), ("heads",), init_decay)
        self.step = vector(rngs, (N,), ("heads",), init_step)
        # Not one of the stream's norms: a scale as it is, whatever `norm_unit_offset` says of those.
        self.norm = vector(rngs, (V,), ("head_dim",), ones)
        out_axes, out_init = (*keys, "embed"), residual_init(config)
        self.o = param(rngs, (N, V, D), out_axes, out_init, project="o", reduction=(0, 1), output=(2,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The rule over each document of the rows, or over what follows the cache's tokens."""
        real = batch["segment_ids"] > 0
        # Padding has the number of the document before it, and neither writes nor decays: whatever stands
        # behind it in a row, the state that is left is that of the last token that counts.
        segments = jax.lax.cummax(batch["segment_ids"], axis=1)
        if cache is not None:
            # A row that begins anew begins with nothing, whoever had its place in the cache before; one that
            # has no token here keeps what it has.
            begins = (batch["positions"][:, 0] == 0) & real[:, 0]
            cache = {n: jnp.where(begins.reshape(-1, *[1] * (c.ndim - 1)), 0, c) for n, c in cache.items()}
        q, k, v, filled = self.project(x, real, segments, ops, cache)
        q, k, v = name_inputs(q, k, v)
        beta, g = self.rates(x, real, ops)
        state = None if cache is None else cache["state"]
        out, state = delta_rule(q, k, v, beta, g, segments, state, chunk=self.delta.chunk)
        out = self.gate(ops.constrain(out, ("batch", "length", "act_heads", None)), x, ops)
        if cache is not None:
            arrays, new = self.cache_arrays(self.config, spec, 0), {"state": state, **filled}
            # As they were, whatever the batch is computed in: a loop over tokens hands them on.
            cache = {n: arrays[n].placed(x.astype(cache[n].dtype), ops) for n, x in new.items()}
        return ops.project("o", "BTNH,NHD->BTD", out, self.o[...]), cache

    def project(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        segments: Array,
        ops: Ops,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Float[Array, "B T N V"], Cache]:
        """Queries, keys and values behind their convolutions, and what these have to remember."""
        heads = ("act_heads", None)
        qk = ops.project("delta_qk", "BTD,DXKH->BTXKH", x, self.qk[...])
        v = ops.project("delta_v", "BTD,DNH->BTNH", x, self.v[...])
        qk = ops.constrain(qk, ("batch", "length", None, *heads))
        v = ops.constrain(v, ("batch", "length", *heads))
        before = (None, None) if cache is None else (cache["qk"], cache["v"])
        qk, last_qk = short_convolution(qk, self.qk_conv[...], segments, real, before[0])
        v, last_v = short_convolution(v, self.v_conv[...], segments, real, before[1])
        return qk[:, :, 0], qk[:, :, 1], v, {"qk": last_qk, "v": last_v}

    def rates(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], ops: Ops
    ) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
        """How much each token writes, and the logarithm of what it leaves of the state; float32."""
        ba = ops.project("delta_ba", "BTD,DXN->BTXN", x, self.ba[...]).astype(F32)
        ba = ops.constrain(ba, ("batch", "length", None, "act_heads"))
        # In float32: decays of a document multiply, and an error in the exponent would with them.
        g = -jnp.exp(self.decay[...]) * jax.nn.softplus(ba[:, :, 1] + self.step[...])
        beta = jax.nn.sigmoid(ba[:, :, 0])
        return jnp.where(real[..., None], beta, 0.0), jnp.where(real[..., None], g, 0.0)

    def gate(
        self, out: Float[Array, "B T N V"], x: Float[Array, "B T D"], ops: Ops
    ) -> Float[Array, "B T N V"]:
        """Each head's output normed and multiplied by SiLU of its gate."""
        z = ops.project("delta_z", "BTD,DNH->BTNH", x, self.z[...])
        y = out * jax.lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + self.config.norm_eps)
        return (y * self.norm[...] * jax.nn.silu(z.astype(F32))).astype(x.dtype)

    @staticmethod
    def cache_arrays(config: ModelConfig, spec: LayerSpec, length: int) -> dict[str, CacheArray]:
        """The state, and the inputs of the convolutions at the last J - 1 tokens: as large at any length."""
        d = sizes_of(config)
        K, N, H, V = d.num_key_heads, d.num_value_heads, d.key_head_dim, d.value_head_dim
        last, heads = d.conv_width - 1, ("act_heads", None)
        return {
            "state": CacheArray((N, H, V), (*heads, None), F32),
            "qk": CacheArray((last, 2, K, H), (None, None, *heads)),
            "v": CacheArray((last, N, V), (None, *heads)),
        }

    @staticmethod
    def flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> tuple[float, float]:
        """Of the state's products and those within a chunk, its triangular system solved by substitution."""
        d = sizes_of(config)
        K, N, H, V, C = d.num_key_heads, d.num_value_heads, d.key_head_dim, d.value_head_dim, d.chunk
        inside = N * C * (6 * H + 4 * V + C)
        channels = 2 * K * H + N * V
        flops = float(6 * N * H * V + inside + 2 * d.conv_width * channels)
        return flops, flops

    @staticmethod
    def activations(config: ModelConfig) -> Activations:
        """Queries, keys and values; the products they come from; in float32 what a chunk is made of."""
        d = sizes_of(config)
        K, N, H, V, C = d.num_key_heads, d.num_value_heads, d.key_head_dim, d.value_head_dim, d.chunk
        inputs = 2 * K * H + N * V
        chunk = N * (3 * H + 3 * V + 4 * C + H * V / C)
        return Activations(inputs, 0.0, output=0.0, products=inputs + N * V + 2 * N, inside=chunk)

    @staticmethod
    def dims(config: ModelConfig) -> tuple[Dim, ...]:
        """Both kinds of heads, split alike: each device has the keys of its values."""
        d = sizes_of(config)
        return (
            Dim("model.delta.num_key_heads", d.num_key_heads, ("heads", "act_heads")),
            Dim("model.delta.num_value_heads", d.num_value_heads, ("heads", "act_heads")),
            Dim("model.delta.key_head_dim", d.key_head_dim, ("head_dim",)),
            Dim("model.delta.value_head_dim", d.value_head_dim, ("head_dim",)),
        )


def sizes_of(config: ModelConfig) -> DeltaConfig:
    """The sizes of the rule, which a model with such layers has."""
    assert config.delta is not None
    return config.delta


def init_decay(key: Array, shape: tuple[int, ...], dtype: type) -> Array:
    """Logarithms of uniform decay rates."""
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAYS))


def init_step(key: Array, shape: tuple[int, ...], dtype: type) -> Array:
    """Of what softplus makes a step, uniform in its logarithm: heads remember for all kinds of lengths."""
    low, high = (math.log(step) for step in STEPS)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def short_convolution(
    x: Float[Array, "B T ..."],
    filters: Float[Array, "width ..."],
    segments: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    before: Float[Array, "B last ..."] | None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B last ..."]]:
    """SiLU of each channel's last J inputs in its document, weighed; and the last J - 1 inputs of each row.

    before: those of the tokens before the first, by default none.
    """
    last, (rows, length) = filters.shape[0] - 1, x.shape[:2]
    if before is None:
        before = jnp.zeros((rows, last, *x.shape[2:]), x.dtype)
    inputs = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    # What came before belongs to the first document here: only a cache brings any.
    owners = jnp.concatenate([jnp.broadcast_to(segments[:, :1], (rows, last)), segments], axis=1)
    y = jnp.zeros(x.shape, F32)
    for j in range(last + 1):
        # Sums of shifted rows and no convolution: what another document had is left out of each by itself.
        same = owners[:, j : j + length] == segments
        tap = inputs[:, j : j + length] * filters[j].astype(x.dtype)
        y = y + jnp.where(same.reshape(rows, length, *[1] * (x.ndim - 2)), tap, 0)
    # Padding stands behind a row's tokens, whose number says where the last of them are.
    places = jnp.sum(real, axis=1)[:, None] + jnp.arange(last)
    kept = jnp.take_along_axis(inputs, places.reshape(rows, last, *[1] * (x.ndim - 2)), axis=1)
    return jax.nn.silu(y).astype(x.dtype), kept


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"],
    g: Float[Array, "B T N"],
    segments: Int[Array, "B T"],
    state: Float[Array, "B N H V"] | None = None,
    *,
    chunk: int,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """The outputs of the module's recurrence and the last state, float32; queries and keys are made unit.

    state: that before the first position, of the first one's document; None: zeros. A document begins with a
    state of zeros. chunk: a power of two, positions that are computed at once; no number depends on it but by
    rounding.
    """
    (B, T, K, H), (N, V) = q.shape, v.shape[2:]
    C = min(chunk, 1 << (T - 1).bit_length())
    # Behind the end nothing is written and nothing decays, as on padding.
    rest = -T % C
    n = (T + rest) // C

    def cut(x: Array) -> Array:
        """[B, T, N, ...] as chunks [n, B, N, C, ...]."""
        x = jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, n, C, *x.shape[2:]), (1, 2), (0, 3))

    # As exact as the inputs: float32 throughout where these are, and on a GPU or TPU fast where they are not.
    dot = partial(jnp.einsum, preferred_element_type=F32, precision="highest" if q.dtype == F32 else None)
    # Each key head for its G value heads. One product for all of them would be less work, but with the two
    # kinds of heads as dims of their own XLA:CPU (JAX 0.10) crashes in the gradient on more than one device.
    q, k = (cut(jnp.repeat(x, N // K, axis=2)) for x in (unit(q) * H**-0.5, unit(k)))
    v, beta, g = cut(v).astype(F32), cut(beta), jnp.cumsum(cut(g), axis=-1)
    owner = jnp.pad(segments, [(0, 0), (0, rest)], mode="edge").reshape(B, n, 1, C).swapaxes(0, 1)
    # Decay from one position to a later one of the same document; within it g adds up, and across a border
    # nothing is left. Masked in the exponent: above the diagonal its exponential might overflow.
    past = jnp.tril(jnp.ones((C, C), bool)) & (owner[..., :, None] == owner[..., None, :])
    decays = jnp.exp(jnp.where(past, g[..., :, None] - g[..., None, :], -jnp.inf))
    system = beta[..., None] * jnp.tril(decays, -1) * dot("nbmch,nbmsh->nbmcs", k, k)
    solved = unit_triangular_inverse(system) * beta[..., None, :]
    # u = values - reading S, with S the state before the chunk.
    values = dot("nbmcs,nbmsv->nbmcv", solved, v)
    # The state before the chunk is of the document that the chunk before it ended with.
    before = jnp.concatenate([owner[:1, ..., :1], owner[:-1, ..., -1:]])
    fading = jnp.where(owner == before, jnp.exp(g), 0.0)
    reading = dot("nbmcs,nbmsh->nbmch", solved * fading[..., None, :], k)
    scores = dot("nbmch,nbmsh->nbmcs", q, k) * decays
    # What of each position is left at the chunk's end, and what of the state before it.
    writing, left = decays[..., -1, :], fading[..., -1]

    def step(state: Array, item: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, values, reading, scores, fading, writing, left = item
        u = values - dot("bmch,bmhv->bmcv", reading, state)
        out = fading[..., None] * dot("bmch,bmhv->bmcv", q, state) + dot("bmcs,bmsv->bmcv", scores, u)
        written = dot("bmch,bmcv->bmhv", k, writing[..., None] * u)
        return left[..., None, None] * state + written, out

    first = jnp.zeros((B, N, H, V), F32) if state is None else state
    final, out = jax.lax.scan(step, first, (q, k, values, reading, scores, fading, writing, left))
    # [n, B, N, C, V] to [B, T, N, V].
    out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, n * C, N, V)
    return out[:, :T], final


def unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """`x` made one long, in float32, returned in its own dtype."""
    y = x.astype(F32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + EPS)).astype(x.dtype)


@jax.custom_vjp
def unit_triangular_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """(I + a)^-1 of a strictly lower triangular `a`, by halves; C is a power of two.

    The inverse of [[P, 0], [L, Q]] is [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]], so blocks of one give those of two,
    and so on: as stable as substitution, where a series of powers of `a` cancels what is as large as a
    binomial when keys are alike. All products, no loop over rows.
    """
    size = a.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    width = 1
    while width < size:
        # The lower left quarter of each block on the diagonal of twice the width.
        quarter = (row // (2 * width) == column // (2 * width)) & (row // width != column // width)
        lower = jnp.where(quarter, a, 0)
        inverse = inverse - _product(_product(inverse, lower), inverse)
        width *= 2
    return inverse


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")


def _inverse_forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_triangular_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse: Array, dy: Array) -> tuple[Array]:
    # d (I + a)^-1 = -(I + a)^-1 da (I + a)^-1: nothing of the way there is kept.
    turned = inverse.mT
    return (-jnp.tril(_product(_product(turned, dy), turned), -1),)


unit_triangular_inverse.defvjp(_inverse_forward, _inverse_backward)

MIXER = GatedDelta
