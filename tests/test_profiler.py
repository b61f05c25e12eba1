"""Phases are contiguous and sum to the wall clock; unknown devices are left blank."""

import json
import time
from pathlib import Path

import pytest
import torch

from fastkd.config import parse
from fastkd.device import profiler
from fastkd.distributed import World
from fastkd.loop import Loop
from fastkd.monitor import Monitor
from fastkd.run_folder import read_run
from fastkd.setup import prepare
from fastkd.train import Trainer

CPU = torch.device("cpu")


def test_phases_sum_to_the_wall_clock() -> None:
    start = profiler.now()
    clock = profiler.PhaseClock(CPU)
    laps = []
    for _ in range(50):
        torch.randn(200, 200) @ torch.randn(200, 200)
        clock.mark("student")
        clock.mark("loss")
        laps.append(clock.lap().seconds())
    wall = profiler.now() - start
    assert sum(sum(lap.values()) for lap in laps) == pytest.approx(wall, rel=0.01)
    assert set(laps[0]) == set(profiler.PHASES)


def test_an_event_takes_all_that_was_marked_within() -> None:
    clock = profiler.PhaseClock(CPU)
    clock.mark("student")
    torch.randn(300, 300) @ torch.randn(300, 300)
    clock.mark("loss")
    seconds = clock.event("validation")
    assert seconds > 0
    assert sum(clock.lap().seconds().values()) == 0


def test_a_changed_wall_clock_changes_nothing(monkeypatch) -> None:
    clock = profiler.PhaseClock(CPU)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.mark("data")
    assert 0 <= clock.lap().seconds()["data"] < 5


def test_what_a_cpu_does_not_tell_is_blank() -> None:
    assert profiler.peak_flops(CPU) is None
    for devices in ([CPU], []):
        meter = profiler.PowerMeter(devices)
        assert meter.joules_since_last() is None
        assert meter.clocks() == profiler.ClockReading(None, None)


class _Counter(profiler.PowerMeter):
    """Instead of a GPU: one joule more each time it is read."""

    def __init__(self) -> None:
        self.readings = 0
        super().__init__([])

    def _joules(self) -> float:
        self.readings += 1
        return float(self.readings)


def test_energy_is_read_now_and_then_and_none_of_it_is_lost(monkeypatch) -> None:
    clock = iter([0.0, 0.1, 0.2, 1.5, 1.5, 1.6, 1.7, 1.7])
    monkeypatch.setattr(profiler, "now", lambda: next(clock))
    meter = _Counter()
    assert [meter.joules_since_last(1.0) for _ in range(3)] == [0.0, 0.0, 1.0]
    assert meter.readings == 2
    assert [meter.joules_since_last(1.0), meter.joules_since_last()] == [0.0, 1.0]  # an event reads at once


def test_a_peak_is_that_of_the_whole_name() -> None:
    assert profiler.PEAK_BF16_FLOPS["NVIDIA H100 PCIe"] < profiler.PEAK_BF16_FLOPS["NVIDIA H100 80GB HBM3"]
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200"):
        assert name not in profiler.PEAK_BF16_FLOPS


def test_reasons_are_nvmls_and_idleness_is_none() -> None:
    nvml = pytest.importorskip("pynvml")
    assert profiler.throttle_reasons(nvml.nvmlClocksEventReasonNone) == []
    assert profiler.throttle_reasons(nvml.nvmlClocksEventReasonGpuIdle) == []
    assert profiler.throttle_reasons(nvml.nvmlClocksEventReasonApplicationsClocksSetting) == []
    assert profiler.throttle_reasons(nvml.nvmlClocksEventReasonSwPowerCap) == ["power cap"]
    assert profiler.throttle_reasons(nvml.nvmlClocksEventReasonHwSlowdown) == ["hardware slowdown"]
    assert profiler.throttle_reasons(nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown) == ["power brake"]
    for bit in (nvml.nvmlClocksEventReasonSwThermalSlowdown, nvml.nvmlClocksEventReasonHwThermalSlowdown):
        assert profiler.throttle_reasons(bit | nvml.nvmlClocksEventReasonSwPowerCap) == ["power cap", "thermal"]


@pytest.mark.gpu
def test_a_gpu_counts_its_energy() -> None:
    meter = profiler.PowerMeter([torch.device("cuda", 0)])
    profiler.measured_matmul_flops(torch.device("cuda", 0), torch.bfloat16, seconds=2.0)
    joules, clocks = meter.joules_since_last(), meter.clocks()
    assert joules is not None and 20 < joules < 4000
    assert clocks.sm_clock_mhz is not None and clocks.sm_clock_mhz > 100 and clocks.throttle is not None


def test_steps_and_events_of_a_loop_sum_to_its_wall_clock(small: list[str], tmp_path: Path) -> None:
    options = [*small, "--method", "minilmv2", "--checkpoint-minutes", "0.02", "--budget-tokens", "20000"]
    trainer = Trainer(prepare(parse(options), World()))
    with Monitor(tmp_path, 20000, "tokens") as monitor:
        loop = Loop(trainer, tmp_path, monitor, step_seconds=0.1)
        loop.record_validation(0.0, in_loop=False)
        start = profiler.now()
        loop.run()
        wall = profiler.now() - start
        loop.save_the_end()
        loop.ledger.close()
    run = read_run(tmp_path)
    assert {event["event"] for event in run.events if event["charged"]} >= {"checkpoint"}
    assert run.accounted_s == pytest.approx(wall, rel=0.01)


def test_matmul_rate_and_memory_are_measured() -> None:
    assert profiler.measured_matmul_flops(CPU, torch.float32, seconds=0.05) > 1e8
    assert profiler.peak_memory_bytes(CPU) > 2**20


def test_trace_writes_what_ran(tmp_path: Path) -> None:
    with profiler.trace(tmp_path / "trace.json", 2) as step:
        for _ in range(5):
            torch.randn(8, 8) @ torch.randn(8, 8)
            step()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)


def test_the_dtype_of_a_cpu_is_the_one_that_it_multiplies_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = profiler.fastest_dtype.__wrapped__
    monkeypatch.setattr(profiler.environment, "cpu_has_bf16", lambda: True)
    for fast, slow in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        rates = {fast: 2e11, slow: 1e11}
        monkeypatch.setattr(profiler, "measured_matmul_flops", lambda _, dtype, seconds, rates=rates: rates[dtype])
        assert measure(CPU) == fast
    monkeypatch.setattr(profiler.environment, "cpu_has_bf16", lambda: False)
    assert measure(CPU) == torch.float32
