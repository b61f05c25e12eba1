"""The clock of a run: where the wall clock of a step goes.

One clock serves the plan, the progress bar, the ledger and the report. Marks are contiguous: every second between two
marks belongs to exactly one phase, so phases sum to the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication", "other")


def now() -> float:
    """Seconds of a clock that only moves forward, suspended time included. It does not follow the wall clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _HostStamp:
    """A moment on the host's clock, with the interface of a CUDA event."""

    def __init__(self) -> None:
        self.at = now()

    def elapsed_time(self, later: _HostStamp) -> float:
        return (later.at - self.at) * 1e3

    def synchronize(self) -> None:
        """Nothing to wait for."""


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
        """Close an interval that is one event between steps; returns all its seconds, those of marks within it too."""
        self.mark(name)
        return sum(self.lap().seconds().values())


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
