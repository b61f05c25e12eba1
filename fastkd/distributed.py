"""Several GPUs: set-up under torchrun, rank 0's decisions, and what differs between one process and many.

Every rank does the same steps in the same order because only rank 0 reads clocks and decides; one small all-reduce on
the host a step carries its decisions to all ranks, and every rank's interrupt to it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

JOINING = timedelta(minutes=10)  # ranks start as fast as their nodes' disks, and NCCL takes its time between many nodes
TIMEOUT = timedelta(seconds=45)  # a rank that is gone must end the job within a minute
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, writes and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class Decision:
    """What rank 0 decided for the next step."""

    progress: float
    stop: bool = False
    validate: bool = False
    checkpoint: bool = False
    interrupted: bool = False


def node_devices(world: World) -> list[torch.device]:
    """Every device of the job where all are on this node (rank i drives device i), else none."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) != world.size:
        return []
    return [torch.device(world.device.type, index) for index in range(world.size)]


def start(timeout: timedelta = TIMEOUT) -> World:
    """Join the process group that torchrun describes, or be the only process. Host collectives use gloo, device ones NCCL.

    Ranks may be minutes late (``JOINING``). Once all have met, a rank that is missing in a collective for ``timeout`` ends
    the job. If a rank dies before that, torchrun ends it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    backend, bound = ("cpu:gloo,cuda:nccl", device) if cuda else ("gloo", None)
    dist.init_process_group(backend, timeout=JOINING, device_id=bound)  # bound to its device, NCCL connects here
    _meet(device)
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(timeout)
    return World(rank=dist.get_rank(), size=size, device=device)


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """`start`, and `finish` at the end, even after an error."""
    world = start(timeout)
    try:
        yield world
    finally:
        finish(world)


def _meet(device: torch.device) -> None:
    """One collective on the host and one on the device, waited for: the first one makes all connections."""
    for place in dict.fromkeys((torch.device("cpu"), device)):  # in the same order on every rank
        present = torch.ones(1, device=place)
        dist.all_reduce(present)
        assert present.item() == dist.get_world_size()


def finish(world: World) -> None:
    """Leave the process group; a peer that is dead already does not turn a clean exit into an error."""
    if world.size > 1 and dist.is_initialized():
        _patient_group.cache_clear()
        with suppress(RuntimeError):
            dist.destroy_process_group()


def agree(world: World, decision: Decision) -> Decision:
    """Rank 0's decision, and an interrupt if any rank was interrupted. Other ranks pass only ``interrupted``."""
    if world.size == 1:
        return decision
    mine = decision if world.is_main else Decision(progress=0.0, interrupted=decision.interrupted)
    flags = torch.tensor(
        [mine.progress, mine.stop, mine.validate, mine.checkpoint, mine.interrupted], dtype=torch.float64
    )
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    progress, stop, validate, checkpoint, interrupted = flags.tolist()
    return Decision(progress, bool(stop), bool(validate), bool(checkpoint), bool(interrupted))


def any_rank(world: World, flag: bool) -> bool:
    """Whether the flag is set on any rank. Waits as long as the slowest rank takes."""
    if world.size == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_patient_group())
    return bool(value.item())


def on_main(world: World, work: Callable[[], T]) -> T:
    """Rank 0 does the work, for as long as it takes, and every rank gets what it returned (which must pickle).

    Raises:
        RuntimeError: on the other ranks, where it failed on rank 0 (ValueError if it was one); there, what it raised.
    """
    if world.size == 1:
        return work()
    answer: list[Any] = [None, None]  # what was returned, what the other ranks raise
    failure: Exception | None = None
    if world.is_main:
        try:
            answer[0] = work()
        except ValueError as mistake:
            failure, answer[1] = mistake, ValueError(str(mistake))
        except Exception as caught:  # told to the others, then raised
            failure, answer[1] = caught, RuntimeError(f"rank 0 failed: {type(caught).__name__}: {caught}")
    dist.broadcast_object_list(answer, src=0, group=_patient_group())
    if (raised := failure or answer[1]) is not None:
        raise raised
    return answer[0]


def mean(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of a host tensor over ranks."""
    if world.size > 1:
        dist.all_reduce(values, group=_patient_group())
        values /= world.size
    return values


def average(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor on the device over ranks. It costs no extra wait: ranks wait for each other's gradients anyway."""
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return values


def smallest(world: World, value: float) -> float:
    """The least of the ranks' values."""
    least = torch.tensor(value, dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=_patient_group())
    return float(least)


def barrier(world: World) -> None:
    """Wait for every rank, for as long as it takes: rank 0 may be tokenising a corpus or fine-tuning."""
    any_rank(world, False)


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """Host collectives without the short time-out; a peer that dies still ends them at once."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))
