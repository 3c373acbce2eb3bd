"""The plain schedule: scan over layers, accumulate over microbatches.

One value of the interface that every schedule shares: `value_and_grad(loss, model, params, batch, key, ops,
frozen) -> (means, grads)` and its forward-only twins, `evaluate` (sums over the batch) and `score` (a figure
for each token). It knows a model only by `embed`, `segments`, `layer`, `head` and `logprobs`, and what is
minimized only by `weight` and `loss`.

B rows, T position, D model; an array of a batch is [B], [B, T] or [B, T, ...].
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.names import (
    ATTENTION_INPUTS,
    ATTENTION_OUTPUT,
    MATERIALIZED,
    PROJECTIONS,
    ROUTER_LOGITS,
    product_name,
)
from parallel.partition import join

HOST_MEMORY = "pinned_host"

Params = Any
Batch = dict[str, Array]
Sums = dict[str, Array]
Scored = dict[str, Array]  # figures of each token, [B, T] or [B, T, ...]
Policy = Callable[..., Any]  # (primitive, inputs, parameters) -> whether its results are kept


@runtime_checkable  # so that a test can hold calls to their annotations
class LayeredModel(Protocol):
    """What a schedule needs of a model: pure functions over its parameter tree."""

    @property
    def segments(self) -> tuple[Any, ...]:
        """(count, period) of each stretch of layers with the same period."""

    def embed(self, params: Params, batch: Batch, ops: Any) -> Float[Array, "B T D"]:
        """The residual stream before the first layer, from token ids."""

    def layer(
        self,
        spec: Any,
        params: Params,
        x: Float[Array, "B T D"],
        batch: Batch,
        key: Array,
        ops: Any,
    ) -> tuple[Float[Array, "B T D"], Sums]:
        """The stream after one layer, whose parameters are not stacked, and what the layer reports."""

    def head(self, params: Params, x: Float[Array, "B T D"], batch: Batch, ops: Any) -> tuple[Array, Sums]:
        """The sum over tokens of what is minimized, and sums to report."""

    def logprobs(self, params: Params, x: Float[Array, "B T D"], batch: Batch, ops: Any) -> Array:
        """Log-probabilities of the batch's targets, [B, T]."""


@runtime_checkable
class BatchLoss(Protocol):
    """What a schedule needs of what is minimized; `training.objectives` has the values."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What the batch's sums are divided by: known before any forward pass, and above 0."""

    def loss(
        self, model: Any, params: Params, x: Float[Array, "B T D"], batch: Batch, ops: Any
    ) -> tuple[Float[Array, ""], Sums]:
        """A microbatch's share of what is minimized, behind the last layer, and sums to report."""


# What is made of the stream behind the last layer: a loss and sums to report, or figures for each token.
End = Callable[[Params, Array, Batch], Any]
LAST = ("batch", "length")  # logical axes of what a batch holds; further dims are whole


def batch_axes(ndim: int) -> tuple[str | None, ...]:
    """The logical axes of an array of a batch."""
    return (*LAST, *[None] * (ndim - 2))[:ndim]


# What a policy keeps has a name: products are told apart by it, never by how they are written.
DOTS = {
    ATTENTION_OUTPUT,
    MATERIALIZED,
    ROUTER_LOGITS,
    *(product_name(name) for name, projection in PROJECTIONS.items() if projection.kept),
}
OFFLOADED = (*ATTENTION_INPUTS, product_name("up"))  # the largest arrays of a dense layer


def _named(*names: str) -> Policy:
    def policy(prim: Any, *args: Any, **kwargs: Any) -> bool:
        if prim.name == "name":
            return kwargs["name"] in names
        # By primitive, because naming attention's output does not stop its forward from being recomputed.
        return "dot_product_attention_fwd" in prim.name

    return policy


_dots = _named(*DOTS)
_to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[*OFFLOADED],
    offload_src="device",
    offload_dst=HOST_MEMORY,
)


def _dots_on_host(prim: Any, *args: Any, **kwargs: Any) -> Any:
    if prim.name == "name" and kwargs["name"] in OFFLOADED:
        return _to_host(prim, *args, **kwargs)
    return _dots(prim, *args, **kwargs)


# What a layer keeps for its backward; everything else is computed again.
POLICIES = {
    "dots": _dots,  # what attention's kernel needs, and all products but the one behind it
    "attention": _named(
        ATTENTION_OUTPUT, *ATTENTION_INPUTS
    ),  # queries, keys, values, and what attention's kernel needs
    "offload": _dots_on_host,  # as dots, the widest of them in the host's memory
    "full": jax.checkpoint_policies.nothing_saveable,  # its input alone
}


def check_remat(remat: str, devices: Iterable[Any]) -> None:
    """Raise ValueError where a policy needs memory that these devices cannot reach."""
    if remat != "offload":
        return
    for device in devices:
        kinds = {memory.kind for memory in device.addressable_memories()}
        if kinds and HOST_MEMORY not in kinds:  # a GPU that is only described names no memory at all
            raise ValueError(
                f"training.remat=offload needs {HOST_MEMORY} memory, and {device.device_kind} has only "
                f"{', '.join(sorted(kinds))}; use training.remat=attention or full"
            )


@dataclass(frozen=True)
class LayerScan:
    """A stretch of layers in order: one loop over the repetitions of a period."""

    model: LayeredModel
    period: tuple[Any, ...]
    batch: Batch
    key: Array
    ops: Any
    remat: str
    scan_layers: bool

    def __call__(self, stacked: Params, x: Array, layers_before: Any) -> tuple[Array, Sums]:
        """The residual stream after the layers, and their sums; every parameter is [repetitions, ...]."""
        return self.over(self.period_of_layers, x, (stacked, self.layer_numbers(stacked, layers_before)))

    def layer_numbers(self, stacked: Params, layers_before: Any) -> Array:
        """The number in the model of the first layer in each repetition, [repetitions]."""
        count = jax.tree.leaves(stacked)[0].shape[0]
        return layers_before + jnp.arange(count) * len(self.period)

    def over(self, body: Any, x: Array, items: Any, *, remat: bool = True) -> tuple[Array, Sums]:
        """Loop `body(x, item) -> (x, sums)` over items [repetitions, ...]; sums are added up."""
        # prevent_cse keeps XLA from finding a layer and its second computation equal and keeping the first
        # after all. Inside a scan's body it cannot, and the barriers would only cost fusions.
        if remat and self.remat != "none":
            body = jax.checkpoint(body, policy=POLICIES[self.remat], prevent_cse=not self.scan_layers)
        count = jax.tree.leaves(items)[0].shape[0]
        # Unrolled it is still a scan: one code path, and gradients stay stacked.
        x, sums = jax.lax.scan(body, x, items, unroll=1 if self.scan_layers else count)
        return x, jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)

    def period_of_layers(self, x: Array, item: tuple[Params, Array]) -> tuple[Array, Sums]:
        """One repetition: each layer of the period in order."""
        params, first = item
        totals: Sums = {}
        for i, spec in enumerate(self.period):
            # By the layer's number in the model, so that any schedule and any cut into stages draws the same.
            key = jax.random.fold_in(self.key, first + i)
            with jax.named_scope(f"layer_{i}"):
                x, sums = self.model.layer(spec, params[str(i)], x, self.batch, key, self.ops)
            totals = add_sums(totals, sums)
        return x, totals


@dataclass(frozen=True)
class GradientAccumulation:
    """Layers in order on every device; `unroll` trades compile time for speed on CPU."""

    accumulation_steps: int = 1
    remat: str = "none"
    scan_layers: bool = True
    shardings: Any = None  # of the parameters: gradients are scattered to them as soon as they are there

    def forward(
        self, end: End, model: LayeredModel, params: Params, batch: Batch, key: Array, ops: Any
    ) -> tuple[Any, Sums]:
        """What `end(params, x, batch)` makes of one microbatch's stream, and the sums of its layers."""
        x = model.embed(params, batch, ops)
        layers_before = 0
        totals: Sums = {}
        for number, segment in enumerate(model.segments):
            stacked = params["segments"][str(number)]
            scan = LayerScan(model, segment.period, batch, key, ops, self.remat, self.scan_layers)
            x, sums = scan(stacked, x, layers_before)
            totals = add_sums(totals, sums)
            layers_before += segment.count * len(segment.period)
        return end(params, x, batch), totals

    def value_and_grad(
        self,
        loss: BatchLoss,
        model: LayeredModel,
        params: Params,
        batch: Batch,
        key: Array,
        ops: Any,
        frozen: Params = None,
    ) -> tuple[Sums, Params]:
        """Means over the batch's total weight, and gradients of `objective` among them by `params`.

        frozen: what the model has beside these, if anything (`parallel.partition`). The weight is known
        before any forward pass, so that microbatches of unequal weight still sum to the exact gradient of the
        whole batch.
        """
        weight = loss.weight(batch)

        def end(params: Params, x: Array, micro: Batch) -> tuple[Array, Sums]:
            return loss.loss(model, params, x, micro, ops)

        def loss_of(params: Params, micro: Batch) -> tuple[Array, Sums]:
            (value, sums), totals = self.forward(end, model, join(params, frozen), micro, key, ops)
            value, sums = value + totals.get("loss", 0.0), add_sums(totals, sums)
            return value / weight, jax.tree.map(lambda s: s / weight, {"objective": value, **sums})

        def grad(params: Params, micro: Batch) -> tuple[Params, Sums]:
            grads, means = jax.grad(loss_of, has_aux=True)(params, micro)
            if self.shardings is not None:
                # Scattered here, microbatch by microbatch: summing whole gradients first and scattering the
                # sum would hold all of them on every device.
                grads = jax.lax.with_sharding_constraint(grads, self.shardings)
            return grads, means

        if self.accumulation_steps == 1:
            grads, means = grad(params, batch)
            return means, grads

        def add(carry: Any, micro: Batch) -> tuple[Any, None]:
            grads, means = grad(params, micro)
            return jax.tree.map(jnp.add, carry, (means, grads)), None

        # A scan with the sums as carry: one microbatch's activations live at a time, and one program does
        # all.
        micros = split_microbatches(batch, self.accumulation_steps, ops)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micros))
        # Sums begin at zero and not at the first microbatch's gradients: that one would be compiled a second
        # time.
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0]))
        (means, grads), _ = jax.lax.scan(add, zeros, micros)
        return means, grads

    def evaluate(self, model: LayeredModel, params: Params, batch: Batch, ops: Any) -> Sums:
        """Sums over the batch, nothing divided: `nll` in nats and `weight` in tokens."""

        def end(params: Params, x: Array, batch: Batch) -> Any:
            return model.head(params, x, batch, ops)

        (_, sums), _ = self.forward(end, model, params, batch, jax.random.key(0), ops)
        return {"nll": sums["nll"], "weight": jnp.sum(batch["loss_weights"])}

    def score(self, model: LayeredModel, params: Params, batch: Batch, ops: Any) -> Scored:
        """`logprobs` [B, T]: the log-probability of each target, in nats; a forward pass without gradient."""

        def end(params: Params, x: Array, batch: Batch) -> Scored:
            return {"logprobs": model.logprobs(params, x, batch, ops)}

        # The whole batch at once, as in an evaluation: nothing is kept for a backward pass.
        scored, _ = self.forward(end, model, params, batch, jax.random.key(0), ops)
        return scored


def split_microbatches(batch: Batch, steps: int, ops: Any) -> Batch:
    """[B, ...] to [steps, B/steps, ...]; row r is in microbatch r mod steps: each is on all devices."""

    def split(x: Array) -> Array:
        # Consecutive rows lie on one device: taking them as a microbatch would leave the others idle.
        rows = x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1)
        return ops.constrain(rows, (None, *batch_axes(x.ndim)))

    return jax.tree.map(split, batch)


def add_sums(left: Sums, right: Sums) -> Sums:
    """The sums of both; what has the same name is added."""
    totals = dict(left)
    for key, value in right.items():
        totals[key] = totals[key] + value if key in totals else value
    return totals
