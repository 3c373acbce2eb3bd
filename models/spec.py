"""Which layers a model has, in what order: static, hashable, known before any array."""

from dataclasses import dataclass

from models.config import ModelConfig


@dataclass(frozen=True)
class LayerSpec:
    """What differs between a model's layers: a window (positions seen, itself included) and the rotation."""

    window: int | None
    rope_theta: float
    rope_scaled: bool = True  # Gemma 3 stretches the rotations of its global layers only


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
    """Whole periods of `window_pattern`, and a segment for what is left (Gemma 3: 26 layers in sixes)."""
    pattern = tuple(layer_spec(config, kind) for kind in config.window_pattern)
    whole, rest = divmod(config.num_layers, len(pattern))
    parts = [pattern * whole] if whole else []
    parts += [pattern[:rest]] if rest else []
    return tuple(fold_repetition(specs) for specs in parts)


def fold_repetition(specs: tuple[LayerSpec, ...]) -> Segment:
    """The shortest period whose repetition gives `specs`: fewer distinct layers are less to compile."""
    for size in range(1, len(specs) + 1):
        if len(specs) % size == 0 and specs[:size] * (len(specs) // size) == specs:
            return Segment(len(specs) // size, specs[:size])
    raise AssertionError("a sequence repeats itself at least once")
