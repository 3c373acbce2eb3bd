"""What share of the hardware a run uses: model FLOPs a token, the device's peak, MFU under two conventions.

MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is tokens/s times the FLOPs that the *model* needs
for a token, over the peak of all devices; recomputation does not count. Papers disagree on attention:
`mfu_full` counts the whole T x T square, `mfu_causal` the half that a causal mask leaves. Both are reported.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from parallel.hardware import HardwareConfig

# Dense bf16 TFLOP/s of a JAX device, by the beginning of `device_kind`; the longest match wins. From
# NVIDIA's datasheets of A100, A10, A40, L4, L40S, H100, H200, GH200, HGX B200, GB200 (from H100 on they
# print it with 2:4 sparsity: half is dense); Google's system architecture pages of TPU v3 to
# TPU7x (v3 and 7x show each of a chip's two cores as a device, so theirs is half a chip).
_PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v4 lite": 137.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
}
_MEASURE_SECONDS = 0.2


@dataclass(frozen=True)
class Flops:
    """Training FLOPs a token (thrice the forward, adapters less) and the peak of all devices in FLOP/s."""

    causal: float
    full: float
    peak: float

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu_causal` and `mfu_full`, as shares of 1, at this many tokens a second over all devices."""
        return {
            "mfu_causal": tokens_per_second * self.causal / self.peak,
            "mfu_full": tokens_per_second * self.full / self.peak,
        }


def training_flops(
    per_token: Mapping[str, float], *, peak_per_device: float, num_devices: int, frozen: bool = False
) -> Flops:
    """From a model's forward FLOPs a token: keys `matmul`, `attention_causal`, `attention_full`.

    frozen: no weight has a gradient of its own (adapters), which leaves two of a product's three passes.
    """
    passes = 2 if frozen else 3
    return Flops(
        causal=passes * per_token["matmul"] + 3 * per_token["attention_causal"],
        full=passes * per_token["matmul"] + 3 * per_token["attention_full"],
        peak=peak_per_device * num_devices,
    )


def peak_flops(hardware: HardwareConfig, platform: str, device_kind: str) -> tuple[float, str]:
    """FLOP/s of one device and how that is known: the config, a datasheet, a matrix product timed here."""
    if hardware.peak_tflops is not None:
        if not hardware.peak_tflops > 0:
            raise ValueError(
                f"hardware.peak_tflops={hardware.peak_tflops} must be above 0; null finds it out"
            )
        return hardware.peak_tflops * 1e12, f"hardware.peak_tflops={hardware.peak_tflops:g}"
    known = datasheet(device_kind)
    if known is not None:
        return known * 1e12, f"datasheet of {device_kind}, dense bf16"
    return _measured_peak(platform)


def datasheet(device_kind: str) -> float | None:
    """Dense bf16 TFLOP/s of a JAX device; None where none is known."""
    known = [kind for kind in _PEAK_TFLOPS if _is_kind(device_kind, kind)]
    return _PEAK_TFLOPS[max(known, key=len)] if known else None


def _is_kind(device_kind: str, name: str) -> bool:
    """Whether `name` is the beginning in whole words: "NVIDIA A10" does not begin "NVIDIA A100"."""
    rest = device_kind[len(name) :]
    return device_kind.startswith(name) and not rest[:1].isalnum()


def _measured_peak(platform: str) -> tuple[float, str]:
    size, dtype = (1024, jnp.float32) if platform == "cpu" else (8192, jnp.bfloat16)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()  # compile
    best, end = float("inf"), time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    how = f"measured: {jnp.dtype(dtype).name} matrix product of {size}"
    # Devices forced onto one host are slices of the same cores: one alone was timed with all of them.
    share = jax.local_device_count() if platform == "cpu" else 1
    if share > 1:
        how += f", shared by {share} devices of this host"
    return 2 * size**3 / best / share, how
