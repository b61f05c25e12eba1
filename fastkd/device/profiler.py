"""Profiler: where the wall clock of a step goes, what the device could do, and what it draws.

One clock serves the plan, the progress bar, the ledger and the report. Marks are contiguous: every second between two
marks belongs to exactly one phase, so phases sum to the wall clock.
"""

from __future__ import annotations

import functools
import operator
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastkd.device import environment

N = TypeVar("N", int, float)
PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication", "other")

# Dense bf16 peak of the matrix units, FLOP/s, from the vendors' data sheets; by the driver's whole name of the device,
# for parts of a name are shared by devices that differ (H100 PCIe, a slice of an H100, a laptop's RTX 4090).
PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "AMD Instinct MI300X": 1307e12,
}

# Why a GPU's clock is below what it could be: bits of NVML's clocks event reasons (nvml.h). Idleness and clocks that
# someone set are no throttling.
THROTTLE_BITS: dict[str, int] = {
    "power cap": 0x04,
    "hardware slowdown": 0x08,
    "thermal": 0x20 | 0x40,
    "power brake": 0x80,
}


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
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))


@functools.cache
def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is the faster one, else float32: measured on a CPU with AVX512-BF16 or AMX, for some of those
    multiply bfloat16 at half the speed of float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = environment.cpu_has_bf16() and _matmul_ratio(device) > 1
    return torch.bfloat16 if fast else torch.float32


def _matmul_ratio(device: torch.device) -> float:
    """How many times faster a matrix product is in bfloat16 than in float32."""
    rates = [measured_matmul_flops(device, dtype, seconds=0.1) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] / rates[1]


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


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory the process had: of the device on CUDA, resident on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class ClockReading:
    """What NVML says of some GPUs at one moment; None where it says nothing."""

    sm_clock_mhz: float | None = None  # the slowest GPU's
    throttle: list[str] | None = None  # names of THROTTLE_BITS, of any GPU


def throttle_reasons(bits: int) -> list[str]:
    """NVML's clocks event reasons in words, those that throttle alone."""
    return [name for name, mask in THROTTLE_BITS.items() if bits & mask]


class PowerMeter:
    """Energy, clocks and throttling of GPUs, from NVML. Without NVML, or without a GPU, everything read is None."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        if devices and all(device.type == "cuda" for device in devices):
            with suppress(Exception):  # NVML is an extra reading: no driver, no permission, no problem
                import pynvml

                pynvml.nvmlInit()
                names = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
                self._handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
                self._nvml = pynvml
        self._last, self._read_at = self._joules(), now()

    def joules_since_last(self, rest_s: float = 0.0) -> float | None:
        """Joules of all GPUs since the last reading (or the start); None where one of them does not count.

        NVML takes some 3 ms a reading, as long as a step of a small student: within ``rest_s`` seconds of the last one nothing
        is read, and the answer is 0; the next reading has it all.
        """
        if self._last is not None and now() - self._read_at < rest_s:
            return 0.0
        joules, self._read_at = self._joules(), now()
        spent = None if joules is None or self._last is None else joules - self._last
        self._last = joules
        return spent

    def clocks(self) -> ClockReading:
        """The present clocks and what holds them down."""
        nvml = self._nvml
        rates = self._each(lambda gpu: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)))
        reasons = self._each(lambda gpu: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)))
        return ClockReading(
            None if rates is None else min(rates),
            None if reasons is None else throttle_reasons(functools.reduce(operator.or_, reasons)),
        )

    def _joules(self) -> float | None:
        counts = self._each(lambda gpu: self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)
        return None if counts is None else sum(counts)

    def _each(self, query: Callable[[Any], N]) -> list[N] | None:
        """The answers of all GPUs, or None where there is no NVML or one of them has no answer."""
        if self._nvml is None:
            return None
        with suppress(Exception):
            return [query(gpu) for gpu in self._handles]
        return None


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
