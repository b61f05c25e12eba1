"""Seconds of a call: on a GPU the device's, replayed as a CUDA graph, or by events where a call cannot be captured.

torch 2.11 does not clean up after a capture that failed: its allocator takes it for one under way and refuses
``empty_cache`` and every later capture in that process. So a call is asked first, without a capture, whether it waits for the
device; and should a capture fail all the same, later calls are timed by events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


class Timer:
    """Times calls on one kind of device, cuda or cpu."""

    def __init__(self, device: str) -> None:
        self._device, self._graphs = device, True

    def seconds(self, run: Callable[[], Any], milliseconds: int, timing: str | None = None) -> tuple[float, str]:
        """The median seconds of a call, and how they were taken: "graph", "events" or, on a CPU, "wall".

        ``milliseconds``: of one replay of the graph, which is replayed ten times. ``timing``: how it was timed before.
        """
        if self._device == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start, "wall"
        import triton.testing

        if timing != "events" and self._graphs and (timing == "graph" or not waits(run)):
            try:
                return triton.testing.do_bench_cudagraph(run, rep=milliseconds, return_mode="median") / 1e3, "graph"
            except Exception as error:
                if broken(error):
                    raise
                self._graphs = False
        events = triton.testing.do_bench(run, warmup=milliseconds, rep=3 * milliseconds, return_mode="median")
        return events / 1e3, "events"


def waits(run: Callable[[], Any]) -> bool:
    """Whether a call waits for the GPU, as far as PyTorch knows: then it cannot be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def broken(error: Exception) -> bool:
    """Whether the device caused an error: then nothing else runs in this process either."""
    text = str(error)
    return "CUDA error" in text and "captur" not in text


def give_memory_back() -> None:
    """What an error left in the cache; not after a capture that failed."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
