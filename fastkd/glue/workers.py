"""Fine-tunings side by side: one process a GPU (or a share of the CPU), each with one fine-tuning at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import torch

from fastkd.signals import ASKING, withheld

if TYPE_CHECKING:
    from fastkd.glue.finetune import FineTuning

Result = dict[str, Any]
BEAT_SECONDS = 1.0  # between two signs of life of a process
PATIENCE = 120.0  # seconds without one: the process is stopped, or stuck, and is ended
STARTING = 600.0  # seconds until the first one: imports from a cold disk take their time


def run_all(fine_tunings: list[FineTuning], jobs: int) -> Iterator[tuple[FineTuning, Result]]:
    """Run all fine-tunings, ``jobs`` at once, and yield each with its result as it finishes.

    Raises:
        ValueError: what a fine-tuning raised.
        ChildProcessError: a worker process died, or said nothing for ``PATIENCE``.
    """
    jobs = min(jobs, len(fine_tunings))
    if jobs <= 1 and torch.cuda.device_count() <= 1:
        for one in fine_tunings:
            yield one, one.run()
        return
    gpus = visible_gpus()
    # The largest first, so that at the end none runs long by itself.
    waiting = deque(sorted(fine_tunings, key=lambda one: -one.rows[one.task.train]))
    running: dict[Future[Result], tuple[FineTuning, _Worker]] = {}
    with ExitStack() as stack:
        free = deque[_Worker]()
        for i in range(jobs):
            worker = _Worker(gpus[i % len(gpus)] if gpus else None, jobs)
            stack.callback(worker.close)
            free.append(worker)
        while waiting or running:
            while free and waiting:
                worker, one = free.popleft(), waiting.popleft()
                running[worker.begin(one)] = one, worker
            done = wait(running, BEAT_SECONDS, return_when=FIRST_COMPLETED).done
            for _, worker in running.values():
                worker.pass_time(BEAT_SECONDS)
            for future in done:
                one, worker = running.pop(future)
                yield one, worker.result(future, one)
                free.append(worker)


class _Worker:
    """A pool of one process, so that the fine-tuning of a process that died is known, and its GPU is its own."""

    def __init__(self, gpu: str | None, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads of torch and a CUDA context
        self._beat = context.RawValue("Q", 0)
        self._seen, self._silent = 0, 0.0
        self._pool = ProcessPoolExecutor(1, context, _prepare, (gpu, jobs, self._beat))
        before = set(multiprocessing.active_children())
        resource_tracker.ensure_running()  # first: its start would let signals through to this thread again
        with withheld():
            self._pool.submit(os.getpid)  # starts the process
        started = set(multiprocessing.active_children()) - before
        self._process = started.pop() if started else None  # none if it has died already

    def begin(self, one: FineTuning) -> Future[Result]:
        """Run a fine-tuning; the future holds its result or error."""
        try:
            return self._pool.submit(one.run)
        except BrokenProcessPool as error:  # it died before: ``result`` says so
            future: Future[Result] = Future()
            future.set_exception(error)
            return future

    def pass_time(self, seconds: float) -> None:
        """Tell the worker that time passed: one that has not moved for ``PATIENCE`` is ended, and ``result`` says so."""
        moved, self._seen = self._beat.value != self._seen, self._beat.value
        self._silent = 0.0 if moved else self._silent + seconds
        if self._hangs and self._process is not None:
            self._process.kill()

    @property
    def _hangs(self) -> bool:
        return self._silent >= (PATIENCE if self._seen else STARTING)

    def result(self, future: Future[Result], one: FineTuning) -> Result:
        """The result of a fine-tuning that has ended. Raises what it raised, or ChildProcessError if its process died."""
        try:
            return future.result()
        except BrokenProcessPool:
            self._pool.shutdown()  # it waits for the process: the exit code is known then
            code = "unknown" if self._process is None else self._process.exitcode
            how = f"said nothing for {self._silent:g} s" if self._hangs else f"died (exit code {code})"
            raise ChildProcessError(
                f"the process of {one.task.title}, seed {one.seed}, {how}; "
                "the same command continues after the fine-tunings that finished"
            ) from None

    def close(self) -> None:
        """End the process, also in the middle of a fine-tuning and where it is stopped."""
        if self._process is not None:
            self._process.kill()
        self._pool.shutdown()


def _prepare(gpu: str | None, jobs: int, beat: Any) -> None:
    """A worker's start: it sees one GPU, or takes its share of the CPU's threads, shows that it lives, and ends with its parent."""
    for number in ASKING:  # they may reach the whole group: the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_show_life, args=(beat,), daemon=True).start()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _show_life(beat: Any) -> None:
    """Count as long as this process runs. One that is stopped does not."""
    while True:
        beat.value += 1
        time.sleep(BEAT_SECONDS)


def _end_with_parent() -> None:
    """End when the parent does: after it was killed, nobody waits for a result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them, without touching one."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
