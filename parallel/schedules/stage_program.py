"""One step of a pipeline: the ticks of a table (`parallel.schedules.tables`) over one batch.

B rows of a microbatch, T position, D model, P stages, M microbatches, v chunks of layers a stage.
Every tick runs the same layers on all stages at once: `jax.vmap` over a leading dim P that is split over
mesh.pipeline, so the partitioner sees one batched program, no branch depends on the stage, and all other mesh
axes work inside a stage as they do outside. What a stage has no work for is computed on stale numbers and
met with a zero cotangent. Backward recomputes a chunk from its stored input: only inputs are kept.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from parallel.config import main_segment
from parallel.partition import apart, join
from parallel.schedules.accumulate import (
    Batch,
    End,
    LayeredModel,
    LayerScan,
    Params,
    Sums,
    add_sums,
    batch_axes,
)
from parallel.schedules.split_backward import DeferredGradients, ReplayedGradients, Taps, tap_shapes
from parallel.schedules.stage_layout import AXIS
from parallel.schedules.stages import RESIDUAL, StagePlan, Stages, split_rows, widen, without
from parallel.schedules.tables import IDLE, TickRun, fold_runs

TableRow = dict[str, Array]


class StageProgram:
    """One step's ticks over one batch; the state that goes from tick to tick is a dict of arrays."""

    def __init__(
        self,
        plan: StagePlan,
        make_end: End,
        model: LayeredModel,
        params: Params,
        batch: Batch,
        key: Array,
        ops: Any,
        weigh: Callable[[Batch], Array] = lambda batch: jnp.ones((), jnp.float32),
        frozen: Params = None,
    ) -> None:
        self.layout, self.schedule, self.plan = plan.layout, plan.schedule, plan
        self.model, self.key, self.ops, self.make_end = model, key, ops, make_end
        # Only one segment is split: stages must run the same layers, and segments differ in theirs.
        self.main = str(main_segment(model.segments))
        whole = join(params, frozen)
        self.params = whole["segments"][self.main]
        # Embedding and head are computed by all stages at once, a part each, instead of by the first and the
        # last while others wait for them.
        self.rest = without(whole, self.main)
        # What is differentiated of the two (None: all of it). Layers go through the stages whole.
        self.trains = None if frozen is None else params["segments"][self.main]
        self.rest_trains = None if frozen is None else without(params, self.main)
        self.at = Stages(
            plan.layout, plan.schedule.stages, plan.schedule.chunks, plan.specs["segments"][self.main]
        )
        self.micros = split_rows(batch, self.schedule.microbatches)
        # Of the whole batch, before any microbatch: each adds its share of the exact mean as it passes.
        self.weight = weigh(batch)
        self.stage_ids = jnp.arange(self.schedule.stages)

    # -- what is computed ------------------------------------------------------------------------------

    def begin(self, rest: Params, micro: Batch) -> tuple[Array, Sums]:
        """The stream [B, T, D] that enters the first stage: embedding, and the segments before the stages."""
        x = self.model.embed(rest, micro, self.ops)
        return self._segments(rest, x, micro, range(int(self.main)))

    def end(self, rest: Params, x: Array, micro: Batch) -> tuple[Array, Sums]:
        """What is minimized, and sums to report: by the segments after the stages, and the head."""
        x, sums = self._segments(rest, x, micro, range(int(self.main) + 1, len(self.model.segments)))
        loss, head_sums = self.make_end(rest, x, micro)
        return loss + sums.get("loss", 0.0), add_sums(sums, head_sums)

    def _segments(self, rest: Params, x: Array, micro: Batch, numbers: range) -> tuple[Array, Sums]:
        totals: Sums = {}
        for number in numbers:
            scan = self._scan(number, micro)
            x, sums = scan(rest["segments"][str(number)], x, self._layers_before(number))
            totals = add_sums(totals, sums)
        return x, totals

    def _scan(self, number: int, micro: Batch) -> LayerScan:
        period = self.model.segments[number].period
        return LayerScan(
            self.model, period, micro, self.key, self.ops, self.plan.remat, self.plan.scan_layers
        )

    def _layers_before(self, number: int) -> int:
        return sum(s.count * len(s.period) for s in self.model.segments[:number])

    def stages(self, params: Params, x: Array, micro: Batch, chunk: Int[Array, " P"]) -> tuple[Array, Sums]:
        """All stages at once, [P, B, T, D] to the same: each its own chunk of layers and microbatch."""
        before = self._layers_before_stage(chunk)

        def stage(params: Params, x: Array, micro: Batch, before: Array) -> tuple[Array, Sums]:
            return self._scan(int(self.main), micro)(params, x, before)

        return jax.vmap(stage, spmd_axis_name=AXIS)(params, x, micro, before)

    def tapped_stages(
        self, params: Params, x: Array, micro: Batch, chunk: Int[Array, " P"], taps: Taps
    ) -> tuple[Array, Sums]:
        """The numbers of `stages`; its gradient by `taps` is what weights' gradients will be made of."""
        before = self._layers_before_stage(chunk)

        def stage(params: Params, x: Array, micro: Batch, before: Array, taps: Taps) -> tuple[Array, Sums]:
            return DeferredGradients(self._scan(int(self.main), micro))(params, x, before, taps)

        return jax.vmap(stage, spmd_axis_name=AXIS)(params, x, micro, before, taps)

    def weight_gradients(
        self, params: Params, x: Array, micro: Batch, chunk: Int[Array, " P"], taps: Taps
    ) -> Params:
        """Gradients by the weights, [P, n/(vP), ...], from what a backward tick left in `taps`."""
        before = self._layers_before_stage(chunk)

        params, beside = apart(self.trains, params)

        def total(params: Params) -> Array:
            def stage(params: Params, x: Array, micro: Batch, before: Array, taps: Taps) -> Array:
                return ReplayedGradients(self._scan(int(self.main), micro))(params, x, before, taps)

            # The stages' scalars share no parameter, so their sum's gradient is each stage's own.
            whole = join(params, beside)
            return jnp.sum(jax.vmap(stage, spmd_axis_name=AXIS)(whole, x, micro, before, taps))

        return jax.grad(total)(params)

    def _layers_before_stage(self, chunk: Int[Array, " P"]) -> Int[Array, " P"]:
        number = int(self.main)
        segment = self.model.segments[number]
        layers = segment.count * len(segment.period) // (self.schedule.chunks * self.schedule.stages)
        # Chunk c of stage s is the (c * P + s)-th.
        return self._layers_before(number) + (chunk * self.schedule.stages + self.stage_ids) * layers

    # -- ticks -----------------------------------------------------------------------------------------

    def start(self, *, gradients: bool = True, scored: bool = False) -> dict[str, Any]:
        """The state before the first tick: everything zero, streams pinned to their stages.

        scored: what the end reports is of each token, and kept by microbatch instead of added up.
        """
        # Shapes alone: what a microbatch looks like is the model's to say.
        x, _ = jax.eval_shape(self.begin, self.rest, self.micro(0))
        residual = self.at.constrain(jnp.zeros((self.schedule.stages, *x.shape), x.dtype))
        state: dict[str, Any] = {"x": residual}
        if scored:
            _, found = jax.eval_shape(self.make_end, self.rest, x, self.micro(0))
            state["scores"] = {
                name: self.constrain_rows(
                    jnp.zeros((s.shape[0], self.schedule.microbatches, *s.shape[1:]), s.dtype)
                )
                for name, s in found.items()
            }
        else:
            state["sums"] = self._zero_sums(x)
        if gradients:
            places = self.schedule.slots[2]
            # As many places as units are ever alive at once (`Schedule.slots`), and none for each microbatch:
            # this is the memory that 1F1B saves over GPipe.
            inputs = jnp.zeros((places, *residual.shape), residual.dtype)
            state |= {
                "dx": residual,
                "inputs": self.layout.constrain(inputs, (None, *RESIDUAL)),
                # In the shape of the parameters in stages, so that adding to them moves nothing between
                # devices.
                "grads": jax.tree.map(jnp.zeros_like, apart(self.trains, self.params)[0]),
                "rest": jax.tree.map(jnp.zeros_like, apart(self.rest_trains, self.rest)[0]),
            }
            if self.schedule.split:
                places = self.schedule.weight_slots[2]
                state["taps"] = jax.tree.map(
                    lambda t: self.at.pin(jnp.zeros((places, *t.shape), t.dtype), (None, *t.axes)),
                    self.tap_shapes(x),
                )
        return state

    def tap_shapes(self, x: jax.ShapeDtypeStruct) -> Any:
        """What one unit leaves behind on every stage, [P, n/(vP), ...]."""
        segment = self.model.segments[int(self.main)]
        layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[3:], p.dtype), self.params)
        stages, repeats = self.schedule.stages, segment.count // (self.schedule.stages * self.schedule.chunks)
        return jax.tree.map(
            lambda t: replace(t, shape=(stages, repeats, *t.shape), axes=("stages", None, *t.axes)),
            tap_shapes(self._scan(int(self.main), self.micro(0)), layer, x),
        )

    def _zero_sums(self, x: jax.ShapeDtypeStruct) -> Sums:
        micro = self.micro(0)
        chunk = jnp.zeros_like(self.stage_ids)
        many = jnp.zeros((self.schedule.stages, *x.shape), x.dtype)
        _, begin = jax.eval_shape(self.begin, self.rest, micro)
        loss, end = jax.eval_shape(self.end, self.rest, x, micro)
        _, layers = jax.eval_shape(
            self.stages, self.at.chunk(self.params, chunk), many, self.micro(chunk), chunk
        )
        shapes = {name: (s.shape[1:], s.dtype) for name, s in layers.items()}
        shapes |= {name: (s.shape, s.dtype) for name, s in (*begin.items(), *end.items())}
        return {"objective": jnp.zeros((), loss.dtype)} | {
            name: jnp.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()
        }

    def run(self, runs: tuple[TickRun, ...], state: dict[str, Any]) -> dict[str, Any]:
        """All ticks in order, one loop a run; a pattern of runs that repeats is a loop around its loops."""
        # Ticks of different work are different programs. A tick that did everything and chose by a condition
        # would pay for all of it, always: all stages go through it together.
        for pattern, repeats in fold_runs(runs):
            length = sum(run.count for run in pattern)
            rows = self.rows(pattern[0].start, length * repeats)

            def group(state: Any, rows: TableRow, pattern: tuple[TickRun, ...] = pattern) -> tuple[Any, None]:
                at = 0
                for run in pattern:
                    # Defaults bind loop variables now: the scan calls these later.
                    part = jax.tree.map(lambda r, a=at, n=run.count: r[a : a + n], rows)
                    state, _ = jax.lax.scan(partial(self.tick, run), state, part)
                    at += run.count
                return state, None

            if repeats == 1:
                state, _ = group(state, rows)
            else:
                rows = jax.tree.map(lambda r, n=repeats: r.reshape(n, -1, *r.shape[1:]), rows)
                state, _ = jax.lax.scan(group, state, rows)
        return state

    def rows(self, start: int, count: int) -> TableRow:
        """The table's rows of these ticks, each [ticks, P]."""
        table = {
            "forward": self.schedule.forward,
            "keep": self.schedule.slots[0],
            "backward": self.schedule.backward,
            "take": self.schedule.slots[1],
        }
        if self.schedule.split:
            leave, fetch, _ = self.schedule.weight_slots
            table |= {"weight": self.schedule.weight, "leave": leave, "fetch": fetch}
        return {name: jnp.asarray(grid[start : start + count], jnp.int32) for name, grid in table.items()}

    def tick(self, run: TickRun, state: dict[str, Any], row: TableRow) -> tuple[dict[str, Any], None]:
        """One tick: forward of one unit a stage, then backward of another, then weights of a third."""
        # A copy, since the methods below write into it; of references, not of arrays.
        state = dict(state)
        if run.work.forward:
            y = self.forward(state, row)
            if run.work.head and not run.work.backward:
                self.evaluate_end(state, y, row)
        if run.work.backward:
            self.backward(state, row, head=run.work.head)
        if run.work.weight:
            self.weights(state, row)
        return state, None

    def forward(self, state: dict[str, Any], row: TableRow) -> Array:
        """Each stage passes a microbatch through a chunk and hands the result to the next."""
        unit, micro, chunk = self.units(row["forward"])
        # Every stage computes the embedding of the unit that enters, and only the first one's choice keeps
        # it: by where, since a branch on the stage would be a branch of the partitioned program.
        begins = (self.stage_ids == 0) & (chunk == 0)
        start, _ = self.begin(self.rest, self.micro(micro[0]))
        x = self.at.constrain(jnp.where(widen(begins, state["x"]), start[None], state["x"]))
        # Evaluation has no backward pass and keeps none.
        if "inputs" in state:
            state["inputs"] = self.at.keep(state["inputs"], x, row["keep"], unit != IDLE)
        y, _ = self.stages(self.at.chunk(self.params, chunk), x, self.micro(micro), chunk)
        y = self.at.constrain(y)
        # Sent as soon as it is there: this tick's backward does not wait for it.
        state["x"] = self.at.shift(y, 1)
        return y

    def evaluate_end(self, state: dict[str, Any], y: Array, row: TableRow) -> None:
        """Forward only: the sums of the microbatch that leaves the last stage, or its tokens' figures."""
        _, micro, _ = self.units(row["forward"])
        loss, sums = self.end(self.rest, self.at.of_stage(y, -1), self.micro(micro[-1]))
        if "scores" in state:
            # Each microbatch leaves once, so that its place is written once.
            state["scores"] = {
                name: self.constrain_rows(jax.lax.dynamic_update_index_in_dim(x, sums[name], micro[-1], 1))
                for name, x in state["scores"].items()
            }
            return
        state["sums"] = add_sums(state["sums"], {"objective": loss, **sums})

    def backward(self, state: dict[str, Any], row: TableRow, *, head: bool) -> None:
        """Each stage recomputes a chunk from its kept input and hands the gradient to the one before."""
        unit, micro, chunk = self.units(row["backward"])
        busy, params, mine = unit != IDLE, self.at.chunk(self.params, chunk), self.micro(micro)
        params, beside = apart(self.trains, params)
        x = self.at.take(state["inputs"], row["take"])
        if self.schedule.split:
            shapes = self.tap_shapes(jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
            # Zeros that nothing reads: only their gradient is asked for, so XLA can drop them.
            empty = jax.tree.map(lambda t: self.at.pin(jnp.zeros(t.shape, t.dtype), t.axes), shapes)
            (y, sums), pull = jax.vjp(
                lambda p, x, taps: self.tapped_stages(join(p, beside), x, mine, chunk, taps), params, x, empty
            )
        else:
            (y, sums), pull = jax.vjp(lambda p, x: self.stages(join(p, beside), x, mine, chunk), params, x)
        dy = state["dx"]
        if head:
            ends = (self.stage_ids == self.schedule.stages - 1) & (chunk == self.schedule.chunks - 1)
            dy = jnp.where(widen(ends, dy), self.pull_end(state, y, self.micro(micro[-1]))[None], dy)
        # An idle stage works on stale numbers. With a zero cotangent all its gradients are zero, so nothing
        # has to be masked afterwards.
        dy = self.at.constrain(jnp.where(widen(busy, dy), dy, 0))
        dparams, dx, *taps = pull((dy, self.cotangents(sums, busy)))
        if taps:
            left = jax.tree.map(lambda t, x: self.at.pin(x, t.axes), shapes, taps[0])
            state["taps"] = jax.tree.map(
                lambda t, places, x: self.at.keep(places, x, row["leave"], busy, t.axes),
                shapes,
                state["taps"],
                left,
            )
        state["grads"] = self.at.add_chunk(state["grads"], dparams, chunk, self.trains)
        self.count(state, sums, busy)
        dx = self.at.constrain(dx)
        # The gradient that leaves the first stage's first chunk belongs to the embedding, whose pull-back all
        # stages run in every backward tick, mostly on zeros.
        begins = busy[0] & (chunk[0] == 0)
        self.pull_begin(state, jnp.where(begins, self.at.of_stage(dx, 0), 0), self.micro(micro[0]), begins)
        # Against the direction of the forward pass, around the same ring.
        state["dx"] = self.at.shift(dx, -1)

    def weights(self, state: dict[str, Any], row: TableRow) -> None:
        """Gradients by weights of units whose backward is behind them, on all stages the same microbatch."""
        unit, micro, chunk = self.units(row["weight"])
        busy = unit != IDLE
        shapes = self.tap_shapes(jax.ShapeDtypeStruct(state["x"].shape[1:], state["x"].dtype))
        taps = jax.tree.map(
            lambda t, places: self.at.take(places, row["fetch"], t.axes), shapes, state["taps"]
        )
        # Gradients are linear in a tap's half, so zeros give zeros, as with a zero cotangent.
        taps = jax.tree.map(lambda t: jnp.where(widen(busy, t), t, 0), taps)
        dparams = self.weight_gradients(
            # The layer's own input is not needed: every product takes its input from the tap.
            self.at.chunk(self.params, chunk),
            jnp.zeros_like(state["x"]),
            self.micro(micro),
            chunk,
            taps,
        )
        state["grads"] = self.at.add_chunk(state["grads"], dparams, chunk, self.trains)

    def pull_end(self, state: dict[str, Any], y: Array, micro: Batch) -> Array:
        """Loss and its gradient by what the last stage gives, for the microbatch that it is at."""
        rest, beside = apart(self.rest_trains, self.rest)
        (loss, sums), pull = jax.vjp(
            lambda rest, x: self.end(join(rest, beside), x, micro), rest, self.at.of_stage(y, -1)
        )
        # Sums are reported and not minimized: their cotangents are zero.
        nothing = jax.tree.map(jnp.zeros_like, sums)
        drest, dy = pull(((1.0 / self.weight).astype(loss.dtype), nothing))
        state["rest"] = self.add_rest(state["rest"], drest)
        state["sums"] = add_sums(state["sums"], {"objective": loss, **sums})
        return dy

    def pull_begin(self, state: dict[str, Any], dx: Array, micro: Batch, busy: Array) -> None:
        """Gradients of embedding and first segments from what the first stage hands back."""
        rest, beside = apart(self.rest_trains, self.rest)
        (_, sums), pull = jax.vjp(lambda rest: self.begin(join(rest, beside), micro), rest)
        (drest,) = pull((dx, self.cotangents(sums, busy)))
        state["rest"] = self.add_rest(state["rest"], drest)
        self.count(state, sums, busy)

    def cotangents(self, sums: Sums, busy: Array) -> Sums:
        """Of what layers report only `loss` is minimized, and only where there was work."""
        # A router's loss is made inside a stage, so its cotangent enters there and not by way of the head.
        share = jnp.where(busy, 1.0 / self.weight, 0.0)
        return {
            name: share.astype(s.dtype) if name == "loss" else jnp.zeros_like(s) for name, s in sums.items()
        }

    def count(self, state: dict[str, Any], sums: Sums, busy: Array) -> None:
        """Add what layers report; over stages, where each reports its own."""

        def total(s: Array) -> Array:
            kept = jnp.where(widen(busy, s), s, 0)
            return jnp.sum(kept, axis=0) if busy.ndim else kept

        totals = {name: total(s) for name, s in sums.items()}
        if "loss" in totals:
            # Here as well as in `pull_end`: the objective is the head's loss plus what layers add.
            totals["objective"] = totals["loss"]
        state["sums"] = add_sums(state["sums"], totals)

    def finish(self, state: dict[str, Any]) -> tuple[Sums, Params]:
        """Means, and gradients in the shape of the parameters."""
        segments = {**state["rest"]["segments"], self.main: state["grads"]}
        # Gradients are divided already: their cotangent was 1 / weight.
        means = jax.tree.map(lambda s: s / self.weight, state["sums"])
        return means, {**state["rest"], "segments": segments}

    # -- microbatches ----------------------------------------------------------------------------------

    def units(self, unit: Int[Array, " P"]) -> tuple[Array, Array, Array]:
        """(unit, microbatch, chunk) of each stage; an idle one points at the first of each."""
        micro, chunk = jnp.divmod(jnp.maximum(unit, 0), self.schedule.chunks)
        # Every device keeps the whole row: one stage's number is looked at by all.
        unit, micro, chunk = (self.layout.constrain(x, (None,)) for x in (unit, micro, chunk))
        return unit, micro, chunk

    def micro(self, index: Any) -> Batch:
        """Microbatch `index`, [B, ...]; or, of one index a stage, [P, B, ...]."""
        if jnp.ndim(index) == 0:
            return {
                name: self.layout.constrain(jnp.take(x, index, axis=1), batch_axes(x.ndim - 1))
                for name, x in self.micros.items()
            }
        return {
            name: self.layout.constrain(
                # Integers and weights [B, T] are looked up by every stage anew instead of travelling with the
                # stream: all devices of a stage hold all microbatches of their rows.
                jnp.moveaxis(jnp.take(x, index, axis=1), 1, 0),
                ("stages", *batch_axes(x.ndim - 1)),
            )
            for name, x in self.micros.items()
        }

    def constrain_rows(self, x: Array) -> Array:
        """An array of all microbatches [B, M, ...] placed like a batch's rows."""
        batch, *others = batch_axes(x.ndim - 1)
        return self.layout.constrain(x, (batch, None, *others))

    def add_rest(self, grads: Params, more: Params) -> Params:
        """Gradients of what all stages have together with those of one microbatch added."""
        specs, _ = apart(self.rest_trains, without(self.plan.specs, self.main))

        def add(g: Array, m: Array, spec: PartitionSpec) -> Array:
            placed = NamedSharding(self.layout.mesh, spec)
            # Scattered before the sum, as in `GradientAccumulation`.
            return g + jax.lax.with_sharding_constraint(m, placed)

        return jax.tree.map(add, grads, more, specs)
