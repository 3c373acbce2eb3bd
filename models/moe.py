"""A mixture of experts: the router, what keeps it balanced, and the layer.

B rows, T position, D model, E experts, k choices of a token, C the two of a fused pair, F width of an expert.
The router computes in float32. Tokens of segment 0 are padding: they count nowhere.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, zeros
from jaxtyping import Array, Bool, Float, Int

from kernels.activations import GATES
from kernels.grouped_experts import ExpertSpec, capacity_of
from kernels.names import ROUTER_LOGITS
from models.config import ModelConfig, MoEConfig
from models.ops import Ops
from models.param import param, vector

BEST_OF_GROUP = 2  # a group is judged by the sum of its two best experts (DeepSeek-V3)
LOAD = "moe/load"  # [E], a count; what else is reported is a mean over tokens


@dataclass(frozen=True)
class Routing:
    """Each token's experts and their gates, best first, and what the router thought of all of them."""

    experts: Int[Array, "B T k"]
    gates: Float[Array, "B T k"]
    shares: Float[Array, "B T E"]  # scores made to sum to one
    log_total: Float[Array, "B T"]  # log(sum exp logits)


def route(logits: Float[Array, "B T E"], bias: Float[Array, " E"] | None, config: MoEConfig) -> Routing:
    """The k experts of each token with the best scores plus bias; gates are scores, which have no bias."""
    # Also where scores are sigmoids: the z-loss, which keeps logits small, is of the logits.
    log_total = jax.nn.logsumexp(logits, axis=-1)
    if config.score == "softmax":
        scores = shares = jnp.exp(logits - log_total[..., None])
    else:
        scores = jax.nn.sigmoid(logits)
        shares = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    # The bias moves tokens, not outputs (DeepSeek-V3): it enters the choice alone, which has no gradient, and
    # gates stay scores.
    choice = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if config.groups_per_token < config.num_groups:
        choice = in_best_groups(choice, config.num_groups, config.groups_per_token)
    experts, gates = best(choice, scores, config.experts_per_token)
    # Over the chosen ones: the rest of the scores belongs to experts that do not speak.
    if config.normalize_gates:
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, gates * config.gate_scale, shares, log_total)


def in_best_groups(choice: Float[Array, "B T E"], groups: int, keep: int) -> Float[Array, "B T E"]:
    """Minus infinity outside of the `keep` groups of neighbouring experts that a token may use."""
    # Neighbouring experts lie on one device or host, so that fewer groups a token are fewer places to send it
    # to.
    grouped = choice.reshape(*choice.shape[:-1], groups, -1)
    _, top = best(grouped, grouped, min(BEST_OF_GROUP, grouped.shape[-1]))
    worth = jnp.sum(top, axis=-1)
    chosen, _ = best(worth, worth, keep)
    is_open = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(choice.shape)


def best(choice: Float[Array, "*B E"], values: Float[Array, "*B E"], k: int) -> tuple[Array, Array]:
    """Indices of the k largest of `choice`, the first of equals first, and `values` there: [..., k] each.

    k rounds of argmax: sorting (`lax.top_k`), like a gather by the indices, makes the partitioner collect all
    tokens on every device.
    """
    numbers = jax.lax.broadcasted_iota(jnp.int32, choice.shape, choice.ndim - 1)
    found, there = [], []
    for _ in range(k):
        index = jnp.argmax(choice, axis=-1).astype(jnp.int32)
        # By comparison and a sum instead of a gather: elementwise, so each device works on its own tokens.
        hit = numbers == index[..., None]
        found.append(index)
        there.append(jnp.sum(jnp.where(hit, values, 0.0), axis=-1))
        choice = jnp.where(hit, -jnp.inf, choice)
    return jnp.stack(found, axis=-1), jnp.stack(there, axis=-1)


def router_sums(
    routing: Routing,
    real: Bool[Array, "B T"],
    weights: Float[Array, "B T"],
    dropped: Float[Array, "B T"],
    bias: Float[Array, " E"] | None,
    config: MoEConfig,
) -> dict[str, Array]:
    """What the layer adds to the objective (`loss`, coefficients inside) and what it reports, as sums.

    With w a token's loss weight, W_b their sum over row b, and means over the n_b real tokens of the row:
        f_be = mean_t [e among the k of t] / k,   P_be = mean_t share_te
        load balance = sum_b W_b * E * sum_e f_be P_be      (1 a token where the load is even)
        z = sum_t w_t * log²(sum exp logits_t)
    (Fedus et al. 2021, arXiv:2101.03961; Zoph et al. 2022, arXiv:2202.08906), so that the objective, divided
    by the batch's weight, is their mean over tokens. A row is never split into microbatches, so no schedule
    and no mesh changes them; documents packed into a row share its f and P, as they share its capacity.
    """
    # Padding counts in no mean, also in a batch whose weights say nothing of it.
    weights = weights * real
    hits = (routing.experts[..., None] == jnp.arange(config.num_experts)) & real[:, :, None, None]
    # A row at a time: a row is never cut into microbatches, so no schedule changes its balance.
    counts = jnp.sum(hits, axis=(1, 2), dtype=jnp.float32)  # [B, E]
    tokens = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)[:, None]
    share = jnp.sum(routing.shares * real[..., None], axis=1) / tokens
    even = jnp.sum(counts * share, axis=-1) / (tokens[:, 0] * config.experts_per_token)
    balance = config.num_experts * jnp.sum(jnp.sum(weights, axis=1) * even)
    z = jnp.sum(weights * jnp.square(routing.log_total))
    loss = config.load_balance_weight * balance + config.router_z_weight * z
    load = jnp.sum(counts, axis=0)
    if bias is not None:
        loss = loss + overload(load, bias)
    # Reported, not minimized: low entropy of a token is a sure router, even load is the balance term's
    # matter.
    entropy = -jnp.sum(routing.shares * jnp.log(routing.shares + 1e-20), axis=-1)
    reports = {
        LOAD: load,
        "moe/entropy": jnp.sum(weights * entropy),
        "moe/dropped": jnp.sum(weights * dropped),
        "moe/load_balance_loss": balance,
        "moe/router_z_loss": z,
    }
    return {"loss": loss, **jax.lax.stop_gradient(reports)}


def overload(load: Float[Array, " E"], bias: Float[Array, " E"]) -> Float[Array, ""]:
    """Zero, whose gradient by the bias is load minus mean load.

    As a part of the loss it is summed like a gradient over microbatches, devices and stages, and is absent
    where a pipeline's stage idles; as a gradient it reaches the optimizer.
    """
    excess = jax.lax.stop_gradient(load - jnp.mean(load))
    return jnp.sum(excess * (bias - jax.lax.stop_gradient(bias)))


class Experts(nnx.Module):
    """The router and E feed-forwards, of which a token uses k; the dispatch itself is `ops.experts`."""

    def __init__(self, config: ModelConfig, residual_init: Any, rngs: nnx.Rngs):
        assert config.moe is not None
        self.config, self.activation = config.moe, config.activation
        D, E, F = config.d_model, config.moe.num_experts, config.moe.d_expert
        init = normal(config.init_std)
        pair: tuple[int, ...] = (2,) if config.activation in GATES else ()
        pair_axes: tuple[None, ...] = (None,) if pair else ()
        self.router = param(rngs, (D, E), ("embed", None), init, reduction=(0,), output=(1,))
        self.up = param(
            rngs,
            (E, D, *pair, F),
            ("experts", "expert_embed", *pair_axes, "mlp"),
            init,
            reduction=(1,),
            output=(2 + len(pair),),
        )
        down_axes = ("experts", "mlp", "expert_embed")
        self.down = param(rngs, (E, F, D), down_axes, residual_init, reduction=(1,), output=(2,))
        has_biases = config.has_bias("experts")
        self.router_bias = vector(rngs, (E,), (None,), zeros) if has_biases else None
        up_axes = ("experts", *pair_axes, "mlp")
        self.up_bias = vector(rngs, (E, *pair, F), up_axes, zeros) if has_biases else None
        self.down_bias = vector(rngs, (E, D), ("experts", "expert_embed"), zeros) if has_biases else None
        biased = config.moe.selection_bias or config.moe.bias_update_rate > 0
        self.bias = param(rngs, (E,), (None,), zeros, role="balance", decay=False) if biased else None

    def __call__(
        self, x: Float[Array, "B T D"], batch: dict[str, Array], ops: Ops, *, decoding: bool
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """The experts' output, and the sums of `router_sums`. While decoding, nothing is dropped."""
        config = self.config
        x = ops.constrain(x, ("batch", "length", "act_embed"))
        bias = None if self.bias is None else self.bias[...]
        real = batch["segment_ids"] > 0
        routing = route(self.logits(x), bias, config)
        limited = config.dispatch == "capacity" and not decoding
        sizes = (x.shape[1], config.experts_per_token, config.num_experts, config.capacity_factor)
        spec = ExpertSpec(self.activation, capacity_of(*sizes) if limited else None)
        # Cast before the dispatch: what is gathered from other devices is half as wide.
        up, down = (w[...].astype(x.dtype) for w in (self.up, self.down))
        order = batch.get("order") if limited else None
        more = {} if self.up_bias is None else {"up_bias": self.up_bias[...].astype(x.dtype)}
        y, dropped = ops.experts(
            x, routing.experts, routing.gates, up, down, real=real, order=order, spec=spec, **more
        )
        y = self.add_bias(y, routing, real)
        weights = batch.get("loss_weights", real.astype(jnp.float32))
        return y, router_sums(routing, real, weights, dropped, bias, config)

    def add_bias(
        self, y: Float[Array, "B T D"], routing: Routing, real: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The output with each chosen expert's bias, times its gate."""
        if self.down_bias is None:
            return y
        # Once, where tokens are at home: where F is split, each device would add it to its part of the sum.
        chosen = routing.experts[..., None] == jnp.arange(self.config.num_experts)
        gates = jnp.sum(jnp.where(chosen, routing.gates[..., None], 0.0), axis=2) * real[..., None]
        return y + jnp.einsum("BTE,ED->BTD", gates.astype(y.dtype), self.down_bias[...].astype(y.dtype))

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """In float32 throughout: a rounded logit sends a token to another expert."""
        logits = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), self.router[...], precision="highest")
        if self.router_bias is not None:
            logits = logits + self.router_bias[...]
        return checkpoint_name(logits, ROUTER_LOGITS)
