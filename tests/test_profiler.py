"""Phases are contiguous and sum to the wall clock; unknown devices are left blank."""

import json
import time
from pathlib import Path

import pytest
import torch

from fastkd import profiler

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
    meter = profiler.EnergyMeter(CPU)
    assert meter.joules_since_last() is None
    assert meter.read() == profiler.Power(None, None, None, None)


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
