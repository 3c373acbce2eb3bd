"""Cross-entropy and log-probabilities over chunks of tokens, so that [B*T, V] logits never exist.

B batch, T position, D model, V vocabulary, K targets of a position; R and P parts of rows and positions on
different devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention import largest_divisor

LOGIT_AXES = ("batch", "length", "act_vocab")
# Each group of devices adds up its own gradient of the table over all chunks, and they meet once, at the end:
# an all-reduce of [V, D] for every chunk would dwarf the products.
PARTIAL = ("batch", "length", "act_vocab", None)  # a gradient of the table for each group of devices


@dataclass(frozen=True)
class LossSpec:
    """Static options of the loss: positions in a chunk, parts of rows and positions, caps and weights."""

    size: int
    parts: tuple[int, int]
    softcap: float | None
    z_loss: float
    constrain: Callable[[Array, tuple[str | None, ...]], Array]
    contract_rows: Callable[[Array, Array], Array] | None
    dtype: Any


def chunked_cross_entropy(
    x: Float[Array, "B T D"],
    w: Float[Array, "V D"],
    targets: Int[Array, "B T *K"],
    weights: Float[Array, "B T *K"],
    counts: Float[Array, "B T"] | None = None,
    *,
    chunk: int,
    parts: tuple[int, int] = (1, 1),
    softcap: float | None = None,
    z_loss: float = 0.0,
    constrain: Callable[[Array, tuple[str | None, ...]], Array] = lambda x, axes: x,
    contract_rows: Callable[[Array, Array], Array] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of next-token losses in nats, and its parts `nll` and `z_loss` (sums, without gradient).

    x: final hidden states, in the compute dtype; w: output table; products are of both rounded to `dtype`, by
    default x's; targets, weights: what is predicted and how much it counts. With logits l = cap(x·w), the
    loss of a token is -log softmax(l)[target] + z_loss * log²(sum exp l).
    With K targets a position, each with its weight, the first term is the sum over them: a distribution given
    by its K likeliest tokens (distillation), whose cross-entropy is the divergence but for its own entropy.
    Weights may have a sign: those that are -df/dlogp give the gradient of any f of the log-probabilities.
    What z-loss counts by has none: `counts`, by default the weights.
    About `chunk` of the B*T tokens have logits at once: each chunk is `chunk // B` positions of every row,
    lowered to a divisor of T. `parts` are the numbers of devices that B and T are split over: each device has
    an equal share of every chunk, at least one position, and adds up its own losses and dw until the end.
    When differentiated, the forward pass makes dx and dw chunk by chunk while the logits are there, so that
    backward is a scale: three matmuls, no recompute. No gradient goes to `weights`.
    `contract_rows`: how dw is made of a chunk that lies on one device (see `models.ops.Ops`).
    """
    share = parts[1]
    # A chunk takes the same stretch of every device's positions: chunks of consecutive ones would be the work
    # of one device after another, while the others wait.
    size = share * largest_divisor(x.shape[1] // share, chunk // x.shape[0] // share)
    spec = LossSpec(size, parts, softcap, z_loss, constrain, contract_rows, jnp.dtype(dtype or x.dtype))
    wanted = TargetWeights(targets, *jax.lax.stop_gradient((weights, counts)))
    loss, sums = _cross_entropy(x, w, wanted, spec)
    # The backward rule knows only the loss's cotangent: the sums must not seem differentiable.
    return loss, jax.lax.stop_gradient(sums)


def chunked_logprobs(
    x: Float[Array, "B T D"],
    w: Float[Array, "V D"],
    targets: Int[Array, "B T *K"],
    *,
    chunk: int,
    parts: tuple[int, int] = (1, 1),
    softcap: float | None = None,
    constrain: Callable[[Array, tuple[str | None, ...]], Array] = lambda x, axes: x,
    dtype: Any = None,
) -> Float[Array, "B T *K"]:
    """Log-probabilities of the targets, log softmax(cap(x·w)), in float32 nats; arguments as above.

    Differentiable in any way: backward makes a chunk's logits again (a fourth and a fifth product), where the
    cross-entropy, which knows its weights beforehand, does not.
    """
    share = parts[1]
    size = share * largest_divisor(x.shape[1] // share, chunk // x.shape[0] // share)
    spec = LossSpec(size, parts, softcap, 0.0, constrain, None, jnp.dtype(dtype or x.dtype))
    table = constrain(w.astype(spec.dtype), ("act_vocab", None))

    @jax.checkpoint
    def step(carry: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        _, capped, _, log_total = _scores(chunk[0], table, spec)
        if chunk[1].ndim == 2:
            return None, _picked(capped, _hits(capped, chunk[1])) - log_total
        hit = _hits(capped[..., None], chunk[1])
        return None, jnp.sum(jnp.where(hit, capped[..., None], 0.0), axis=2) - log_total[..., None]

    _, found = jax.lax.scan(step, None, (_split(x, spec), _split(targets, spec)))
    return _join(found, spec)


class TargetWeights(NamedTuple):
    """What is predicted: ids and weights [B, T] or [B, T, K], and what regularizers count by, [B, T]."""

    targets: Array
    weights: Array
    counts: Array | None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(x: Array, w: Array, wanted: TargetWeights, spec: LossSpec) -> Any:
    table = spec.constrain(w.astype(spec.dtype), ("act_vocab", None))

    def step(sums: tuple[Array, Array], chunk: tuple[Array, TargetWeights]) -> tuple[Any, None]:
        nll, z, _ = _chunk_loss(*chunk, table, spec)
        return (sums[0] + nll, sums[1] + z), None

    zero = jnp.zeros(spec.parts, jnp.float32)
    (nll, z), _ = jax.lax.scan(step, (zero, zero), _chunks(x, wanted, spec))
    return _results(nll, z)


def _forward(x: Array, w: Array, wanted: TargetWeights, spec: LossSpec) -> Any:
    table = spec.constrain(w.astype(spec.dtype), ("act_vocab", None))

    def step(carry: tuple[Array, Array, Array], chunk: tuple[Array, TargetWeights]) -> tuple[Any, Array]:
        nll_sum, z_sum, dw = carry
        nll, z, dlogits = _chunk_loss(*chunk, table, spec)
        # Here, while the logits are there: backward would have to make them again, a fourth product.
        dx = jnp.einsum("BTV,VD->BTD", dlogits.astype(spec.dtype), table, preferred_element_type=x.dtype)
        dw += _by_table(dlogits, chunk[0], spec)
        return (nll_sum + nll, z_sum + z, spec.constrain(dw, PARTIAL)), dx

    zero = jnp.zeros(spec.parts, jnp.float32)
    start = (zero, zero, spec.constrain(jnp.zeros((*spec.parts, *w.shape), jnp.float32), PARTIAL))
    (nll, z, dw), dx = jax.lax.scan(step, start, _chunks(x, wanted, spec))
    # What is saved is dx and dw, of the size of x and w, and nothing of the size of the logits.
    return _results(nll, z), (_join(dx, spec), jnp.sum(dw, axis=(0, 1)).astype(w.dtype))


def _by_table(dlogits: Array, x: Array, spec: LossSpec) -> Array:
    """Each group's gradient by the table, [R, P, V, D]."""
    # Its form wants all rows on one device; split rows go through an einsum that the partitioner understands.
    if spec.contract_rows is not None and spec.parts == (1, 1):
        rows = (a.reshape(-1, a.shape[-1]) for a in (dlogits, x))
        return spec.contract_rows(*rows)[None, None]
    pairs = (_groups(a.astype(spec.dtype), spec) for a in (dlogits, x))
    return jnp.einsum("RBPTV,RBPTD->RPVD", *pairs, preferred_element_type=jnp.float32)


def _results(nll: Array, z: Array) -> tuple[Array, dict[str, Array]]:
    nll, z = jnp.sum(nll), jnp.sum(z)
    return nll + z, {"nll": nll, "z_loss": z}


def _backward(spec: LossSpec, residuals: tuple[Array, Array], cotangents: Any) -> Any:
    dx, dw = residuals
    # The loss is a sum, so its cotangent is one number, known only now (1 / the batch's weight).
    scale = cotangents[0]
    return (scale * dx).astype(dx.dtype), (scale * dw).astype(dw.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _chunks(x: Array, wanted: TargetWeights, spec: LossSpec) -> tuple[Array, TargetWeights]:
    return _split(x, spec), jax.tree.map(lambda a: _split(a, spec), wanted)


def _split(x: Array, spec: LossSpec) -> Array:
    """[B, T, ...] as [T/size, B, size, ...]; a chunk is a stretch of positions from each part of T."""
    blocks = x.reshape(x.shape[0], spec.parts[1], -1, spec.size // spec.parts[1], *x.shape[2:])
    blocks = jnp.moveaxis(blocks, 2, 0)
    return blocks.reshape(blocks.shape[0], x.shape[0], spec.size, *x.shape[2:])


def _join(x: Array, spec: LossSpec) -> Array:
    """[T/size, B, size, ...] to [B, T, ...]: the inverse of `_split`."""
    blocks = x.reshape(*x.shape[:2], spec.parts[1], spec.size // spec.parts[1], *x.shape[3:])
    return jnp.moveaxis(blocks, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])


def _groups(x: Array, spec: LossSpec) -> Array:
    """A chunk [B, T, ...] by the devices that hold it, [R, B/R, P, T/P, ...]."""
    rows, parts = spec.parts
    return x.reshape(rows, x.shape[0] // rows, parts, x.shape[1] // parts, *x.shape[2:])


def _scores(x: Array, table: Array, spec: LossSpec) -> tuple[Array, Array, Array, Array]:
    """Of a chunk: exp(capped - max), capped logits, the sum of the first, and log(sum exp capped)."""
    logits = jnp.einsum("BTD,VD->BTV", x.astype(spec.dtype), table, preferred_element_type=jnp.float32)
    logits = spec.constrain(logits, LOGIT_AXES)
    capped = softcap_logits(logits, spec.softcap)
    # In float32 from here on: a log of a sum over 100,000 terms is what bfloat16 has no bits for.
    top = jnp.max(capped, axis=-1, keepdims=True)
    exps = jnp.exp(capped - top)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    return exps, capped, total, (jnp.log(total) + top)[..., 0]


def _hits(logits: Array, targets: Array) -> Array:
    """Which of the logits [B, T, V] (or [B, T, V, 1]) each target [B, T] (or [B, T, K]) is."""
    # Compare and sum instead of a gather: a vocabulary split over devices needs one small all-reduce.
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == jnp.expand_dims(targets, 2)


def _picked(capped: Array, hit: Array) -> Array:
    return jnp.sum(jnp.where(hit, capped, 0.0), axis=-1)


def _chunk_loss(x: Array, wanted: TargetWeights, table: Array, spec: LossSpec) -> tuple[Array, Array, Array]:
    """Each group's nll and z-loss over one chunk, and the gradient by its logits (dead where unused)."""
    exps, capped, total, log_total = _scores(x, table, spec)
    targets, weights, counts = wanted
    if targets.ndim == 2:
        hit = _hits(capped, targets)
        nll, mass, weighing = log_total - _picked(capped, hit), weights, weights
    else:
        # A row of the vocabulary for each position, made of its K entries where it is read: a compiler fuses
        # comparison and sum, so that [.., V, K] never exists.
        hit, mass = _hits(capped[..., None], targets), jnp.sum(weights, axis=-1)
        column = jnp.sum(jnp.where(hit, weights[..., None, :], 0.0), axis=-1)
        # Weighted already, each target by its own.
        nll, weighing = mass * log_total - jnp.sum(column * capped, axis=-1), jnp.float32(1.0)
    z = spec.z_loss * jnp.square(log_total)
    # d/dl of weight * (lse + z lse²) is softmax(l) times this; only the targets' columns have more.
    if counts is None:
        counts, share = mass, (mass * (1.0 + 2.0 * spec.z_loss * log_total))[..., None]
    else:
        share = (mass + counts * (2.0 * spec.z_loss * log_total))[..., None]
    dlogits = exps / total * share
    dlogits -= jnp.where(hit, weights[..., None], 0.0) if targets.ndim == 2 else column
    # Through the cap: tanh' = 1 - tanh², and capped / softcap is that tanh.
    if spec.softcap is not None:
        dlogits *= 1.0 - jnp.square(capped / spec.softcap)
    nll, z = (jnp.sum(_groups(w * term, spec), axis=(1, 3)) for w, term in ((weighing, nll), (counts, z)))
    return nll, z, dlogits


def softcap_logits(logits: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """Bound logits smoothly: cap * tanh(logits / cap) (Gemma 2 report, section 2)."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
