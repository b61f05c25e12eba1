"""Cells side by side: one process a GPU (or a share of the CPU), each with one cell at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from fastkd.glue.cells import Cell


def run_cells(cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run all cells, ``jobs`` at once, and yield each with its result as it finishes.

    Raises:
        ValueError: what a cell raised.
        ChildProcessError: a worker process died.
    """
    if not cells:
        return
    jobs = min(jobs, len(cells))
    if jobs == 1 and torch.cuda.device_count() <= 1:
        for cell in cells:
            yield cell, cell.run()
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    gpus = visible_gpus()
    try:
        for i in range(jobs):
            ours, theirs = context.Pipe()
            gpu = gpus[i % len(gpus)] if gpus else None
            workers[ours] = context.Process(target=_work, args=(theirs, gpu, jobs), daemon=True)
            workers[ours].start()
            theirs.close()
        # The largest first, so that none is left alone at the end.
        yield from _share_out(sorted(cells, key=lambda cell: -cell.rows[cell.job.task.train]), workers)
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _share_out(cells: list[Cell], workers: dict[Connection, SpawnProcess]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    waiting, free, running = cells[::-1], list(workers)[::-1], dict[Connection, Cell]()
    while waiting or running:
        while free and waiting:
            connection, cell = free.pop(), waiting.pop()
            running[connection] = cell
            with contextlib.suppress(ConnectionError):  # a process that died is found when its result is read
                connection.send(cell)
        ready = set(multiprocessing.connection.wait(list(running)))
        for connection in [one for one in running if one in ready]:
            cell = running.pop(connection)
            yield cell, _receive(connection, cell, workers[connection])
            free.append(connection)


def _receive(connection: Connection, cell: Cell, process: SpawnProcess) -> dict[str, Any]:
    try:
        result = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise ChildProcessError(
            f"the process of {cell.job.task.title}, seed {cell.job.seed}, died (exit code {process.exitcode}); "
            "the same command continues after the fine-tunings that finished"
        ) from None
    if isinstance(result, Exception):
        raise result
    return dict(result)


def _work(connection: Connection, gpu: str | None, jobs: int) -> None:
    """A worker: sees one GPU, or takes its share of the CPU's threads, and ends with its parent."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            cell = connection.recv()
            try:
                connection.send(cell.run())
            except Exception as error:  # handed to the parent, which raises it
                connection.send(error)


def _end_with_parent() -> None:
    """A parent that was killed must not leave a process behind that fine-tunes for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would name, without touching a GPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
