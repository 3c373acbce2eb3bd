"""A step that a device cannot hold is refused before it runs, in the planner's words."""

from types import SimpleNamespace

import pytest

from parallel.hardware import DeviceConfig, HardwareConfig
from training import preflight
from training.loop import fit
from training.preflight import capacity

KNOWN = HardwareConfig(name="h200", device=DeviceConfig(memory_gib=139.0))


def device(platform="gpu", stats=None):
    return SimpleNamespace(platform=platform, device_kind="a device", memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("hardware", "asked", "expected"),
    [
        (KNOWN, device(stats={"bytes_limit": 100}), 100),  # the device's own word counts
        (KNOWN, device(stats=None), 139 * 2**30),
        (HardwareConfig(), device(stats={"bytes_limit": 100}), 100),
        (HardwareConfig(), device(stats={}), None),
        (KNOWN, device("cpu", {"bytes_limit": 100}), 2**30),  # one of eight on this machine
        (HardwareConfig(device=DeviceConfig(preflight=False)), device("cpu"), None),
        (HardwareConfig(device=DeviceConfig(preflight=False)), device(stats={"bytes_limit": 100}), None),
    ],
)
def test_what_a_device_can_hold(hardware, asked, expected, monkeypatch):
    monkeypatch.setattr(preflight, "machine_memory", lambda: 8 * 2**30)
    assert capacity(hardware, asked) == expected


def test_a_run_that_cannot_fit_stops_before_anything_is_written(ground, monkeypatch):
    monkeypatch.setattr(preflight, "capacity", lambda hardware, device: 1000)
    with pytest.raises(ValueError) as error:
        fit(ground.config("too_large"))
    assert "GiB on each device" in str(error.value)
    assert "hardware.device.preflight=false" in str(error.value)
    assert "\n" not in str(error.value)
    assert not ground.run("too_large").exists()
