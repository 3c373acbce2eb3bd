"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them over longer texts."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.config import ModelConfig, RopeScaling
from models.spec import LayerSpec


def rope_frequencies(
    config: ModelConfig, spec: LayerSpec, size: int | None = None
) -> tuple[np.ndarray, float]:
    """Radians per position of each of the H/2 planes (float64), and the factor on rotated vectors.

    size: H, where it is not the whole head that is rotated.
    """
    size = size or config.head_dim
    # In numpy and float64: static numbers, rounded once, where they meet positions.
    planes = np.arange(0, size, 2, dtype=np.float64) / size
    frequencies = spec.rope_theta**-planes
    scaling = config.rope_scaling
    if scaling is None or not spec.rope_scaled:
        return frequencies, 1.0
    if scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _yarn(frequencies, scaling, spec.rope_theta, size)
    elif scaling.kind == "longrope":
        # By what the model is for and not by the text at hand, which grows while it is written.
        is_long = config.max_seq_len > scaling.original_length
        frequencies = frequencies / np.asarray(scaling.long_factor if is_long else scaling.short_factor)
    else:
        frequencies = frequencies / scaling.factor
    return frequencies, scaling.amplitude


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: slow planes are stretched, fast ones kept, others blended by turns in the old context."""
    # Planes that turned many times within the old context know all angles and are kept; those that never came
    # round would meet new ones, and are slowed.
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, theta: float, size: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over planes between beta_fast and beta_slow turns."""

    def plane(turns: float) -> float:
        ratio = scaling.original_length / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(theta))

    # The plane that makes so many turns in the old context; theta^(-2i/size) solved for i.
    low, high = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 0.001), 0.0, 1.0)
    return stretched * frequencies / scaling.factor + (1.0 - stretched) * frequencies


def rotate(
    xs: tuple[Float[Array, "B T _ H"], ...],
    positions: Int[Array, "B T"],
    frequencies: np.ndarray,
    amplitude: float,
    materialize: Callable[[Array], Array] = lambda x: x,
) -> tuple[Float[Array, "B T _ H"], ...]:
    """Turn plane i, made of elements i and i + H/2, by position * frequency_i; computed in float32.

    `materialize` may hold sines and cosines [B, T, H/2] fast, see `models.ops.Ops`.
    """
    # Positions of a document and not of the row, so that packing documents together changes none of them.
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cos, sin = (materialize(wave(angles) * amplitude)[:, :, None] for wave in (jnp.cos, jnp.sin))

    def turn(x: Array) -> Array:
        # Halves and not neighbours, as Hugging Face's checkpoints have it: two contiguous slices, no shuffle
        # of elements.
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    return tuple(turn(x) for x in xs)
