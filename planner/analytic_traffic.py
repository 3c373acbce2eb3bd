"""A step's collectives by equations, as `planner.hlo.program.Reading.totals` counts them in a compiled one.

Parameters are gathered (compute dtype) for the forward and the backward pass, in a pipeline at every tick and
once more, since it recomputes; their gradients are scattered (layers: compute dtype; tables: float32) or,
along `data` and `replica`, added up. Along `tensor` the stream is added up behind attention and feed-forward,
forward and backward, and once more behind attention where the forward pass is made again (Shoeybi et al.
2019, arXiv:1909.08053; gathered and scattered instead with sequence parallelism, Korthikanti et al. 2022,
arXiv:2205.05198). Along `context` queries, keys, values and output change their place (Ulysses,
arXiv:2309.14509), or keys and values go round or are gathered; along `expert` tokens go out and come back.
Between stages a stream goes on at every tick.
"""

import math
from collections import Counter
from collections.abc import Callable

from planner.sizes import Sizes, gathered_axes, parameters_of, part_of
from planner.work import Axes, Traffic

TrafficCount = Counter[tuple[str, Axes]]
Add = Callable[[str, Axes, float, float], None]  # kind, axes, executions, bytes of each


def traffic_of(sizes: Sizes) -> tuple[Traffic, ...]:
    """All collectives of one step, groups of one left out."""
    times: TrafficCount = Counter()
    size: TrafficCount = Counter()

    def add(kind: str, axes: Axes, count: float, each: float) -> None:
        mesh = sizes.layout.mesh.shape
        axes = tuple(axis for axis in axes if mesh[axis] > 1)
        if axes and count and each:
            times[kind, axes] += round(count)
            size[kind, axes] += round(count * each)

    _parameters(sizes, add)
    _activations(sizes, add)
    return tuple(Traffic(kind, axes, times[kind, axes], size[kind, axes]) for kind, axes in sorted(times))


def _passes(sizes: Sizes) -> tuple[float, float]:
    """How often a layer's weights are gathered, and their gradients scattered, in a step."""
    if sizes.schedule is None:
        return 2 * sizes.microbatches, sizes.microbatches
    work = sizes.schedule.work
    forward, backward = sum(w.forward for w in work), sum(w.backward for w in work)
    return forward + 2 * backward, backward


def _parameters(sizes: Sizes, add: Add) -> None:
    layout, mesh = sizes.layout, sizes.layout.mesh.shape
    gathers, scatters = _passes(sizes)
    for p in parameters_of(sizes.model):
        axes = tuple(a for a in gathered_axes(p) if part_of(p, layout, (a,)) != part_of(p, layout))
        whole, here = part_of(p, layout, axes), part_of(p, layout)
        table = p.role in ("embedding", "head")
        layers = 1 if p.segment is None else p.shape[0] // (mesh["pipeline"] if p.axes[0] == "stages" else 1)
        width = 4 if table else sizes.itemsize
        # Stages work on one of their chunks in a tick.
        chunks = sizes.schedule.chunks if sizes.schedule is not None and p.axes[0] == "stages" else 1
        if axes:
            often = 1 if table else gathers / chunks
            add("all-gather", axes, often * layers, sizes.itemsize * whole / layers)
            add("reduce-scatter", axes, (1 if table else scatters / chunks) * layers, width * whole / layers)
        others = tuple(a for a in ("replica", "data", "fsdp", "expert", "context") if a not in axes)
        if "experts" in p.axes:
            others = tuple(a for a in others if a != "expert")
        add("all-reduce", others, 1, (4 if table else sizes.itemsize) * here)


def _activations(sizes: Sizes, add: Add) -> None:
    s, mesh = sizes, sizes.layout.mesh.shape
    again = s.config.training.remat != "none"
    work = s.schedule.work if s.schedule is not None else ()
    ticks = sum(w.backward for w in work) if work else s.microbatches
    passes = s.layers * ticks / (s.schedule.chunks if s.schedule is not None else 1)
    forwards = (2 if work else 1) + again  # a pipeline's backward tick begins with a forward pass
    if s.stream < s.whole:  # sequence parallelism
        add("all-gather", ("tensor",), passes * (2 * forwards + 2), s.whole)
        add("reduce-scatter", ("tensor",), passes * (2 * forwards + 2 - again), s.whole)
    else:
        add("all-reduce", ("tensor",), passes * (2 * forwards + 2 - again), s.whole)
    kind = s.config.context.attention
    if kind == "ulysses":
        add(
            "all-to-all",
            ("context",),
            passes * (forwards + 1) * 4,
            (2 * s.mixer.queries + s.mixer.keys_values) / 4,
        )
    elif kind == "allgather":
        add("all-gather", ("context",), passes * forwards * 2, s.mixer.keys_values / 2 * mesh["context"])
        add("reduce-scatter", ("context",), passes * 2, s.mixer.keys_values / 2 * mesh["context"])
    else:
        add(
            "collective-permute", ("context",), passes * (forwards + 2) * mesh["context"], s.mixer.keys_values
        )
    if s.dispatched:
        add("all-to-all", ("expert",), passes * (2 * forwards + 2 - again), s.dispatched)
    if work:
        add("collective-permute", ("pipeline",), sum(w.forward + w.backward for w in work), s.stream)
        ends = 3 * s.microbatches
        add("all-reduce", ("pipeline",), ends, s.whole)
    vocabulary = tuple(a for a in s.layout.rules.get("act_vocab", ()) if a != "pipeline")
    if math.prod(mesh[a] for a in vocabulary) > 1:
        add("all-reduce", vocabulary, 2 * s.microbatches, s.whole)
