"""The parts that every kind of layer is made of. Float32 where it matters: norms, rotations, activations.

B batch, T query position, D model, F feed-forward, V vocabulary; C counts the two of a fused pair (gate and
up).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, ones, zeros
from jaxtyping import Array, Float

from kernels.activations import GATES, activate
from models.config import ModelConfig
from models.ops import Ops
from models.param import param, vector
from models.weights import rows

RESIDUAL = ("batch", "act_length", "act_embed")  # between blocks
WHOLE = ("batch", "length", "act_embed")  # inside them
HEADS = ("batch", "length", "act_heads", None)
Sums = dict[str, Array]


def residual_init(config: ModelConfig) -> Any:
    """Projections back into the residual: spread over sqrt(2L), so that its variance is even over depths."""
    # Each layer then begins as the identity, whatever its depth.
    if config.zero_init:
        return zeros
    return normal(config.init_std / math.sqrt(2 * config.num_layers))


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dims, computed in float32, returned in the input's dtype.

    size, axis: of the dim that is normed; tuples for several at once. factor: on what comes out.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int | tuple[int, ...],
        axis: str | None | tuple[str | None, ...],
        kind: str,
        rngs: nnx.Rngs,
        eps: float | None = None,
        factor: float = 1.0,
    ):
        self.kind, self.offset, self.factor = kind, config.norm_unit_offset, factor
        self.eps = config.norm_eps if eps is None else eps
        shape = size if isinstance(size, tuple) else (size,)
        axes = axis if isinstance(axis, tuple) else (axis,)
        self.over = tuple(range(-len(shape), 0))
        self.scale = vector(rngs, shape, axes, zeros if self.offset else ones)
        has_bias = config.has_bias("norm") and kind == "layernorm"
        self.bias = vector(rngs, shape, axes, zeros) if has_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` normalized over its last dims, then scaled and shifted, in its own dtype."""
        # A mean of squares over thousands of elements: bfloat16 has eight bits for the sum.
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=self.over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=self.over, keepdims=True) + self.eps)
        # Gemma's checkpoints hold scales less one.
        y = y * (1.0 + self.scale[...] if self.offset else self.scale[...])
        if self.bias is not None:
            y = y + self.bias[...]
        if self.factor != 1.0:
            y = y * self.factor
        return y.astype(x.dtype)


class FinalNorm(Norm):
    """The norm before the head, whose output is divided by what the logits are to be divided by."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        # On D numbers a token in float32, and not on V: the chunks of the loss know nothing of it.
        divisor = config.multipliers.logits if config.multipliers else 1.0
        super().__init__(config, config.d_model, "embed", config.norm, rngs, factor=1.0 / divisor)


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
        biased = config.has_bias("mlp")
        self.up_bias = vector(rngs, (*pair, F), (*pair_axes, "mlp"), zeros) if biased else None
        self.down_bias = vector(rngs, (D,), ("embed",), zeros) if biased else None

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


class Embedding(nnx.Module):
    """Token table, and position table where positions are learned."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init = normal(config.init_std)
        V, D = config.vocab_size, config.d_model
        # Gemma: the table is the head's as well, with elements of about 1/sqrt(D); in the stream they are to
        # be about one.
        self.multiplier = math.sqrt(D) if config.embed_scale else 1.0
        if config.multipliers is not None:
            self.multiplier *= config.multipliers.embedding
        self.table = param(rngs, (V, D), ("vocab", "embed"), init, role="embedding")
        learned = config.position == "learned"
        shape, axes = (config.max_seq_len, D), ("positions", "embed")
        self.positions = param(rngs, shape, axes, init, role="embedding") if learned else None

    def __call__(self, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T D"]:
        """The start of the residual stream, in the compute dtype."""
        # Ids lie within the table by construction: without a bounds check it stays one gather per shard.
        # Whole rows first: looked up in a table split by its width, activations would have to change sides.
        # Of a quantized one levels and scales are both by rows, and rows are dequantized behind the lookup.
        table = jax.tree.map(lambda part: ops.constrain(part, ("act_vocab", None)), self.table[...])
        x = rows(table, batch["tokens"], "promise_in_bounds") * self.multiplier
        if self.positions is not None:
            x = x + rows(self.positions[...], batch["positions"], "clip")
        # With positions whole, the gradient of a table split over tensor is made where the rows are.
        x = ops.constrain(x.astype(ops.compute_dtype), WHOLE)
        return ops.constrain(x, RESIDUAL)


class Head(nnx.Module):
    """An output table of its own, laid out like the token table, so that tied or not is one code path."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.table = param(rngs, shape, ("vocab", "embed"), normal(config.init_std), role="head")
