"""Profiler: where the wall clock of a step goes, what the device could do, and what it draws.

One clock serves the plan, the progress bar, the ledger and the report. Marks are contiguous: every second between two
marks belongs to exactly one phase, so phases sum to the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication", "other")

# Dense bf16 peak of the matrix units, FLOP/s, from the vendors' data sheets; by a part of the device's name.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
    ("MI300X", 1307e12),
)


def now() -> float:
    """Seconds of a clock that only moves forward, suspended time included; a changed wall clock changes nothing."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _HostStamp:
    """A moment on the host's clock, with the interface of a CUDA event."""

    def __init__(self) -> None:
        self.at = now()

    def elapsed_time(self, later: _HostStamp) -> float:
        return (later.at - self.at) * 1e3

    def synchronize(self) -> None:
        """The host's past is always known."""


class Lap:
    """One step's marks; resolved when the device has passed the last of them."""

    def __init__(self, stamps: list[tuple[str, Any]]) -> None:
        self._stamps = stamps

    def seconds(self) -> dict[str, float]:
        """Seconds by phase. On CUDA, waits for the device to pass the lap's last mark."""
        self._stamps[-1][1].synchronize()
        spent = dict.fromkeys(PHASES, 0.0)
        for (_, earlier), (phase, later) in zip(self._stamps, self._stamps[1:], strict=False):
            spent[phase] = spent.get(phase, 0.0) + earlier.elapsed_time(later) / 1e3
        return spent


class PhaseClock:
    """Marks the ends of phases, on the device's time line where it has one (CUDA events), else on the host's."""

    def __init__(self, device: torch.device) -> None:
        self._stamp: Callable[[], Any] = self._cuda_stamp if device.type == "cuda" else _HostStamp
        self._stamps: list[tuple[str, Any]] = [("start", self._stamp())]

    @staticmethod
    def _cuda_stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        """What ran since the last mark was ``phase``."""
        self._stamps.append((phase, self._stamp()))

    def lap(self) -> Lap:
        """Close a step: its marks so far; the next lap starts at the last of them."""
        lap, self._stamps = Lap(self._stamps), [("start", self._stamps[-1][1])]
        return lap

    def event(self, name: str) -> float:
        """Close an interval that is one event between steps; its seconds, whatever was marked within."""
        self.mark(name)
        return sum(self.lap().seconds().values())


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's dense bf16 FLOP/s of the device, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in name), None)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product, the median of repeats: what this device gives at best in practice."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    rates: list[float] = []
    until = now() + seconds
    while len(rates) < 5 or now() < until:
        clock = PhaseClock(device)
        torch.mm(a, b)
        rates.append(2 * size**3 / max(clock.event("other"), 1e-9))
    return sorted(rates[1:])[len(rates[1:]) // 2]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory the process had: of the device on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Power:
    """One reading of a GPU. Joules count from the driver's start; None where the device does not say."""

    joules: float | None
    watts: float | None
    clock_mhz: int | None
    throttled: bool | None


class EnergyMeter:
    """NVML's total energy counter of one GPU. Without NVML, or on a CPU, every reading is None."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._last: float | None = None
        if device.type == "cuda":
            with suppress(Exception):  # NVML is an extra reading: no driver, no permission, no problem
                import pynvml

                pynvml.nvmlInit()
                uuid = str(torch.cuda.get_device_properties(device).uuid)
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self._nvml = pynvml
        self._last = self._joules()

    def read(self) -> Power:
        """The present reading; a field that the device does not offer is None."""
        if self._nvml is None:
            return Power(None, None, None, None)
        nvml = self._nvml
        thermal = nvml.nvmlClocksEventReasonHwThermalSlowdown | nvml.nvmlClocksEventReasonSwThermalSlowdown
        return Power(
            joules=self._joules(),
            watts=self._try(lambda: nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3),
            clock_mhz=self._try(lambda: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
            throttled=self._try(lambda: bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle) & thermal)),
        )

    def _joules(self) -> float | None:
        if self._nvml is None:
            return None
        return self._try(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3)

    @staticmethod
    def _try(query: Callable[[], Any]) -> Any:
        with suppress(Exception):
            return query()
        return None

    def joules_since_last(self) -> float | None:
        """Joules since the last call (or the start); None where the device does not count them."""
        joules = self._joules()
        spent = None if joules is None or self._last is None else joules - self._last
        self._last = joules
        return spent


@contextmanager
def trace(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Record the first steps with torch.profiler and write a Chrome trace to ``path``; yields what to call each step.

    With ``steps`` 0 nothing is recorded.
    """
    if steps == 0:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(path))
    ) as recorder:
        yield recorder.step
