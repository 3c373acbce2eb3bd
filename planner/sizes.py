"""What a device holds of a step, by the rules of the mesh alone: no compiler, no device, no array.

The parameters' birth certificates (`models.param`) say shapes and logical axes, the mesh's rules into how
many parts; then come the bytes of one layer's activations, of one microbatch. B rows, T position, D model,
N query and K key heads, H their size, F feed-forward, V vocabulary, L layers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from kernels.attention import QUERY_BLOCK
from models.config import ModelConfig
from models.mixer import mixer
from models.transformer import Model, build_model
from optim.optimizers import make_optimizer
from optim.schedules import make_schedule
from parallel.axes import Layout, kv_repeats
from parallel.config import MeshConfig, main_segment, mesh_shape
from parallel.hardware import Machine
from parallel.schedules.tables import Schedule
from parallel.schedules.tables import make_schedule as make_pipeline_schedule
from training.config import Config
from training.legal.attention import documents_of
from training.state import balance_mask, decay_mask, is_info, make_state, matrix_dims

Path = tuple[str, ...]
_KEPT: dict[tuple[str, ...], Any] = {}  # what is the same for every mesh, by the configs that it depends on
MOST_KEPT = 64
SQUARE = ("chunked", "reference", "xla")  # backends that hold scores


@dataclass(frozen=True)
class Parameter:
    """One array of the parameter tree. segment: of layers that it is stacked in; None outside of them."""

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: str
    segment: int | None
    projection: str | None  # the name of the product that it is for

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """One array of the state that is no parameter; owner: the parameter that it is placed like, if any."""

    shape: tuple[int, ...]
    itemsize: int
    owner: Path | None


def kept(make: Callable[[], Any], *configs: Any) -> Any:
    """What `make` gives, made once for configs that read alike."""
    key = (make.__qualname__, *map(repr, configs))
    if key not in _KEPT:
        if len(_KEPT) >= MOST_KEPT:
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[key] = make()
    return _KEPT[key]


def model_of(config: ModelConfig) -> Model:
    """The model of these values, built once a process."""
    return kept(lambda: build_model(config), config)


def parameters_of(model: Model) -> tuple[Parameter, ...]:
    """All of them, layers stacked; in the segment that a pipeline splits the first axis is `stages`."""

    def read() -> tuple[Parameter, ...]:
        found = []
        main = main_segment(model.segments)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.info, is_leaf=is_info):
            names = _names(path)
            segment = int(names[1]) if names[0] == "segments" else None
            axes = ("stages", *leaf.axes[1:]) if segment == main else leaf.axes
            found.append(Parameter(names, leaf.shape, axes, leaf.role, segment, leaf.projection))
        return tuple(found)

    return kept(read, model.config)


def stored_of(config: Config, model: Model) -> tuple[Stored, ...]:
    """Moments, average, counters and the guard's figures."""

    def read() -> tuple[Stored, ...]:
        tx = make_optimizer(
            config.optim,
            make_schedule(config.schedule, num_steps=config.training.num_steps),
            decay_mask=decay_mask(model.info),
            matrices=matrix_dims(model.info),
            balance=balance_mask(model.info),
            balance_rate=config.model.moe.bias_update_rate if config.model.moe else 0.0,
            parts=None,
            muon_dtype=np.dtype("float32"),
            seed=config.seed,
        )
        ema = config.training.ema_decay is not None
        state = jax.eval_shape(lambda key: make_state(model.init(key), tx, ema), jax.random.key(0))
        owners = {p.path for p in parameters_of(model)}
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.replace(params=None)):
            names = _names(path)
            owner = next((names[i:] for i in range(len(names)) if names[i:] in owners), None)
            found.append(Stored(leaf.shape, np.dtype(leaf.dtype).itemsize, owner if leaf.ndim else None))
        return tuple(found)

    moments = (config.optim, config.schedule, config.training.ema_decay is None, config.training.num_steps)
    return kept(read, config.model, *moments)


def _names(path: Any) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def abstract_layout(config: MeshConfig, devices: int) -> Layout:
    """The mesh's sizes and rules, over devices that nobody has. ValueError where they do not multiply out."""
    sizes = mesh_shape(config, devices)
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return Layout(mesh, {name: tuple(axes) for name, axes in config.rules.items()})


def part_of(parameter: Parameter, layout: Layout, leave: tuple[str, ...] = ()) -> int:
    """Elements of a parameter on one device; `leave`: mesh axes along which it was gathered."""
    spec = layout.spec(parameter.axes, parameter.shape, "/".join(parameter.path))
    ways = 1
    for entry in spec:
        names = (entry,) if isinstance(entry, str) else entry or ()
        ways *= math.prod(layout.mesh.shape[name] for name in names if name not in leave)
    return parameter.size // ways


def state_bytes(config: Config, model: Model, layout: Layout) -> tuple[int, int]:
    """(parameters, all else of the state) on one device."""
    parts: Mapping[Path, tuple[int, int]] = {
        p.path: (p.size, part_of(p, layout)) for p in parameters_of(model)
    }
    others = 0
    for array in stored_of(config, model):
        size = math.prod(array.shape)
        if array.owner is not None:
            whole, part = parts[array.owner]
            size = size * part // whole
        others += size * array.itemsize
    return 4 * sum(part for _, part in parts.values()), others


@dataclass(frozen=True)
class MixerSizes:
    """Bytes of what a layer's mixer holds of a microbatch's tokens on one device.

    What `models.mixer.Activations` counts: queries, keys_values, output, products in the compute dtype, the
    rest in float32. statistics: of a softmax with as many places as a row may hold documents where cuDNN
    computes it. scores: of each pair of positions, where they are made.
    """

    queries: float
    keys_values: float
    output: float
    products: float
    statistics: float
    scores: float
    inside: float


@dataclass(frozen=True)
class Sizes:
    """Bytes, unless another unit is named; of a microbatch's tokens on one device, in the compute dtype.

    stream: the residual stream between blocks, which sequence parallelism splits further; whole: before that
    split. mixer: of one layer, the mean over layers; widest: the largest of each; inside: of all mixers of a
    period. wide: one product of the width F (of experts: of all choices). dispatched: tokens on their way to
    experts. layer_weights: parameters of the largest layer in the compute dtype, gathered but for tensor and
    expert parallelism; sharded: whether they had to be gathered. table: float32, of the larger of embedding
    and head, gathered. logits: float32, of a chunk of the loss.
    """

    config: Config
    machine: Machine
    model: Model
    layout: Layout
    attention: str
    itemsize: int
    tokens: float  # not bytes
    microbatches: int  # not bytes
    layers: float  # of one stage; not bytes
    schedule: Schedule | None
    stream: float
    whole: float
    mixer: MixerSizes
    widest: MixerSizes
    inside: float
    wide: float
    gates: int  # not bytes: products of the width F in a layer's forward, before the one back
    dispatched: float
    layer_weights: float
    sharded: bool
    table: float
    logits: float

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.layout.mesh.shape["pipeline"]


def sizes_of(config: Config, machine: Machine, attention: str) -> Sizes:
    """Of a config with its vocabulary known. attention: the backend. ValueError where sizes do not fit."""
    if config.adapter is not None or config.freeze:
        raise ValueError(
            "adapter.* and freeze are not planned: the equations count every weight as trained; adapter=null "
            "freeze=[] plans that, which needs more"
        )
    model, layout = model_of(config.model), abstract_layout(config.mesh, machine.devices)
    m, training, mesh = config.model, config.training, layout.mesh.shape
    pipelined = mesh["pipeline"] > 1
    micro = config.pipeline.microbatches if pipelined else training.accumulation_steps
    itemsize = 4 if training.precision == "float32" or machine.kind == "cpu" else 2
    rows = training.global_batch_size / layout.ways("batch") / micro
    tokens = rows * config.data.seq_len / mesh["context"]
    choices, width = 1, float(m.d_ff)
    if m.moe is not None:
        choices, width = m.moe.experts_per_token, m.moe.d_expert
        width += m.moe.d_expert * m.moe.num_shared_experts / choices
    wide = itemsize * tokens * choices * width / layout.ways("act_mlp")
    mixers = mixers_of(config, model, layout, attention, tokens, itemsize)
    schedule = None
    if pipelined:
        schedule = make_pipeline_schedule(
            config.pipeline.schedule,
            stages=mesh["pipeline"],
            microbatches=config.pipeline.microbatches,
            virtual_stages=config.pipeline.virtual_stages,
        )
    gathered, split = _largest_layer(model, layout)
    tables = [p for p in parameters_of(model) if p.role in ("embedding", "head")]
    share = training.loss_chunk / (layout.ways("batch") * layout.ways("length"))
    return Sizes(
        config=config,
        machine=machine,
        model=model,
        layout=layout,
        attention=attention,
        itemsize=itemsize,
        tokens=tokens,
        microbatches=micro,
        layers=m.num_layers / mesh["pipeline"],
        schedule=schedule,
        stream=itemsize * tokens * m.d_model * mesh["context"] / layout.ways("act_length"),
        whole=itemsize * tokens * m.d_model,
        mixer=MixerSizes(*(sum(sizes) / len(mixers) for sizes in zip(*mixers, strict=True))),
        widest=MixerSizes(*map(max, zip(*mixers, strict=True))),
        inside=max(period_inside(model, mixers)),
        wide=wide,
        gates=2 if m.gated else 1,
        dispatched=itemsize * tokens * choices * m.d_model if m.moe is not None else 0.0,
        layer_weights=itemsize * gathered,
        sharded=split,
        table=4.0 * max(part_of(p, layout, ("fsdp", "expert")) for p in tables),
        logits=4.0 * min(share, tokens) * m.vocab_size / layout.ways("act_vocab"),
    )


def mixers_of(
    config: Config, model: Model, layout: Layout, attention: str, tokens: float, itemsize: int
) -> list[tuple[float, ...]]:
    """The numbers of `MixerSizes` of each layer, in order of segments."""
    m, length = config.model, config.data.seq_len
    heads, keys = layout.ways("act_heads"), layout.ways("act_kv_heads")
    places = documents_of(config) if attention == "cudnn" else 1
    # Scores of all pairs, or of a block of queries with all keys.
    block = min(QUERY_BLOCK, length) if attention == "chunked" else length / layout.mesh.shape["context"]
    pairs = block * layout.mesh.shape["context"] if attention in SQUARE else 0
    found = []
    for segment in model.segments:
        for spec in segment.period * segment.count:
            a = mixer(spec.mixer).activations(m)
            more = (kv_repeats(m.num_kv_heads, layout) / keys - 1 / heads) * a.keys_values
            sizes = (
                itemsize * a.queries / heads,
                itemsize * (a.keys_values / heads + more),
                itemsize * a.output / heads,
                itemsize * (a.products / heads + more),
                4 * a.statistics * places / heads,
                4 * a.squares / heads * pairs,
                4 * a.inside / heads,
            )
            found.append(tuple(tokens * size for size in sizes))
    return found


def period_inside(model: Model, mixers: list[tuple[float, ...]]) -> list[float]:
    """Of each segment, what the mixers of one period hold inside: its layers are rematerialized together."""
    found, first = [], 0
    for segment in model.segments:
        found.append(sum(sizes[-1] for sizes in mixers[first : first + len(segment.period)]))
        first += segment.count * len(segment.period)
    return found


def _largest_layer(model: Model, layout: Layout) -> tuple[float, bool]:
    """Elements of a layer once gathered, the largest over segments, and whether that took any gathering."""
    found: dict[tuple[str, ...], float] = {}
    split = False
    for p in parameters_of(model):
        if p.segment is None:
            continue
        layers = p.shape[0] // (layout.mesh.shape["pipeline"] if p.axes[0] == "stages" else 1)
        whole = part_of(p, layout, gathered_axes(p))
        split = split or whole != part_of(p, layout)
        found[p.path[:3]] = found.get(p.path[:3], 0.0) + whole / layers
    return max(found.values()), split


def gathered_axes(p: Parameter) -> tuple[str, ...]:
    """Mesh axes along which a parameter is gathered before it is used: experts stay where they are."""
    return ("fsdp",) if "experts" in p.axes else ("fsdp", "expert")
