"""What makes a config illegal on a mesh: one function a rule, each with the legal values it can see.

Only numbers are compared, no array or device is touched, so a planner may ask about thousands of meshes. What
is refused here would otherwise be an error of the partitioner, or a wrong number.

B rows of a batch, M microbatches, P stages, v chunks of layers a stage holds (virtual stages).
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kernels.backends import problem as backend_problem
from kernels.names import PROJECTIONS, dims_of
from models.config import VOCAB_MULTIPLE, ModelConfig
from models.spec import Segment, make_segments
from parallel.config import dcn_problem, divisors, main_segment
from training.config import inner_steps
from training.legal.attention import wanted_attention
from training.legal.mesh_case import MeshCase, around, remedy, values

if TYPE_CHECKING:
    from models.mixer import Dim

# What an axis does is written for one logical axis and this rule.
NEEDED_RULES = {"pipeline": "stages", "expert": "experts", "context": "length"}
Tensor = tuple[str | None, ...]
_KEPT: dict[str, Any] = {}  # by the model's config; a process asks about few models
# The stream between blocks, and the head's logits.
ENDS: tuple[Tensor, ...] = (("stages", "batch", "act_length", "act_embed"), ("batch", "length", "act_vocab"))


def broken_rule(case: MeshCase) -> str | None:
    """What the first rule that this case breaks says, or None."""
    for rule in RULES:
        if (reason := rule(case)) is not None:
            return reason
    return None


def _slices(case: MeshCase) -> str | None:
    return dcn_problem(case.config.mesh.dcn, case.sizes)


def _rules(case: MeshCase) -> str | None:
    rules = case.config.mesh.rules
    for axis, name in NEEDED_RULES.items():
        if case.sizes[axis] > 1 and list(rules.get(name, ())) != [axis]:
            plus = "" if name in rules else "+"
            return (
                f"mesh.{axis}={case.sizes[axis]} needs {name} split over {axis}, and mesh.rules.{name}="
                f"{_plain(rules.get(name, ()))}; use {plus}mesh.rules.{name}=[{axis}] or mesh.{axis}=1"
            )
    if max(case.sizes.values()) == 1:
        return None
    _, tensors = read_model(case.config.model)
    for tensor in tensors:
        used: dict[str, str] = {}
        for name in filter(None, tensor):
            for axis in case.axes(name):
                if axis in used:
                    return (
                        f"mesh.rules.{used[axis]}={_plain(rules[used[axis]])} and mesh.rules.{name}="
                        f"{_plain(rules[name])} split one tensor twice over mesh.{axis}={case.sizes[axis]}; "
                        f"use mesh.{axis}=1, or name {axis} in one of them"
                    )
                used[axis] = name
    return None


def _plain(names: Iterable[str]) -> str:
    return f"[{','.join(names)}]"


# -- the model ---------------------------------------------------------------------------------------------


def read_model(model: ModelConfig) -> "tuple[tuple[Dim, ...], tuple[Tensor, ...]]":
    """The sizes that meshes split, and the logical axes that meet in a tensor; read once for all meshes."""
    if (key := repr(model)) not in _KEPT:
        # Imported where a mesh is there to split it: JAX loads slowly, and what is refused for less is
        # refused at once.
        import jax

        from models.blocks import model_dims
        from models.transformer import build_model

        sized = replace(model, vocab_size=VOCAB_MULTIPLE) if model.vocab_size == -1 else model
        leaves = jax.tree.leaves(build_model(sized).info)
        # Layers lie in stages where a pipeline splits them.
        tensors = [("stages", *leaf.axes) if "layers" in leaf.axes else leaf.axes for leaf in leaves]
        for name in dict.fromkeys(leaf.projection for leaf in leaves if leaf.projection):
            known = PROJECTIONS[name]
            tensors += [("stages", *dims_of(axes, 2 + len(axes))) for axes in (known.x, known.y)]
        _KEPT[key] = model_dims(model, make_segments(model)), tuple(dict.fromkeys((*tensors, *ENDS)))
    return _KEPT[key]


# -- stages --------------------------------------------------------------------------------------------------


def _schedule(case: MeshCase) -> str | None:
    p, stages = case.config.pipeline, case.sizes["pipeline"]
    if stages == 1:
        return None
    steps = case.config.training.accumulation_steps
    if steps > 1:
        return (
            f"training.accumulation_steps={steps} beside mesh.pipeline={stages}: pipeline.microbatches="
            f"{p.microbatches} does that job; use training.accumulation_steps=1"
        )
    if p.schedule != "interleaved_1f1b":
        return None if p.virtual_stages == 1 else _not_interleaved(case)
    if p.virtual_stages == 1:
        chunks = (v for v in range(2, case.config.model.num_layers + 1) if _layers_split(case, chunks=v))
        return (
            "pipeline.virtual_stages=1 is no interleaving, which pipeline.schedule=interleaved_1f1b asks for"
            + remedy(values("pipeline.virtual_stages", chunks), "pipeline.schedule=1f1b")
        )
    if p.microbatches % stages:
        legal_counts = _legal_turns(case) or [-(-p.microbatches // stages) * stages]
        return (
            f"pipeline.microbatches={p.microbatches} is no multiple of mesh.pipeline={stages}, as "
            "pipeline.schedule=interleaved_1f1b needs"
            + remedy(
                values("pipeline.microbatches", legal_counts),
                *case.options(["pipeline"], lambda n: p.microbatches % n == 0 and _layers_split(case, n)),
            )
        )
    return None


def _not_interleaved(case: MeshCase) -> str:
    p, stages = case.config.pipeline, case.sizes["pipeline"]
    could = p.microbatches % stages == 0 and _layers_split(case)
    return (
        f"pipeline.virtual_stages={p.virtual_stages}, but pipeline.schedule={p.schedule} has one chunk of "
        "layers a stage"
        + remedy("pipeline.virtual_stages=1", "pipeline.schedule=interleaved_1f1b" if could else "")
    )


def _layers(case: MeshCase) -> str | None:
    model, p, stages = case.config.model, case.config.pipeline, case.sizes["pipeline"]
    if stages == 1 or _layers_split(case):
        return None
    segment = _split_segment(model, model.num_layers)
    count, period = segment.count, len(segment.period)
    inside = f" (its largest segment: {count} periods of {period})" if period > 1 else ""
    if period == 1 and count < model.num_layers:
        inside = f" (its largest segment: {count})"
    moe = model.moe
    dense = 0 if moe is None else moe.first_dense_layers or list(moe.layer_pattern).index("experts")
    chunks = f" * pipeline.virtual_stages={p.virtual_stages}" if p.virtual_stages > 1 else ""
    numbers = around(model.num_layers, lambda n: _layers_split(case, layers=n), least=dense + 1)
    return (
        f"model.num_layers={model.num_layers}{inside} cannot be split over mesh.pipeline={stages}{chunks}"
        + remedy(
            *case.options(["pipeline"], lambda n: n == 1 or _layers_split(case, n)),
            values("model.num_layers", numbers),
        )
    )


def _layers_split(
    case: MeshCase, stages: int | None = None, chunks: int | None = None, layers: int | None = None
) -> bool:
    """Whether the largest segment divides into the stages' chunks."""
    ways = (stages or case.sizes["pipeline"]) * (chunks or case.config.pipeline.virtual_stages)
    model = case.config.model
    return _split_segment(model, layers or model.num_layers).count % ways == 0


def _split_segment(model: ModelConfig, num_layers: int) -> Segment:
    segments = make_segments(model, num_layers)
    return segments[main_segment(segments)]


# -- rows and positions --------------------------------------------------------------------------------------


def _batch(case: MeshCase) -> str | None:
    rows, ways = case.config.training.global_batch_size, case.ways("batch")
    count, key = _turns(case)
    total = ways * count
    if rows % total == 0:
        return None
    above = -(-rows // total) * total
    such = f"{above - total} or {above}" if above > total else f"{above}"
    turns = f"{key}={count}" if count > 1 else ""
    parts = " * ".join(part for part in (case.by(case.axes("batch")), turns) if part)
    also = values(key, _legal_turns(case)) if count > 1 else ""
    return (
        f"training.global_batch_size={rows} does not split into {parts}; use a multiple of {total}, such as "
        f"{such}{also and f', or {also}'}"
    )


def _turns(case: MeshCase) -> tuple[int, str]:
    """Parts of the batch that are computed one after another, and the key that says so."""
    if case.sizes["pipeline"] > 1:
        return case.config.pipeline.microbatches, "pipeline.microbatches"
    return case.config.training.accumulation_steps, "training.accumulation_steps"


def _legal_turns(case: MeshCase) -> list[int]:
    """Numbers of microbatches that the batch and the schedule allow."""
    rows, ways = case.config.training.global_batch_size, case.ways("batch")
    grouped = case.sizes["pipeline"] > 1 and case.config.pipeline.schedule == "interleaved_1f1b"
    step = case.sizes["pipeline"] if grouped else 1
    return [m for m in divisors(rows // ways) if m % step == 0] if rows % ways == 0 else []


def _length(case: MeshCase) -> str | None:
    length, model = case.config.data.seq_len, case.config.model
    name = next((name for name in ("length", "act_length") if length % _parts(case, name)), None)
    if name is None:
        return None
    longest = model.max_seq_len if model.position == "learned" else math.inf
    lengths = around(length, lambda n: n <= longest and _length_splits(case, n))
    options = [
        values(f"mesh.{axis}", (n for n in case.candidates(axis) if _length_splits(case, length, axis, n)))
        for axis in case.axes(name)
    ]
    order = " in zigzag order" if name == "length" and case.config.context.zigzags else ""
    return (
        f"data.seq_len={length} does not split into the {_parts(case, name)} equal parts that "
        f"{case.by(case.axes(name))}{order} needs{remedy(values('data.seq_len', lengths), *options)}"
    )


def _parts(case: MeshCase, name: str) -> int:
    """Into how many a row is cut: two a device of mesh.context where it is in zigzag order."""
    zigzag = name == "length" and case.sizes["context"] > 1 and case.config.context.zigzags
    return case.ways(name) * (2 if zigzag else 1)


def _length_splits(case: MeshCase, length: int, axis: str | None = None, size: int = 1) -> bool:
    if axis is not None:
        case = case.sized(**{axis: size})
    return length % _parts(case, "length") == 0 and length % _parts(case, "act_length") == 0


def _ulysses(case: MeshCase) -> str | None:
    config = case.config
    heads = config.model.num_heads
    if case.sizes["context"] == 1 or config.context.attention != "ulysses":
        return None
    axes = [*case.axes("act_heads"), "context"]
    ways = math.prod(case.sizes[axis] for axis in axes)
    if heads % ways == 0:
        return None
    parts = case.ways("length") * (2 if config.context.zigzag else 1)
    others = "context.attention=allgather, ring" if config.data.seq_len % parts == 0 else ""
    return (
        f"model.num_heads={heads} cannot be split over {case.by(axes)}, as context.attention=ulysses needs"
        + remedy(*case.options(axes, lambda n: heads % n == 0), others)
    )


def _whole_rows(case: MeshCase) -> str | None:
    if case.sizes["context"] == 1:
        return None
    from models.mixer import mixer

    if case.config.model.attention_sinks:
        return (
            f"mesh.context={case.sizes['context']} splits rows, which model.attention_sinks=true "
            "needs whole; use mesh.context=1"
        )
    for name in dict.fromkeys(case.config.model.mixers):
        if mixer(name).whole_rows:
            return (
                f"mesh.context={case.sizes['context']} splits rows, but {name} layers (model.mixer_pattern) "
                "go through them from the first position to the last; use mesh.context=1"
            )
    return None


# -- tensors -------------------------------------------------------------------------------------------------


def _experts(case: MeshCase) -> str | None:
    if case.sizes["expert"] == 1 or case.config.model.moe is not None:
        return None
    return (
        f"mesh.expert={case.sizes['expert']} splits experts, but model.moe=null: the model has none; "
        "use mesh.expert=1, or a model with experts"
    )


def _splits(case: MeshCase) -> str | None:
    if max(case.sizes.values()) == 1:
        return None
    dims, _ = read_model(case.config.model)
    for dim in dims:
        for name in dim.axes:
            if not _divides(dim.key, dim.size, case.ways(name)):
                return _no_split(case, dim.key, dim.size, name)
    return None


def _divides(key: str, size: int, ways: int) -> bool:
    # Fewer K/V heads than devices are repeated, which needs a whole number of copies.
    return size % ways == 0 or (key == "model.num_kv_heads" and ways % size == 0)


def _no_split(case: MeshCase, key: str, size: int, name: str) -> str:
    axes = case.axes(name)
    fits = case.options(axes, lambda n: _divides(key, size, n))
    return f"{key}={size} cannot be split over {case.by(axes)}{remedy(*fits)}"


def _vocabulary(case: MeshCase) -> str | None:
    size, tokenizer = case.config.model.vocab_size, case.config.tokenizer
    known = size if size > 0 else VOCAB_MULTIPLE
    for name in ("vocab", "act_vocab"):
        ways = case.ways(name)
        if known % ways == 0:
            continue
        axes = case.axes(name)
        least = {"bpe": tokenizer.vocab_size, "byte": 257}.get(tokenizer.kind, known)
        unit = math.lcm(ways, VOCAB_MULTIPLE)
        rounded = [-(-max(least, known) // unit) * unit]
        what = f"{size}" if size > 0 else f"-1 (it will be a multiple of {VOCAB_MULTIPLE})"
        return f"model.vocab_size={what} cannot be split over {case.by(axes)}" + remedy(
            *case.options(axes, lambda n: known % n == 0), values("model.vocab_size", rounded)
        )
    return None


# -- replicas that step alone --------------------------------------------------------------------------------


def _local_sgd(case: MeshCase) -> str | None:
    config, inner = case.config, inner_steps(case.config.local_sgd)
    if inner == 1:
        return None
    if case.sizes["replica"] == 1:
        more = [size for size in case.candidates("replica") if size > 1]
        return f"local_sgd.inner_steps={inner} needs replicas that step alone, but mesh.replica=1" + remedy(
            values("mesh.replica", more), "local_sgd.inner_steps=1"
        )
    steps = {
        "training.num_steps": config.training.num_steps,
        "checkpoint.every": config.checkpoint.every,
        "eval.every": config.eval.every,
    }
    for key, value in steps.items():
        if value % inner:
            return (
                f"{key}={value} is no multiple of local_sgd.inner_steps={inner}: replicas differ in between, "
                "so checkpoints and evaluation fall on outer steps"
                + remedy(values(key, around(value, lambda n: n % inner == 0)))
            )
    return None


def _kernel(case: MeshCase) -> str | None:
    training = case.config.training
    if training.attention == "auto":
        return None
    dtype = None if training.precision == "auto" else training.precision
    wanted = wanted_attention(case.config, case.sizes["context"], dtype=dtype)
    return backend_problem(training.attention, wanted)


# In the order in which a person would look: the mesh itself, then stages, rows, positions, tensors.
RULES = (
    _slices,
    _rules,
    _experts,
    _schedule,
    _layers,
    _batch,
    _length,
    _whole_rows,
    _ulysses,
    _kernel,
    _splits,
    _vocabulary,
    _local_sgd,
)
