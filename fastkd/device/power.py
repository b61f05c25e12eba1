"""Energy, clocks and throttling of GPUs, read from NVML."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastkd.device.clock import now

N = TypeVar("N", int, float)

# Why a GPU's clock is lower than it could be: bits of NVML's clocks event reasons (nvml.h). An idle GPU, or clocks that
# someone set, are not throttling.
THROTTLE_BITS: dict[str, int] = {
    "power cap": 0x04,
    "hardware slowdown": 0x08,
    "thermal": 0x20 | 0x40,
    "power brake": 0x80,
}


@dataclass(frozen=True)
class ClockReading:
    """What NVML says of some GPUs at one moment; None if it says nothing."""

    sm_clock_mhz: float | None = None  # the slowest GPU's
    throttle: list[str] | None = None  # names of THROTTLE_BITS, of any GPU


def throttle_reasons(bits: int) -> list[str]:
    """NVML's clocks event reasons in words, only those that throttle."""
    return [name for name, mask in THROTTLE_BITS.items() if bits & mask]


class PowerMeter:
    """Energy, clocks and throttling of GPUs, from NVML. Without NVML, or without a GPU, everything read is None."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        if devices and all(device.type == "cuda" for device in devices):
            with suppress(Exception):  # NVML is optional: without driver or permission nothing is read
                import pynvml

                pynvml.nvmlInit()
                names = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
                self._handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
                self._nvml = pynvml
        self._last, self._read_at = self._joules(), now()

    def joules_since_last(self, rest_s: float = 0.0) -> float | None:
        """Joules of all GPUs since the last reading (or the start); None where one of them does not count.

        NVML takes about 3 ms a reading, as long as a step of a small student. Within ``rest_s`` seconds of the last one nothing
        is read, and the answer is 0; the next reading includes it.
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
