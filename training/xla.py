"""What XLA is asked for beyond its defaults: a few named sets of compiler options, and those that must be.

They are handed to each compilation, never through the environment: two programs of one process may differ,
and the manifest records what a run was compiled with. Options come and go with XLA's releases, so
`check_options` asks the installed compiler before anything large is compiled.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from common.host import ONE_ORDER, one_order
from parallel.config import XLA_PROFILES
from training.state import is_info

XlaOptions = dict[str, Any]

# One order for independent collectives, and a schedule that keeps less alive: on one CPU a fifth less memory
# at the same speed.
# Not pipelined collectives: the loops that they cut up have no trip count that a reader of the program could
# know, and jaxlib 0.11 renamed them. Nor libtpu's asynchronous fusions: 0.0.52 refuses v6e with them.
GPU_CLUSTER = {"xla_gpu_enable_latency_hiding_scheduler": True}
COMBINE = (
    "xla_gpu_all_gather_combine_threshold_bytes",
    "xla_gpu_all_reduce_combine_threshold_bytes",
    "xla_gpu_reduce_scatter_combine_threshold_bytes",
)
# A product and its collective are cut up to overlap; asked for by name, because it compiles 3 times as long.
WINDOWED = {"xla_gpu_threshold_for_windowed_einsum_mib": 0}
LEAST_COMBINED = 30 << 20  # bytes: XLA's own threshold
# XLA describes the first as the guarantee of run-to-run determinism on GPUs; the others stand by name, so
# that a release in which it comes to mean less still takes them, or refuses them aloud.
DETERMINISTIC_GPU = {
    "xla_gpu_deterministic_ops": True,  # reductions, scatters and cuDNN's backward without atomic adds
    "xla_gpu_exclude_nondeterministic_ops": True,  # what has no such form does not compile
    "xla_gpu_autotune_level": 0,  # no kernel is chosen by a stopwatch
}
# Platforms that can repeat themselves, and what that hangs on beside devices and packages.
REPEATS = {
    "cpu": "and an equal number of threads: sums are split by it",
    "gpu": "in an equal topology: collectives add in the order of their ring or tree",
    "tpu": "in an equal topology",
}
PLATFORMS = {
    "cpu": "cpu",
    "gpu": "gpu",
    "gpu_cluster": "gpu",
    "gpu_tensor": "gpu",
    "tpu": "tpu",
}  # of a profile


def family(platform: str) -> str:
    """`cuda` and `rocm` are GPUs."""
    return "gpu" if platform in ("cuda", "rocm") else platform


def resolve_profile(name: str, platform: str, devices: int) -> str:
    """What `hardware.xla` means on these devices: `default` by platform and number.

    Raises ValueError for a profile of another platform.
    """
    platform = family(platform)
    if name == "default":
        name = "gpu_cluster" if platform == "gpu" and devices > 1 else platform
        return name if name in PLATFORMS else "none"
    if name != "none" and PLATFORMS[name] != platform:
        fit = [profile for profile in XLA_PROFILES if PLATFORMS.get(profile, platform) == platform]
        raise ValueError(
            f"hardware.xla={name} is for {PLATFORMS[name]} devices, and these are {platform}; use one of "
            f"{', '.join(fit)}"
        )
    return name


def profile_options(profile: str, *, layer_bytes: int = 0) -> XlaOptions:
    """The options of a resolved profile.

    layer_bytes: float32 parameters of the largest layer: collectives of one layer are combined into one.
    """
    if profile == "cpu":
        return dict(ONE_ORDER)
    if profile in ("gpu_cluster", "gpu_tensor"):
        windowed = WINDOWED if profile == "gpu_tensor" else {}
        combined = dict.fromkeys(COMBINE, max(layer_bytes, LEAST_COMBINED))
        return {**GPU_CLUSTER, **combined, **windowed}
    return {}  # none; and gpu and tpu, because XLA's defaults are made for them


def needed_options(deterministic: bool, platform: str, devices: int = 1) -> XlaOptions:
    """What a program must be compiled with, whatever the profile.

    On several CPU devices collectives must be reached in one order: `common.host.one_order`.

    On a GPU, atomic adds and kernels chosen by timing make two runs differ in the last bits; deterministic
    operations cost some speed. CPU and TPU repeat themselves as they are. Raises ValueError for devices of
    which nobody has said that they can.
    """
    needed = one_order(platform, devices)
    if not deterministic:
        return needed
    if family(platform) not in REPEATS:
        raise ValueError(
            f"deterministic=true: it is not known how to make {platform} devices repeat themselves; "
            f"use deterministic=false, or one of {', '.join(REPEATS)}"
        )
    return needed | (dict(DETERMINISTIC_GPU) if family(platform) == "gpu" else {})


def deterministic_row(platform: str) -> str:
    """For the start-up table: what equal bits hang on, where they are asked for."""
    return f"equal bits on equal devices and packages, {REPEATS[family(platform)]}"


def largest_layer_bytes(segments: Mapping[str, Any]) -> int:
    """Bytes of one layer's parameters, the largest; segments: ParamInfo [n, ...] by segment and place."""

    def size(place: Any) -> int:
        leaves = jax.tree.leaves(place, is_leaf=is_info)
        return sum(math.prod(leaf.shape[1:]) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)

    return max(size(place) for segment in segments.values() for place in segment.values())


def options_line(options: Mapping[str, Any]) -> str:
    """For the start-up table."""
    words = (f"{name.removeprefix('xla_')}={str(value).lower()}" for name, value in options.items())
    return ", ".join(words) or "XLA's defaults"


def check_options(options: Mapping[str, Any], device: Any, profile: str) -> None:
    """Compile next to nothing with them, for `device`. Raises ValueError, naming one that is refused."""
    if not options:
        return
    nothing = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    lowered = jax.jit(jnp.negative).lower(nothing)
    try:
        lowered.compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error), options)
        if refused is None:
            raise
        raise ValueError(
            f"hardware.xla={profile}: jaxlib {jax.lib.__version__} does not take the compiler option "
            f"{refused}; use hardware.xla=none, or the versions of the lock file"
        ) from error


def refusal(message: str, options: Mapping[str, Any]) -> str | None:
    """`option=value` of the option that XLA's message is about; None where it is about something else."""
    if not re.search(r"No such compile option|While setting option", message):
        return None
    return next(
        (f"{name}={options[name]}" for name in re.findall(r"xla_\w+", message) if name in options), None
    )
