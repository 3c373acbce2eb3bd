"""The operations a model does not choose itself: training injects them, so models see no mesh, no kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from kernels.attention import reference_attention
from kernels.einsum import Projector
from kernels.grouped_experts import run_experts
from kernels.names import LOGICAL_AXES


def identity_constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """`x` itself: on one device an array is where it is."""
    # Checked on one device as well, where most tests run.
    assert len(axes) == x.ndim, (axes, x.shape)
    assert {*axes} <= {None, *LOGICAL_AXES}, axes
    return x


@dataclass(frozen=True)
class Ops:
    """What training decides; the default is one device in float32.

    attention: `(q [B,T,N,H], k [B,S,K,H], v [B,S,K,V], Masks, Scores) -> [B,T,N,V]`; `Scores` are static. A
    model with sinks gives these [N] last.
    experts: as `kernels.grouped_experts.run_experts`: tokens to their experts and back.
    project: `(name, spec, activation, weight) -> activation dtype`, accumulating in float32; names are those
    of `kernels.names`.
    contract_last: `(x [.., K], table [N, K]) -> [.., N]` in float32: logits; None: an einsum.
    contract_rows: `(x [M, K], y [M, N]) -> x^T y [K, N]` in float32, for the head's gradient by its table
    where one device holds all rows; None: an einsum.
    factor_dtype: what the factors of the head's products are rounded to; None: the compute dtype.
    materialize: `x -> x`, for what many read and is dear to make: held as an array where a compiler would
    make it anew for each of them.
    constrain: `(x, logical axes, one a dim) -> x`.
    loss_chunk: tokens whose logits exist at once. parts: devices that rows and positions are split over.
    z_loss: weight of log²(sum exp logits).
    repeat_kv: copies of each K/V head in the activations, so that `tensor` > num_kv_heads divides them.
    cache_bits: of a number that decoding keeps of a token; None: as the compute dtype has it.
    """

    # The defaults are the definitions, in float32: what every faster form is tested against.
    attention: Callable[..., Array] = reference_attention
    experts: Callable[..., tuple[Array, Array]] = run_experts
    project: Callable[[str, str, Array, Array], Array] = Projector()
    contract_last: Callable[[Array, Array], Array] | None = None
    contract_rows: Callable[[Array, Array], Array] | None = None
    factor_dtype: Any = None
    materialize: Callable[[Array], Array] = lambda x: x
    constrain: Callable[[Array, tuple[str | None, ...]], Array] = identity_constrain
    compute_dtype: Any = jnp.float32
    loss_chunk: int = 512
    parts: tuple[int, int] = (1, 1)
    z_loss: float = 0.0
    repeat_kv: int = 1
    cache_bits: int | None = None
