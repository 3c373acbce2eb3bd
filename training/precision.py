"""What `training.precision` means on the devices at hand: dtypes, the products of projections, and the words.

Eight bits run where hardware multiplies them. Where it does not, XLA would quietly multiply in sixteen,
slower than bfloat16 and no more exact: that is refused, but on the CPU, where it is for tests.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp

from kernels.einsum import Projector
from kernels.einsum_8bit import PRODUCTS
from models.ops import Ops
from models.weights import rounded_product
from training.config import weight_grid

FP8_CAPABILITY = (8, 9)  # NVIDIA's Ada; Hopper is 9.0
FP8_TPUS = ("TPU7x",)  # the first with such units: v5p and v6e multiply int8 and bfloat16


def compute_dtype(precision: str, platform: str) -> Any:
    """Of activations. `auto` is bfloat16 where the hardware is built for it, float32 on CPU.

    Masters are always float32; `fp8` and `int8` are of projections only, and the rest is as under `auto`.
    """
    if precision in ("auto", *PRODUCTS):
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def precision_problem(precision: str, device: Any) -> str | None:
    """Why this device cannot multiply in `precision`, with what it can; None where it can."""
    if precision != "fp8" or device.platform == "cpu":
        return None
    kind = getattr(device, "device_kind", device.platform)
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform in ("gpu", "cuda"):
        known = capability.replace(".", "").isdigit()  # AMD's are names
        if known and tuple(map(int, capability.split("."))) >= FP8_CAPABILITY:
            return None
        has = f"compute capability {capability}, below {'.'.join(map(str, FP8_CAPABILITY))}"
    else:
        if any(kind.startswith(name) for name in FP8_TPUS):
            return None
        has = f"none; {', '.join(FP8_TPUS)} has them"
    return (
        f"training.precision=fp8 needs units for eight-bit floats, but {kind} has {has}; "
        "use training.precision=int8 or bfloat16"
    )


def build_projector(training: Any, device: Any) -> Projector:
    """The value of `Ops.project`. Raises ValueError where the device cannot multiply so."""
    if reason := precision_problem(training.precision, device):
        raise ValueError(reason)
    bits, grid = training.weight_bits, weight_grid(training.weight_bits)
    if grid is not None and training.precision in PRODUCTS:
        raise ValueError(
            f"training.weight_bits={bits} and training.precision={training.precision} would both round "
            "weights; use training.precision=bfloat16, or training.weight_bits=null"
        )
    if training.full_precision and training.precision not in PRODUCTS and grid is None:
        raise ValueError(
            f"training.full_precision={training.full_precision} has no effect under training.precision="
            f"{training.precision}; use fp8 or int8, or leave it []"
        )
    if grid is not None:
        rounded = partial(rounded_product, bits=grid[0], group=grid[1])
        return Projector(keep=tuple(training.full_precision), rounded=rounded)
    if training.precision not in PRODUCTS:
        return Projector()
    return Projector(quantized=PRODUCTS[training.precision], keep=tuple(training.full_precision))


def precision_row(training: Any, ops: Ops, platform: str) -> str:
    """For the table at start-up: what multiplies in what."""
    dtype = jnp.dtype(ops.compute_dtype)
    if training.weight_bits is not None:
        kept = f", but for {', '.join(training.full_precision)}" if training.full_precision else ""
        return (
            f"projections' weights on a grid of {training.weight_bits} bits{kept}; {dtype}, float32 masters"
        )
    if training.precision not in PRODUCTS:
        if ops.factor_dtype in (None, dtype):
            return f"{dtype} compute, float32 masters"
        return f"{ops.factor_dtype} products, {dtype} activations and masters"
    left_out = ", ".join([*training.full_precision, "experts", "head"])
    emulated = ", emulated on the CPU" if platform == "cpu" else ""
    return f"{training.precision} projections{emulated}; {dtype} activations, {left_out}; float32 masters"
