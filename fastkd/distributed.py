"""Several GPUs: set-up under torchrun, rank 0's decisions, and what differs between one process and many.

Every rank does the same steps in the same order because only rank 0 reads clocks and decides. Two small all-reduces on the
host a step: one carries its decisions to all ranks, and every rank's interrupt to it; in the other all vote whether memory
ran out on any (``exchange.py``).

Within a step, ranks wait for each other for ``TIMEOUT``. Everywhere else they meet first (``pulse.py``), and wait there for
as long as those that are missing live.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastkd import pulse
from fastkd.pulse import PeerLost

JOINING = timedelta(minutes=10)  # ranks start as fast as their nodes' disks, and NCCL takes its time between many nodes
TIMEOUT = timedelta(seconds=45)  # a rank that is gone must end the job within a minute
T = TypeVar("T")
_pulse: pulse.Pulse | None = None  # of this process; None: it has no peers


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
    _connect(device)
    _feel_each_other(dist.get_rank(), size)
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(timeout)
    return World(rank=dist.get_rank(), size=size, device=device)


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """`start`, and `finish` at the end, even after an error.

    Raises:
        PeerLost: instead of the error of a collective: another rank is missing, or lives and is late.
    """
    world = start(timeout)
    try:
        yield world
    except RuntimeError as error:
        if _pulse is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise PeerLost(_pulse.lost() or _late(error, _pulse.phase, timeout)) from error
        raise
    finally:
        finish(world)


def _late(error: RuntimeError, during: str, timeout: timedelta) -> str:
    """What an error among ranks means that all live. Which of them was late, gloo does not tell."""
    if "timed out" in str(error).lower():
        return f"a rank took more than {timeout.total_seconds():g} s for {during}"
    return f"ranks could not reach one another during {during}: {str(error).splitlines()[0]}"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what this rank is at: other ranks say it if it hangs or ends there. After an error that stays its name."""
    if _pulse is None:
        yield
        return
    here, before = _pulse, _pulse.phase
    here.enter(name)
    yield
    here.enter(before)


def _feel_each_other(rank: int, size: int) -> None:
    """Begin to show each other that ranks live."""
    global _pulse

    def exchange(value: object) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    one_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == size
    _pulse = pulse.connect(rank, size, None if one_node else os.environ["MASTER_ADDR"], exchange)


def _meet() -> None:
    """Wait until all ranks are here, so that the collective that follows takes no longer than its messages."""
    assert _pulse is not None
    _pulse.meet()


def _connect(device: torch.device) -> None:
    """One collective on the host and one on the device, waited for: the first one makes all connections."""
    for place in dict.fromkeys((torch.device("cpu"), device)):  # in the same order on every rank
        present = torch.ones(1, device=place)
        dist.all_reduce(present)
        assert present.item() == dist.get_world_size()


def finish(world: World) -> None:
    """Leave the process group; a peer that is dead already does not turn a clean exit into an error."""
    global _pulse
    if _pulse is not None:
        _pulse.close()
        _pulse = None
    if world.size > 1 and dist.is_initialized():
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
    _meet()
    return any_in_step(world, flag)


def any_in_step(world: World, flag: bool) -> bool:
    """Whether the flag is set on any rank, within a step: a rank that is missing ends the job as in ``agree``."""
    if world.size == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def on_main(world: World, work: Callable[[], T]) -> T:
    """Rank 0 does the work, for as long as it takes, and every rank gets what it returned (which must pickle).

    Raises:
        PeerLost: on the other ranks, where it failed on rank 0 (ValueError if it was one); there, what it raised.
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
            failure, answer[1] = caught, PeerLost(f"rank 0 failed: {type(caught).__name__}: {caught}")
    _meet()
    dist.broadcast_object_list(answer, src=0)
    if (raised := failure or answer[1]) is not None:
        raise raised
    return answer[0]


def mean(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of a host tensor over ranks."""
    if world.size > 1:
        _meet()
        dist.all_reduce(values)
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
        _meet()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


def barrier(world: World) -> None:
    """Wait for every rank, for as long as it takes: rank 0 may be tokenising a corpus or fine-tuning."""
    any_rank(world, False)
