"""Model FLOPs utilisation: the arithmetic, and where the peak comes from."""

import pytest

from parallel.hardware import HardwareConfig
from training.flops import peak_flops, training_flops


def test_mfu_is_achieved_over_peak_under_both_conventions():
    flops = training_flops(
        {"matmul": 100e6, "attention_causal": 10e6, "attention_full": 20e6},
        peak_per_device=1e12,
        num_devices=4,
    )
    # 2,000 tokens/s x 3 x 110 MFLOP = 0.66 TFLOP/s, of 4 TFLOP/s.
    assert flops.mfu(2000.0) == pytest.approx({"mfu_causal": 0.165, "mfu_full": 0.18})


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v5", 459.0),
        ("TPU v6 lite", 918.0),
    ],
)
def test_known_devices_take_their_datasheet(kind, tflops):
    flops, how = peak_flops(HardwareConfig(), "gpu", kind)
    assert flops == pytest.approx(tflops * 1e12)
    assert kind in how


def test_the_config_wins_over_the_datasheet_and_nonsense_is_refused():
    flops, how = peak_flops(HardwareConfig(peak_tflops=2.5), "gpu", "NVIDIA H100 80GB HBM3")
    assert flops == 2.5e12 and "hardware.peak_tflops=2.5" in how
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"hardware\.peak_tflops"):
            peak_flops(HardwareConfig(peak_tflops=bad), "cpu", "cpu")


def test_an_unknown_device_is_measured_and_says_so():
    flops, how = peak_flops(HardwareConfig(), "cpu", "cpu")
    assert 1e7 < flops < 1e15
    assert how.startswith("measured") and "8 devices" in how
