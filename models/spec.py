"""Which layers a model has, in what order: static, hashable, known before any array."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter

from models.config import ModelConfig

Kind = tuple[str, ...]  # of a layer: "local", "global" or "nope", its mixer, and "experts" or "mlp"
Kinds = tuple[Kind, ...]  # of layers, in order
Repeated = tuple[int, Kinds]  # how many times, and what


@dataclass(frozen=True)
class LayerSpec:
    """What differs between layers: a window (positions seen, itself included), rotation, experts, mixer."""

    window: int | None
    rope_theta: float
    rope_scaled: bool = True  # Gemma 3 stretches the rotations of its global layers only
    moe: bool = False  # experts instead of one feed-forward
    mixer: str = "attention"  # what mixes the tokens: a file of models/mixers
    rope: bool = True  # whether queries and keys are rotated, where the model's positions are rotations


@dataclass(frozen=True)
class Segment:
    """`count` repetitions of a period of layers; each place in the period has parameters [count, ...]."""

    count: int
    period: tuple[LayerSpec, ...]


def kinds_of(config: ModelConfig) -> Kinds:
    """The repeating order of layer kinds: windows', mixers' and the experts' patterns beside each other."""
    feed_forwards = ["mlp"] if config.moe is None else config.moe.layer_pattern
    patterns = (config.window_pattern, config.mixers, feed_forwards)
    length = math.lcm(*map(len, patterns))
    return tuple(tuple(pattern[i % len(pattern)] for pattern in patterns) for i in range(length))


def layer_spec(
    config: ModelConfig, window: str, mixer: str = "attention", feed_forward: str = "mlp"
) -> LayerSpec:
    """The spec of a layer that is "local", "global" or "nope", with this mixer, and experts or none."""
    own_theta = window == "local" and config.rope_local_theta is not None
    theta = config.rope_local_theta if own_theta else config.rope_theta
    assert theta is not None
    seen = config.window if window == "local" else None
    moe = feed_forward == "experts"
    return LayerSpec(seen, float(theta), not own_theta, moe, mixer, rope=window != "nope")


def make_segments(config: ModelConfig, num_layers: int | None = None) -> tuple[Segment, ...]:
    """The layers as `cut_layers` cuts them; of the first `first_dense_layers` none has experts.

    num_layers: instead of the config's own.
    """
    num_layers = num_layers or config.num_layers
    # All of a dense model is of one kind, and so are all layers of one whose experts begin at once.
    dense = num_layers if config.moe is None else config.moe.first_dense_layers
    pattern = kinds_of(config)
    specs = {kind: layer_spec(config, *kind) for kind in pattern}
    segments, first = [], 0
    for count, kinds in cut_layers(pattern, num_layers, dense):
        period = tuple(specs[kind] if first >= dense else replace(specs[kind], moe=False) for kind in kinds)
        segments.append(Segment(count, period))
        first += count * len(period)
    return tuple(segments)


@lru_cache(maxsize=4096)  # the planner asks about the same few models for thousands of meshes
def cut_layers(pattern: Kinds, num_layers: int, dense: int) -> tuple[Repeated, ...]:
    """Repetitions that are the layers in order: what a segment is, before its kinds have become specs.

    Whole periods of the pattern, and one for what is left (Gemma 3: 26 layers in sixes). The first `dense`
    layers and those behind them have different parameters: they never share a segment. A checkpoint's names
    count segments and places, so that what comes out for a pattern may not change.
    """
    kinds = tuple(pattern[i % len(pattern)] for i in range(num_layers))
    cut: list[Repeated] = []
    for part in filter(None, (kinds[:dense], kinds[dense:])):
        whole = len(part) // len(pattern) * len(pattern)
        pieces = [fold_repetition(piece) for piece in (part[:whole], part[whole:]) if piece]
        # A pattern as long as the model would be one period of all layers, each compiled by itself.
        listed = num_layers <= len(pattern) and pieces[0][0] == 1
        cut += cheapest_cut(part) if listed else pieces
    return tuple(cut)


def cheapest_cut(kinds: Kinds) -> tuple[Repeated, ...]:
    """The cut into repetitions whose periods are the fewest layers to compile; of equals the fewest pieces.

    Of these the one with the shortest last piece: what is left of a period comes last, as in `cut_layers`.
    """
    best: list[tuple[int, int, tuple[Repeated, ...]]] = [(0, 0, ())]  # of the first 0, 1, 2, ... layers
    for end in range(1, len(kinds) + 1):
        ways = []
        for start in reversed(range(end)):
            (compiled, pieces, cut), last = best[start], fold_repetition(kinds[start:end])
            ways.append((compiled + len(last[1]), pieces + 1, (*cut, last)))
        best.append(min(ways, key=itemgetter(0, 1)))
    return best[-1][2]


def fold_repetition(kinds: Kinds) -> Repeated:
    """The shortest period whose repetition gives `kinds`: fewer distinct layers are less to compile."""
    for size in range(1, len(kinds) + 1):
        if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds:
            return len(kinds) // size, kinds[:size]
    raise AssertionError("a sequence repeats itself at least once")
