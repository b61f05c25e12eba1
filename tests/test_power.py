"""Energy and clocks of GPUs; a device that tells nothing is left blank."""

import pytest
import torch

from fastkd.device import power
from fastkd.device.peaks import measured_matmul_flops
from fastkd.device.power import ClockReading, PowerMeter, throttle_reasons

CPU = torch.device("cpu")


def test_what_a_cpu_does_not_tell_is_blank() -> None:
    for devices in ([CPU], []):
        meter = PowerMeter(devices)
        assert meter.joules_since_last() is None
        assert meter.clocks() == ClockReading(None, None)


class _Counter(PowerMeter):
    """Instead of a GPU: one joule more each time it is read."""

    def __init__(self) -> None:
        self.readings = 0
        super().__init__([])

    def _joules(self) -> float:
        self.readings += 1
        return float(self.readings)


def test_energy_is_read_now_and_then_and_none_of_it_is_lost(monkeypatch) -> None:
    clock = iter([0.0, 0.1, 0.2, 1.5, 1.5, 1.6, 1.7, 1.7])
    monkeypatch.setattr(power, "now", lambda: next(clock))
    meter = _Counter()
    assert [meter.joules_since_last(1.0) for _ in range(3)] == [0.0, 0.0, 1.0]
    assert meter.readings == 2
    assert [meter.joules_since_last(1.0), meter.joules_since_last()] == [0.0, 1.0]  # an event reads at once


def test_reasons_are_nvmls_and_idleness_is_none() -> None:
    nvml = pytest.importorskip("pynvml")
    assert throttle_reasons(nvml.nvmlClocksEventReasonNone) == []
    assert throttle_reasons(nvml.nvmlClocksEventReasonGpuIdle) == []
    assert throttle_reasons(nvml.nvmlClocksEventReasonApplicationsClocksSetting) == []
    assert throttle_reasons(nvml.nvmlClocksEventReasonSwPowerCap) == ["power cap"]
    assert throttle_reasons(nvml.nvmlClocksEventReasonHwSlowdown) == ["hardware slowdown"]
    assert throttle_reasons(nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown) == ["power brake"]
    for bit in (nvml.nvmlClocksEventReasonSwThermalSlowdown, nvml.nvmlClocksEventReasonHwThermalSlowdown):
        assert throttle_reasons(bit | nvml.nvmlClocksEventReasonSwPowerCap) == ["power cap", "thermal"]


@pytest.mark.gpu
def test_a_gpu_counts_its_energy() -> None:
    meter = PowerMeter([torch.device("cuda", 0)])
    measured_matmul_flops(torch.device("cuda", 0), torch.bfloat16, seconds=2.0)
    joules, clocks = meter.joules_since_last(), meter.clocks()
    assert joules is not None and 20 < joules < 4000
    assert clocks.sm_clock_mhz is not None and clocks.sm_clock_mhz > 100 and clocks.throttle is not None
