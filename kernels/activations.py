"""What a feed-forward does between its projections, elementwise and in float32.

F feed-forward; gated ones have a pair (gate, up) in the dim before it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STEEP, LIMIT = 1.702, 7.0  # of clamped_swiglu (GPT-OSS): the sigmoid's slope, and what bounds its inputs
GATES = {  # GELU by tanh, as GPT-2 and Gemma were trained
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "clamped_swiglu": lambda gate: gate * jax.nn.sigmoid(STEEP * gate),
}


def activate(x: Float[Array, "*rows F"], activation: str) -> Float[Array, "*out F"]:
    """In float32: [..., 2, F] (gate, up) to [..., F] where gated, else [..., F] to itself."""
    # Rounded once, at the end: in bfloat16 the gate and its product would each be rounded.
    y = x.astype(jnp.float32)
    if activation == "clamped_swiglu":
        y = jnp.stack([jnp.minimum(y[..., 0, :], LIMIT), jnp.clip(y[..., 1, :], -LIMIT, LIMIT) + 1], axis=-2)
    if activation in GATES:
        y = GATES[activation](y[..., 0, :]) * y[..., 1, :]
    elif activation == "relu2":
        y = jnp.square(jax.nn.relu(y))
    else:
        y = jax.nn.gelu(y)
    return y.astype(x.dtype)
