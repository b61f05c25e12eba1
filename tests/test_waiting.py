"""Threads wait asleep while other programs want their cores, spin again afterwards, and compute the same either way."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastkd.device.clock import now
from fastkd.device.waiting import LOOK_SECONDS, Waiting, idle_teams, of_this_process, queued_seconds

linux = pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="needs Linux's /proc")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


@linux
def test_idle_teams_are_made_and_given_back(two_threads: None) -> None:
    torch.zeros(1 << 20).add_(1)  # this thread has its own team now
    waiting, before = Waiting(), threads()
    for _ in range(2):
        waiting.sleep(True)
        assert waiting.asleep and threads() >= before + 2  # a holder and its team, which libgomp counts
        waiting.sleep(True)
        assert threads() == before + 2 * idle_teams(2)
        waiting.sleep(False)
        deadline = time.monotonic() + 30
        while threads() > before:
            assert time.monotonic() < deadline
        assert not waiting.asleep


@pytest.mark.parametrize(
    ("threads", "cores", "teams"), [(1, 2, 0), (2, 2, 1), (2, 1, 1), (4, 8, 2), (8, 8, 1), (2, 9, 8)]
)
def test_teams_outnumber_the_cores(threads: int, cores: int, teams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert idle_teams(threads) == teams
    assert threads == 1 or threads + teams * (threads - 1) > cores


@linux
def test_a_busy_program_on_this_core_is_noticed(two_threads: None) -> None:
    cores = os.sched_getaffinity(0)
    waiting = Waiting()
    try:
        os.sched_setaffinity(0, {min(cores)})  # this thread and what it starts: the two share a core
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            work_until(lambda: waiting.asleep, waiting)
            assert waiting.asleep
            neighbour.kill()
    finally:
        os.sched_setaffinity(0, cores)
        waiting.sleep(False)


def work_until(done, waiting: Waiting) -> None:
    """Keep this thread's core in use as a training loop does."""
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        waiting.look()


@linux
def test_a_look_is_rare_and_cheap(two_threads: None) -> None:
    waiting = Waiting()
    began, cpu = now(), time.process_time()
    for _ in range(1000):
        waiting.look()
    assert now() - began >= LOOK_SECONDS or not waiting.asleep
    assert time.process_time() - cpu < 0.1
    assert queued_seconds() >= 0
    waiting.sleep(False)


def test_a_process_has_one() -> None:
    assert of_this_process() is of_this_process()


def test_how_threads_wait_changes_no_bit(two_threads: None) -> None:
    waiting = Waiting()
    torch.manual_seed(0)
    x, w = torch.randn(512, 384), torch.randn(384, 1024)

    def result() -> list[torch.Tensor]:
        product = (x @ w).softmax(-1)
        return [product, product.sum(), (product.bfloat16() @ w.T.bfloat16()).float().std()]

    spinning = result()
    waiting.sleep(True)
    asleep = result()
    waiting.sleep(False)
    assert all(torch.equal(a, b) for a, b in zip(spinning, asleep, strict=True))


@linux
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="threads of one core never spin long")
def test_threads_use_no_core_while_they_wait_asleep(two_threads: None) -> None:
    if "libgomp" not in Path("/proc/self/maps").read_text() or "OMP_WAIT_POLICY" in os.environ:
        pytest.skip("the waiting of another OpenMP library, or one that was chosen")
    waiting, numbers, never = Waiting(), torch.zeros(1 << 17), threading.Event()

    def cpu_seconds() -> float:
        began = time.process_time()
        for _ in range(50):
            numbers.add_(1)  # by two threads
            never.wait(0.003)  # the gap before the next piece of work
        return time.process_time() - began

    cpu_seconds()
    spinning = cpu_seconds()
    waiting.sleep(True)
    asleep = cpu_seconds()
    waiting.sleep(False)
    assert spinning > 5 * asleep, (spinning, asleep)
