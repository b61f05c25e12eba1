"""How OpenMP's threads wait for one another, chosen by whether other programs want their cores.

Between two pieces of work a thread of libgomp spins for some milliseconds, which costs nothing while it has a core of its
own. Beside a busy program it spins on the core that the thread it waits for needs, and a training step takes many times as
long. A sleeping thread has to be woken, which costs time in every step when no other program runs
(``python -m bench.neighbour`` shows both). libgomp spins 100 times instead of 300,000 while it manages more threads than
there are cores (``gomp_throttled_spin_count_var`` in its ``env.c`` and ``wait.h``). So a few threads that do nothing decide at
any moment how all others wait, and no sum is cut into other parts: results keep the same bits.
"""

from __future__ import annotations

import functools
import os
import threading
from contextlib import suppress
from pathlib import Path

import torch

from fastkd.device import clock

QUEUE = Path("/proc/thread-self/schedstat")  # nanoseconds that this thread ran, and that it waited for a core
LOOK_SECONDS = 0.5
BUSY_SHARE = 0.1  # of the time in the queue
GRAIN = 1 << 15  # numbers that ATen gives a thread, at least


@functools.cache
def of_this_process() -> Waiting:
    """One object for all trainers of a process, since libgomp counts threads per process."""
    return Waiting()


class Waiting:
    """How this process's threads wait. Call `look` from the thread that trains, every micro-batch."""

    def __init__(self) -> None:
        self._at, self._queued = clock.now(), queued_seconds()
        self._idle: list[_IdleTeam] = []

    def look(self) -> None:
        """Measure, at most every half second, whether others want the cores, and let threads wait accordingly."""
        now = clock.now()
        if now - self._at < LOOK_SECONDS:
            return
        queued = queued_seconds()
        share = (queued - self._queued) / (now - self._at)
        self._at, self._queued = now, queued
        self.sleep(share > BUSY_SHARE)

    @property
    def asleep(self) -> bool:
        """Whether threads wait asleep now."""
        return bool(self._idle)

    def sleep(self, asleep: bool) -> None:
        """Let threads wait asleep, or spinning."""
        if asleep and not self._idle:
            self._idle = [_IdleTeam() for _ in range(idle_teams(torch.get_num_threads()))]
        elif not asleep:
            while self._idle:
                self._idle.pop().end()


class _IdleTeam:
    """A thread that holds an idle OpenMP team."""

    def __init__(self) -> None:
        self._made, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True, name="idle team")
        self._thread.start()
        self._made.wait()

    def _hold(self) -> None:
        torch.zeros(GRAIN * torch.get_num_threads()).add_(1)  # by a team of all threads
        self._made.set()
        self._ended.wait()

    def end(self) -> None:
        """Give the team back."""
        self._ended.set()
        self._thread.join()


def idle_teams(threads: int) -> int:
    """How many teams make libgomp count more threads than cores; a team of n adds n - 1 threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if threads < 2 else max(0, cores - threads) // (threads - 1) + 1


def queued_seconds() -> float:
    """Seconds that this thread stood ready in a core's queue; 0 where the system does not count them."""
    with suppress(OSError, ValueError, IndexError):
        return int(QUEUE.read_text().split()[1]) / 1e9
    return 0.0
