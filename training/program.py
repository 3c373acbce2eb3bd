"""From a config to the program that runs: model, layout, optimizer and the step, all of it still abstract.

`fit` compiles what stands here, and so will anything that only wants to look at it: nothing is allocated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from common.checks import ConfigError
from common.text import human
from data.batch import TEXT
from kernels.attention_cpu import fused_attention
from kernels.backends import Choice
from kernels.einsum import Projector
from kernels.einsum_cpu import contract_last, contract_rows, fast_einsum, materialize
from kernels.grouped_experts import run_experts
from models.ops import Ops
from models.transformer import Model, build_model
from optim.optimizers import make_optimizer
from optim.schedules import make_schedule
from parallel import processes
from parallel.attention.choose import build_attention, choose_attention
from parallel.attention.context import Zigzag
from parallel.axes import Layout, kv_repeats
from parallel.experts import expert_dispatch
from parallel.schedules.accumulate import GradientAccumulation, check_remat
from parallel.schedules.pipeline import Pipeline
from parallel.schedules.tables import make_schedule as make_pipeline_schedule
from parallel.sharded_matrices import ShardedMatrices
from training.config import Config
from training.legal.attention import documents_of, wanted_attention
from training.local_sgd import AXIS as REPLICA
from training.local_sgd import Replicas, one_replica, steps_alone
from training.objectives.base import Objective, build_objective
from training.param_layout import ParamLayout, abstract_params, arrange, canonical_state
from training.precision import build_projector, compute_dtype, precision_row
from training.safety.signals import VOTE, abstract_vote
from training.safety.skip_updates import Skipping
from training.state import (
    TrainState,
    abstract_state,
    balance_mask,
    decay_mask,
    first_state,
    init_state,
    is_info,
    matrix_dims,
    nothing_seen,
    shardings,
    split,
)
from training.step import (
    Batch,
    FlatStep,
    abstract_batch,
    compile_eval_step,
    compile_train_step,
    make_eval_step,
    make_train_step,
)
from training.xla import (
    deterministic_row,
    largest_layer_bytes,
    needed_options,
    options_line,
    profile_options,
    resolve_profile,
)


@dataclass(frozen=True)
class Program:
    """Everything that the loop composes, before a single array exists."""

    model: Model
    layout: Layout
    ops: Ops
    strategy: Any  # Plain or Pipeline: their interface
    objective: Objective
    tx: optax.GradientTransformation
    state: TrainState
    batch: Batch
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    compiler_options: Mapping[str, Any]
    placement: ParamLayout
    canonical: TrainState  # the state as checkpoints have it: `state` itself, unless layers lie in stages
    attention: Choice  # the backend behind `ops.attention`, and why
    replicas: Replicas | None = None  # where they step alone

    def init_state(self, seed: int) -> TrainState:
        """Step 0, every leaf on the devices that own it."""
        if self.replicas is not None:
            begin, ema = self.replicas.begin, self.state.ema is not None
            # Made where it belongs: one copy made on one device and sent out would not fit there.
            place = shardings(self.state)
            first = jax.jit(
                lambda k: begin(first_state(self.placement, self.tx, k, ema=ema)), out_shardings=place
            )
            return first(jax.random.key(seed))
        return init_state(self.placement, self.tx, self.state, seed=seed, ema=self.state.ema is not None)

    def to_canonical(self, tree: Any) -> Any:
        """A state, parameters or whole weights, with layers stacked [n, ...] as checkpoints have them."""
        if self.replicas is not None and isinstance(tree, TrainState):
            return self.replicas.to_canonical(tree)
        return self._relocate(tree, self.canonical, join=True)

    def from_canonical(self, tree: Any) -> Any:
        """The inverse: layers as this program's stages hold them."""
        if self.replicas is not None and isinstance(tree, TrainState):
            return self.replicas.from_canonical(tree)
        return self._relocate(tree, self.state, join=False)

    def with_params(self, state: TrainState, weights: Any) -> TrainState:
        """A state at step 0 that begins at other weights (in memory's form), its average too."""
        params, frozen = split(self.placement.info, weights)
        state = state.replace(frozen=frozen)
        # A copy: the step donates its state, and one buffer cannot be given away twice.
        if state.ema is not None:
            state = state.replace(ema=jax.tree.map(jnp.copy, params))
        if self.replicas is not None:
            return self.replicas.with_params(state, params)
        return state.replace(params=params)

    @property
    def parent_weights(self) -> Any:
        """A parent's weights as they are asked for: abstract, canonical, whole and without adapters."""
        if self.canonical.frozen is None:
            return self.canonical.params
        return abstract_params(self.placement.canonical_plain, self.layout)

    def begin_at(self, weights: Any, seed: int) -> tuple[Any, Any]:
        """What trains and what is frozen, canonical, of a parent's weights; None for the second: nothing is.

        Factors beside frozen weights are those that a run of this seed begins with.
        """
        if self.canonical.frozen is None:
            return weights, None
        place = shardings((self.canonical.params, self.canonical.frozen))
        make = jax.jit(self.placement.begin_at, out_shardings=place)
        return make(weights, jax.random.key(seed))

    def stored(self, state: TrainState) -> TrainState:
        """Of a canonical state what a checkpoint holds: what a parent's checkpoint has is only named."""
        return state.replace(frozen=None) if self.placement.inherits else state

    def with_guard(self, stored: TrainState) -> TrainState:
        """A canonical state with the guard's figures, begun anew where a checkpoint has none."""
        # A checkpoint from before the guard was switched on has none, and any start may switch it on.
        if stored.guard is not None:
            return stored
        place = shardings(self.canonical.guard)
        return stored.replace(guard=jax.jit(nothing_seen, out_shardings=place)())

    def _relocate(self, tree: Any, target: TrainState, *, join: bool) -> Any:
        if self.placement.arrangement is None:
            return tree
        # Of a whole state every leaf that follows a parameter (moments, average) moves with it.
        like: Any = target
        if not isinstance(tree, TrainState):
            structure: Any = jax.tree.structure
            whole = structure(tree) == structure(target.weights)
            like = target.weights if whole else target.params
        return self.placement.arrangement.relocate(tree, shardings(like), join=join)

    def compile_train(self) -> FlatStep:
        """The one executable of the run: `(state, batch) -> (state, metrics)`, the state donated."""
        metrics = self.replicas.metrics if self.replicas is not None else self.layout.replicated()
        # Votes ride in the batch and reach every process with the step itself: no collective of their own.
        batch: Any = self.batch | ({VOTE: abstract_vote(self.layout.mesh)} if self.votes else {})
        return compile_train_step(self.train_step, self.state, batch, metrics, self.compiler_options)

    @property
    def votes(self) -> bool:
        """Whether a step carries the processes' votes to stop."""
        return processes.process_count() > 1 and self.replicas is None

    @property
    def text_batch(self) -> Batch:
        """The abstract batch of held-out text, whatever the objective wants beside any text's fields."""
        return {name: self.batch[name] for name in TEXT}

    def compile_eval(self) -> Any:
        """`(params, batch) -> sums`, batches shaped like those of training."""
        step = make_eval_step(self.model, self.strategy, self.ops)
        return compile_eval_step(
            step, self.state.weights, self.text_batch, self.layout, self.compiler_options
        )

    def chosen(self, config: Config, peak: str) -> list[tuple[str, str, str]]:
        """Rows (name, value, why) of the start-up table: devices, model and what computes it."""
        training, devices = config.training, self.layout.mesh.devices
        platform = devices.flat[0].platform
        mesh = {axis: size for axis, size in self.layout.mesh.shape.items() if size > 1}
        replicas = "step together"
        if self.replicas is not None:
            alone = self.replicas.config
            replicas = f"step alone, exchange {alone.exchange} every {alone.inner_steps} steps"
        size = human(self.model.num_params()["total"])
        remat = f"remat={training.remat}, {'scanned' if training.scan_layers else 'unrolled'} layers"
        bits = ("deterministic", deterministic_row(platform), "deterministic=true")
        return [
            ("devices", f"{devices.size} x {devices.flat[0].device_kind}", peak),
            ("mesh", ", ".join(f"{a}={n}" for a, n in mesh.items()) or "one device", "mesh.*"),
            *([("replicas", replicas, "local_sgd.*")] if "replica" in mesh else []),
            ("model", f"{config.model.name}, {size} parameters", "model="),
            ("precision", precision_row(training, self.ops, platform), training.precision),
            ("attention", self.attention.name, self.attention.why),
            ("layers", remat, "training.remat, training.scan_layers"),
            ("compiler", options_line(self.compiler_options), f"hardware.xla={config.hardware.xla}"),
            *([bits] if config.deterministic else []),
        ]


def build_strategy(config: Config, placement: ParamLayout, layout: Layout) -> GradientAccumulation | Pipeline:
    """In what order layers and microbatches are worked through."""
    training = config.training
    if placement.arrangement is None:
        # Gradients are pinned to where their parameters lie before microbatches are added up: left to XLA,
        # every microbatch may hold all of them whole.
        placed = layout.tree(placement.trained, is_info) if layout.mesh.size > 1 else None
        return GradientAccumulation(training.accumulation_steps, training.remat, training.scan_layers, placed)
    schedule = make_pipeline_schedule(
        config.pipeline.schedule,
        stages=placement.arrangement.stages,
        microbatches=config.pipeline.microbatches,
        virtual_stages=placement.arrangement.chunks,
    )
    specs = jax.tree.map(lambda sharding: sharding.spec, layout.tree(placement.info, is_info))
    return Pipeline(layout, schedule, specs, training.remat, training.scan_layers)


def in_order(config: Config, strategy: GradientAccumulation | Pipeline, layout: Layout) -> Any:
    """The strategy on batches whose positions lie as attention across devices wants them."""
    # Causal work grows along a row: in text order the last device would have nearly twice the mean.
    split = layout.mesh.shape["context"] > 1
    zigzag = split and config.context.zigzags
    return Zigzag(strategy, layout) if zigzag else strategy


def muon_dtype(precision: str, platform: str) -> Any:
    """Of Newton–Schulz: bfloat16, as published, but float32 on CPU and where float32 is asked for."""
    return jnp.dtype("float32" if platform == "cpu" or precision == "float32" else "bfloat16")


def sharing(layout: Layout, *, alone: bool) -> ShardedMatrices | None:
    """All devices share Muon's matrices, whatever axis they lie along; replicas that step alone do not."""
    # Even axes that hold copies share the work: each device orthogonalizes some matrices, not all the same.
    axes = tuple(a for a in layout.mesh.axis_names if not (alone and a == REPLICA))
    return ShardedMatrices(layout.mesh, axes) if layout.mesh.size > 1 else None


def skipping(platform: str, *, alone: bool) -> Skipping:
    """How an update that is not taken is left out on these devices."""
    if alone:  # each replica decides for itself, which a branch of the whole program cannot
        return "apart"
    # A GPU's branch waits for the host to read the condition; there both sides are computed and one chosen.
    return "choose" if platform in ("gpu", "cuda", "rocm") else "branch"


def compiler_options(config: Config, model: Model, layout: Layout) -> dict[str, Any]:
    """What XLA is asked for beyond its defaults: the profile of these devices, and what must be."""
    platform, devices = layout.mesh.devices.flat[0].platform, layout.mesh.size
    # Collectives are combined up to about a layer: less leaves the link idle, more waits for several layers.
    layer = largest_layer_bytes(model.info["segments"]) // layout.mesh.shape["tensor"]
    profile = resolve_profile(config.hardware.xla, platform, devices)
    options = profile_options(profile, layer_bytes=layer)
    return {**options, **needed_options(config.deterministic, platform, devices)}


def build_ops(config: Config, layout: Layout) -> Ops:
    """What is injected into the model: kernels, precision, and the placement of activations."""
    device = layout.mesh.devices.flat[0]
    ops = common_ops(config, layout, device)
    # The forms for a CPU are loops over whole arrays of one device; the partitioner could not split them.
    return cpu_ops(ops) if device.platform == "cpu" and layout.mesh.size == 1 else ops


def cpu_ops(ops: Ops) -> Ops:
    """On one CPU, products in the form that XLA has fast kernels for.

    With training.precision=bfloat16 it is their factors that are rounded: everything else is faster, and more
    exact, in float32.
    """
    # Sums, norms and softmax stay in float32: a CPU has no units for bfloat16 but those of its products.
    dtype, attention = ops.compute_dtype, ops.attention
    assert isinstance(ops.project, Projector)
    return replace(
        ops,
        attention=partial(fused_attention, dtype=dtype) if attention is fused_attention else attention,
        project=replace(ops.project, plain=partial(fast_einsum, dtype=dtype)),
        contract_last=partial(contract_last, dtype=dtype),
        contract_rows=partial(contract_rows, dtype=dtype),
        materialize=materialize,
        compute_dtype=jnp.dtype("float32"),
        factor_dtype=dtype,
    )


def common_ops(config: Config, layout: Layout, device: Any) -> Ops:
    """The same on any device."""
    dtype = compute_dtype(config.training.precision, device.platform)
    backend = attention_of(config, layout, dtype).name
    return Ops(
        attention=build_attention(backend, layout, config.context, documents_of(config)),
        experts=expert_dispatch(layout, run_experts),
        project=build_projector(config.training, device),
        constrain=layout.constrain,
        compute_dtype=dtype,
        loss_chunk=config.training.loss_chunk,
        parts=(layout.ways("batch"), layout.ways("length")),
        z_loss=config.training.z_loss,
        # Fewer heads than mesh.tensor has devices are repeated: stored once, computed where they are needed.
        repeat_kv=kv_repeats(config.model.num_kv_heads, layout),
    )


def attention_of(config: Config, layout: Layout, dtype: Any) -> Choice:
    """The backend of attention on these devices, and why."""
    wanted = wanted_attention(config, layout.mesh.shape["context"])
    return choose_attention(config.training.attention, wanted, layout, dtype)


def build_program(config: Config, layout: Layout) -> Program:
    """Compose the step for a resolved config (`model.vocab_size` known).

    config: the root `Config`; layout: the mesh and its rules. Raises ValueError where a size does not fit.
    """
    # 1. What is computed, and where its layers lie.
    model, training = build_model(config.model), config.training
    platform = layout.mesh.devices.flat[0].platform
    check_remat(training.remat, layout.mesh.devices.flat)
    objective = build_objective(config.objective)
    if config.model.mtp_depth and objective.name != "next_token":
        raise ConfigError(
            f"objective={objective.name} trains no layers for further tokens, and model.mtp.depth="
            f"{config.model.mtp_depth}; use objective=next_token or model.mtp=null"
        )
    placement = arrange(config, model, layout)
    alone = steps_alone(config.local_sgd, layout.mesh)
    # A replica that steps alone must reduce over its own devices only: its step never hears of the others.
    seen = one_replica(layout) if alone else layout

    # 2. How a gradient becomes an update.
    schedule = make_schedule(config.schedule, num_steps=training.num_steps)
    tx = make_optimizer(
        config.optim,
        schedule,
        decay_mask=decay_mask(placement.trained),
        matrices=matrix_dims(placement.trained, seen),
        balance=balance_mask(placement.trained),
        balance_rate=config.model.moe.bias_update_rate if config.model.moe else 0.0,
        parts=sharing(seen, alone=alone),
        muon_dtype=muon_dtype(training.precision, platform),
        seed=config.seed,
    )

    # 3. One step, and the state that it takes and gives, all of it abstract.
    step = make_train_step(
        model,
        tx,
        *order_of_work(config, placement, seen),
        objective,
        learning_rate=lambda count: config.optim.learning_rate * schedule(count),
        grad_clip=config.optim.grad_clip,
        # Replicas average where they meet, not at each of their own steps: `Replicas` does it then.
        ema_decay=None if alone else training.ema_decay,
        seed=config.seed,
        guard=config.guard,
        skipping=skipping(platform, alone=alone),
        info=placement.trained,
    )
    state = abstract_state(placement, tx, seen, ema=training.ema_decay is not None)
    canonical, replicas = canonical_state(placement, state, seen), None

    # 4. Many of them side by side, where replicas step alone.
    if alone:
        assert config.local_sgd is not None  # or they would not step alone
        replicas = Replicas(config.local_sgd, seen, state, canonical, placement.chunks)
        step = replicas.train_step(step, ema_decay=training.ema_decay, seed=config.seed)
        state, canonical = replicas.state, replicas.canonical
    # An evaluation is one over all devices in any case, so its order of work is that of the whole mesh.
    strategy, ops = order_of_work(config, placement, layout)
    return Program(
        model=model,
        layout=layout,
        ops=ops,
        strategy=strategy,
        tx=tx,
        state=state,
        objective=objective,
        batch=abstract_batch(layout, training.global_batch_size, config.data.seq_len, objective.fields),
        train_step=step,
        compiler_options=compiler_options(config, model, layout),
        placement=placement,
        canonical=canonical,
        attention=attention_of(config, layout, ops.compute_dtype),
        replicas=replicas,
    )


def order_of_work(config: Config, placement: ParamLayout, layout: Layout) -> tuple[Any, Ops]:
    """The strategy and the operations of a step over all rows that this layout splits."""
    return in_order(config, build_strategy(config, placement, layout), layout), build_ops(config, layout)
