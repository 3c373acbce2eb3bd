"""A step's memory by equations: exact for what it is given, by structure for what is kept in between.

    temporaries = kept + working + tables + accumulators

    kept          L k(policy): what layers leave for the backward pass; in a pipeline twice that of a stage's
                  layers, and a stream for each microbatch on its way
    working       w_F F + w_D (D + N + 2K) + w_I I + w_W W + w_X X: the layer that goes backward: products of
                  width F and their gradients, streams and projections, what recurrences are made of, its
                  weights gathered and their gradients before they are scattered, tokens sent to experts
    tables        w_V V: float32 gradients of embedding and head before they are scattered
    accumulators  a second set of gradients where microbatches add up

k: `full` the layer's input; `attention` that, queries, keys, values, attention's output and statistics;
`dots` that and the wide products; `offload` as `attention` without queries, keys and values; `none`
everything, float32 where the model computes so. The weights w are how XLA schedules and shares buffers, and
differ between its compilers: they were fitted to 36 GPU and 9 TPU programs of Llama, Gemma and Qwen shapes
(JAX 0.10.2). docs/planner-model.md has the errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from data.batch import TEXT
from planner.sizes import Sizes, state_bytes
from training.preflight import Memory


@dataclass(frozen=True)
class Weights:
    """What multiplies each size in the working set; see above."""

    wide: float
    streams: float
    weights: float
    tables: float
    dispatched: float = 2.2
    scores: float = 2.0


COMPILERS: Mapping[str, Weights] = {
    "gpu": Weights(wide=5.0, streams=3.1, weights=3.5, tables=1.5),
    "tpu": Weights(wide=16.0, streams=10.0, weights=1.5, tables=2.2),
    "cpu": Weights(wide=8.0, streams=6.0, weights=2.0, tables=1.5),
}
IN_STAGES = 1.0  # of weights, where a pipeline's ticks gather them one layer after another
UNSHARDED = 1.0  # of weights that lie whole on a device: their copy in the compute dtype
INSIDE = 2.2  # of what a recurrence is made of: values and gradients; 2 compiled hybrids for H100s
TAPS = 2.8  # zero_bubble keeps a layer's inputs of products and their cotangents, some of them in float32
NONE_WIDE, NONE_STREAM = 11, 17  # of `none`: bytes a token, element of a width and byte of the compute dtype


def memory_of(sizes: Sizes) -> Memory:
    """Bytes by class."""
    config = sizes.config
    parameters, others = state_bytes(config, sizes.model, sizes.layout)
    batch = sizes.tokens * sizes.microbatches * 4 * len(TEXT)
    temporaries = kept(sizes) + working(sizes) + accumulators(sizes, parameters)
    return Memory(
        parameters=parameters,
        optimizer=others,
        gradients=parameters,
        batch=round(batch),
        temporaries=round(temporaries),
    )


def kept_by_a_layer(sizes: Sizes) -> float:
    """k(policy) of one layer and microbatch."""
    s, policy = sizes, sizes.config.training.remat
    if policy == "full":
        return s.stream
    m = s.config.model
    if policy == "none":
        inside = NONE_WIDE * s.wide + NONE_STREAM * s.stream
        return inside + s.mixer.scores + s.mixer.inside
    output = s.mixer.output + s.mixer.statistics
    if policy == "offload":
        return s.stream + output
    if policy == "attention":
        return s.stream + output + s.mixer.queries + s.mixer.keys_values
    return s.stream + output + s.mixer.products + (s.gates * s.wide if m.moe is None else 0.0)


def kept(sizes: Sizes) -> float:
    """What all layers leave for the backward pass, and the microbatches between stages."""
    layers = sizes.layers * kept_by_a_layer(sizes)
    schedule = sizes.schedule
    if schedule is None:
        return layers
    taps = 0.0
    if schedule.split:
        each = sizes.gates * sizes.wide + 2 * sizes.stream + sizes.mixer.products
        taps = TAPS * schedule.weight_slots[2] * sizes.layers * each
    return 2 * layers / schedule.chunks + schedule.peak_inputs * sizes.stream + taps


def working(sizes: Sizes) -> float:
    """The layer that goes backward, or the loss where that is larger, and the tables' gradients."""
    s, w = sizes, COMPILERS[sizes.machine.kind]
    weights = IN_STAGES if s.stages > 1 else w.weights
    products = (s.gates + 1) / 3 * w.wide * s.wide
    streams = w.streams * (s.whole + s.widest.queries + s.widest.keys_values)
    layer = products + streams + w.dispatched * s.dispatched + w.scores * s.widest.scores
    layer += INSIDE * s.inside
    layer += (weights if s.sharded else UNSHARDED) * s.layer_weights
    tables = w.tables * s.table if s.sharded else 0.0
    return max(layer, s.logits) + tables


def accumulators(sizes: Sizes, parameters: int) -> float:
    """Gradients that microbatches add up in, beside those of one."""
    return float(parameters) if sizes.stages == 1 and sizes.microbatches > 1 else 0.0
