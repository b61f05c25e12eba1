"""The exchange of gradients between ranks, which a rank that runs out of memory can still end.

DDP sends gradients in buckets while the backward runs. A rank whose backward breaks off sends the buckets that are left
without a gradient. So no other rank waits for it in vain; then all vote, and where memory ran out on any, none takes the step.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Shape = tuple[int, torch.dtype, torch.device]  # elements, and where they are
SETTLED = 2  # steps after which DDP's buckets stay as they are: after the first one it orders them anew


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out on a rank, and every rank knows it: none has changed a parameter, and all can take a smaller micro-batch."""


@dataclass
class Buckets:
    """The buckets that this rank has sent.

    Attributes:
        steps: whole ones so far.
        whole: each bucket of the last whole step, in the order in which DDP sends them.
        sent: the buckets of the step that is on its way, and the futures of their exchange.
    """

    steps: int = 0
    whole: list[Shape] = field(default_factory=list)
    sent: list[tuple[Shape, Any]] = field(default_factory=list)

    def step(self) -> None:
        """A step begins."""
        self.sent = []

    def end(self) -> None:
        """A step has been exchanged."""
        self.steps += 1
        self.whole, self.sent = [shape for shape, _ in self.sent], []

    def end_without_memory(self) -> None:
        """Send what is left of a step, without a gradient, and wait for what was sent.

        Raises:
            OSError: in the first steps, where it is not known yet what is left.
        """
        if self.steps < SETTLED:
            raise OSError(
                "out of memory in one of the first steps, though a micro-batch fitted before: free the device"
            )
        for elements, dtype, device in self.whole[len(self.sent) :]:
            dist.all_reduce(torch.zeros(elements, dtype=dtype, device=device))
        for _, done in self.sent:
            done.wait()
        self.sent = []


def parallel(objective: nn.Module, buckets: Buckets) -> DistributedDataParallel:
    """The model whose backward exchanges gradients, their mean over ranks; what it sends is counted in ``buckets``."""
    model = DistributedDataParallel(objective, gradient_as_bucket_view=True, static_graph=False)
    # The hook holds no reference to the model: DDP must end with its last reference, or its hooks would stay.
    model.register_comm_hook(buckets, _mean)
    return model


def _mean(buckets: Buckets, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    # As DDP does without a hook: times 1/N, whose bits are not those of a division by N where N is no power of two.
    values = bucket.buffer().mul_(1 / dist.get_world_size())
    done = dist.all_reduce(values, async_op=True).get_future()
    buckets.sent.append(((len(values), values.dtype, values.device), done))
    return done.then(lambda future: future.value()[0])
