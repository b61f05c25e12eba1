"""Processes beside a run's own: tokenisers that are killed or stop, ranks that are killed or stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import brief
import processes
import pytest
import run_case
import shim
import torch
from campaign import Places, tries
from run_case import Case, Try
from safetensors.torch import load_file

ENDS_S = 240  # a job that waits for a stopped process ends sooner than this


def children(pid: int) -> list[int]:
    """Processes that a process and those below it have started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            mine = [int(number) for number in task.read_text().split()]
        except OSError:  # it ended
            continue
        found += [*mine, *(below for each in mine for below in children(each))]
    return found


def await_child(process: processes.Command, named: str) -> int | None:
    """A process below one whose command line names a file, as soon as there is one; None if it ended without."""
    while process.poll() is None:
        for pid in children(process.pid):
            try:
                if named in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
            except OSError:
                continue
        process.wait_a_little(0.002)
    return None


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.campaign)])
@tries(short=1, long=5)
def test_a_tokeniser(how: signal.Signals, numbers: range, scratch: Case, tmp_path: Path, fault) -> None:
    """The corpus is cut into chunks so small that worker processes take them."""
    with fault(
        f"{how.name} to a tokeniser", "it ends by one line or goes on without it; the same command goes on"
    ) as tally:
        for number in numbers:
            place = Try.below(tmp_path / "try")
            with tally.attempt(str(number)):
                process = scratch.start(place, **{brief.CHUNK: "2048", brief.PATIENCE: "10"})
                worker = await_child(process, "tokenise")
                assert worker is not None, "no worker was started"
                time.sleep(0.1 * number)
                signal_to(worker, how)
                done = process.finish(timeout=ENDS_S)
                if done.returncode != 0:
                    run_case.check_refusal(done, 1, 75)
                assert worker not in children(1), "the worker outlived its run"
                scratch.check(place, scratch.run(place))


def signal_to(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def pair(case: Case, place: Try, **environment: str) -> list[processes.Command]:
    """Two ranks of the case's job, with twice its tokens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    twice = ("--batch-tokens", 1024, "--budget-tokens", 5600)
    return [case.start(place, *twice, **job, **environment, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


@pytest.fixture(scope="module")
def two_ranks(scratch: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The student of two ranks that nothing disturbs."""
    place = Try.below(tmp_path_factory.mktemp("ranks"))
    done = [each.finish() for each in pair(scratch, place)]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    return load_file(place.folder / "final" / "model.safetensors")


@pytest.mark.campaign
@pytest.mark.timeout(1700)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_one_of_two_ranks(
    how: signal.Signals, scratch: Case, two_ranks: dict[str, torch.Tensor], tmp_path: Path, fault
) -> None:
    """At several operations of the main rank: in set-up, between steps, in a checkpoint."""
    promise = "the other ends in time with one line; the same command goes on to the same bits"
    with fault(f"{how.name} to one of two ranks", promise) as tally:
        for number, at in enumerate(Places(count=8 if how == signal.SIGKILL else 3).of(len(scratch.operations) - 10)):
            place = Try.below(tmp_path / "try")
            with tally.attempt(f"rank {number % 2} at operation {at}"):
                both = pair(scratch, place, **shim.faults(place.folder, counter=place.counter))
                while shim.counted(place.counter) < at and all(each.poll() is None for each in both):
                    both[0].wait_a_little(0.002)
                signal_to(both[number % 2].pid, how)
                other = both[1 - number % 2].finish(timeout=ENDS_S)
                signal_to(both[number % 2].pid, signal.SIGKILL)
                both[number % 2].finish()
                assert "Traceback" not in other.stderr, run_case.last_line(other)
                again = [each.finish() for each in pair(scratch, place)]
                assert [each.returncode for each in again] == [0, 0], run_case.last_line(again[0])
                student = load_file(place.folder / "final" / "model.safetensors")
                assert all(torch.equal(student[name], two_ranks[name]) for name in two_ranks), "other bits"
                run_case.check_books(place.folder, devices=2)
