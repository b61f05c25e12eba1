"""A forward without gradients as one CUDA graph: the host queues one launch instead of one for each kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastkd.models.encoder import Packed
    from fastkd.models.needs import Outputs

WARM_UP = 2  # forwards before the capture: compilation and the set-up of libraries cannot be captured


@dataclass(frozen=True)
class Inputs:
    """What a forward reads, in buffers that the graph's replays read too."""

    ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B+1] int32
    predicted: Tensor  # [M] int64
    max_seqlen: int

    @classmethod
    def like(cls, ids: Tensor, batch: Packed) -> Inputs:
        """Copies of the first batch."""
        return cls(
            ids.clone(), batch.position_ids.clone(), batch.cu_seqlens.clone(), batch.predicted.clone(), batch.max_seqlen
        )

    def fits(self, ids: Tensor, batch: Packed) -> bool:
        """Whether a batch has these shapes."""
        shapes = (ids.shape, batch.cu_seqlens.shape, batch.predicted.shape, batch.max_seqlen)
        return shapes == (self.ids.shape, self.cu_seqlens.shape, self.predicted.shape, self.max_seqlen)

    def fill(self, ids: Tensor, batch: Packed) -> None:
        """Copy a batch in, without waiting for the device."""
        self.ids.copy_(ids)
        self.position_ids.copy_(batch.position_ids)
        self.cu_seqlens.copy_(batch.cu_seqlens)
        self.predicted.copy_(batch.predicted)


class Captured:
    """A forward captured for the shapes of one batch. Each call overwrites the outputs of the one before.

    Capture and warm-up share a stream, so that libraries keep one workspace for both, outside the graph's memory.
    """

    def __init__(self, forward: Callable[[Tensor, Packed], Outputs], ids: Tensor, batch: Packed) -> None:
        self.inputs, self._graph = Inputs.like(ids, batch), torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(ids.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                forward(self.inputs.ids, self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        # Only this thread is held to what a capture allows: another one pins the memory of the next batches.
        with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
            self._outputs = forward(self.inputs.ids, self.inputs)

    def __call__(self, ids: Tensor, batch: Packed) -> Outputs:
        """The forward's outputs for a batch of the same shapes."""
        self.inputs.fill(ids, batch)
        self._graph.replay()
        return self._outputs
