"""Bytes of one layer's activations on one device, of one microbatch: the letters of the analytic model.

B rows, T position, D model, N query and K key heads, H their size, F feed-forward, V vocabulary, L layers.
"""

from dataclasses import dataclass

from kernels.attention import QUERY_BLOCK
from kernels.backends import documents_of
from models.transformer import Model
from parallel.axes import Layout, kv_repeats
from parallel.hardware import Machine
from parallel.schedules.tables import Schedule, make_schedule
from planner.shapes import Parameter, abstract_layout, model_of, parameters_of, part_of
from training.config import Config


@dataclass(frozen=True)
class Sizes:
    """Bytes, unless another unit is named; of a microbatch's tokens on one device, in the compute dtype.

    stream: the residual stream between blocks, which sequence parallelism splits further; whole: before that
    split. queries, keys_values: of one layer. statistics: of attention's softmax, float32, with as many
    places as a row may hold documents where cuDNN computes it. wide: one product of the width F (of experts:
    of all choices). dispatched: tokens on their way to experts. layer_weights: parameters of the largest
    layer in the compute dtype, gathered but for tensor and expert parallelism; sharded: whether they had to
    be gathered. table: float32, of the larger of embedding and head, gathered. logits: float32, of a chunk of
    the loss.
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
    queries: float
    keys_values: float
    statistics: float
    scores: float
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
    model, layout = model_of(config.model), abstract_layout(config.mesh, machine.devices)
    m, training, mesh = config.model, config.training, layout.mesh.shape
    pipelined = mesh["pipeline"] > 1
    micro = config.pipeline.microbatches if pipelined else training.accumulation_steps
    itemsize = 4 if training.precision == "float32" or machine.kind == "cpu" else 2
    rows = training.global_batch_size / layout.ways("batch") / micro
    tokens = rows * config.data.seq_len / mesh["context"]
    heads = m.num_heads / layout.ways("act_heads")
    keys = m.num_kv_heads * kv_repeats(m.num_kv_heads, layout) / layout.ways("act_kv_heads")
    value = m.head_dim if m.mla is None else m.mla.v_head_dim
    places = documents_of(config) if attention == "cudnn" else 1
    choices, width = 1, float(m.d_ff)
    if m.moe is not None:
        choices, width = m.moe.experts_per_token, m.moe.d_expert
        width += m.moe.d_expert * m.moe.num_shared_experts / choices
    wide = itemsize * tokens * choices * width / layout.ways("act_mlp")
    block = min(QUERY_BLOCK, config.data.seq_len) if attention == "chunked" else tokens / max(rows, 1)
    quadratic = attention in ("chunked", "reference", "xla")
    schedule = None
    if pipelined:
        schedule = make_schedule(
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
        queries=itemsize * tokens * heads * (m.head_dim + value) / 2,
        keys_values=itemsize * tokens * keys * (m.head_dim + value),
        statistics=4 * tokens * heads * places,
        scores=4 * rows * heads * block * config.data.seq_len if quadratic else 0.0,
        wide=wide,
        gates=2 if m.gated else 1,
        dispatched=itemsize * tokens * choices * m.d_model if m.moe is not None else 0.0,
        layer_weights=itemsize * gathered,
        sharded=split,
        table=4.0 * max(part_of(p, layout, ("fsdp", "expert")) for p in tables),
        logits=4.0 * min(share, tokens) * m.vocab_size / layout.ways("act_vocab"),
    )


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
