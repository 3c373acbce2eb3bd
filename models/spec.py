"""Which layers a model has, in what order: static, hashable, known before any array."""

from dataclasses import dataclass, replace

from models.config import ModelConfig


@dataclass(frozen=True)
class LayerSpec:
    """What differs between layers: a window (positions seen, itself included), rotation, experts."""

    window: int | None
    rope_theta: float
    rope_scaled: bool = True  # Gemma 3 stretches the rotations of its global layers only
    moe: bool = False  # experts instead of one feed-forward


@dataclass(frozen=True)
class Segment:
    """`count` repetitions of a period of layers; each place in the period has parameters [count, ...]."""

    count: int
    period: tuple[LayerSpec, ...]


def layer_spec(config: ModelConfig, kind: str) -> LayerSpec:
    """The spec of a "local" or "global" layer."""
    own_theta = kind == "local" and config.rope_local_theta is not None
    theta = config.rope_local_theta if own_theta else config.rope_theta
    assert theta is not None
    return LayerSpec(config.window if kind == "local" else None, float(theta), not own_theta)


def make_segments(config: ModelConfig) -> tuple[Segment, ...]:
    """Whole periods of `window_pattern`, and a segment for what is left (Gemma 3: 26 layers in sixes).

    First dense layers and those with experts have different parameters: they never share a segment.
    """
    pattern = [layer_spec(config, kind) for kind in config.window_pattern]
    specs = tuple(pattern[i % len(pattern)] for i in range(config.num_layers))
    dense = config.num_layers if config.moe is None else config.moe.first_dense_layers
    parts = (specs[:dense], tuple(replace(spec, moe=True) for spec in specs[dense:]))
    return tuple(segment for part in parts for segment in split_periods(part, len(pattern)))


def split_periods(specs: tuple[LayerSpec, ...], period: int) -> list[Segment]:
    """Layers that repeat every `period`: a segment of whole periods and one of the rest, if there are any."""
    whole = len(specs) // period * period
    return [fold_repetition(part) for part in (specs[:whole], specs[whole:]) if part]


def fold_repetition(specs: tuple[LayerSpec, ...]) -> Segment:
    """The shortest period whose repetition gives `specs`: fewer distinct layers are less to compile."""
    for size in range(1, len(specs) + 1):
        if len(specs) % size == 0 and specs[:size] * (len(specs) // size) == specs:
            return Segment(len(specs) // size, specs[:size])
    raise AssertionError("a sequence repeats itself at least once")
