"""The softmax of a chunk of rows in the blocked path: exponentials by blocks of columns, and what makes probabilities of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels.linear_kd.head import LOG2E


class Softmax:
    """exp(z/τ) of a chunk's rows, each block of columns relative to its own row maxima."""

    def __init__(self, exponentials: Tensor, temperature: float, exact: bool) -> None:
        self.exponentials = exponentials  # [R, V]
        self.exponent = LOG2E / temperature
        self.exact, self.row_sums = exact, exact_sums if exact else sums
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, columns: slice, centred: Tensor, maximum: Tensor) -> Tensor:
        """Take a block of logits, given as its difference from its row maxima; return its exponentials."""
        block = torch.mul(centred, self.exponent, out=self.exponentials[:, columns]).exp2_()  # a quarter of exp's time
        self.blocks.append((maximum, self.row_sums(block)))
        return block

    def close(self) -> None:
        """Make each block's factor of the statistics: exponential · factor = probability. In float64: R × blocks numbers."""
        maxima, sums = zip(*self.blocks, strict=True)
        self.maxima, self.sums = torch.stack(maxima).double() * (self.exponent / LOG2E), torch.stack(sums).double()
        self.maximum = self.maxima.amax(0)
        factor = torch.exp(self.maxima - self.maximum)
        self.total = (factor * self.sums).sum(0)
        self.factor = factor / self.total

    def weighted(self, block: int, columns: slice, weight: Tensor) -> Tensor:
        """weight · softmax of one block [R, C], weight [R]."""
        factor = (weight * self.factor[block]).to(self.exponentials.dtype)
        return self.exponentials[:, columns] * factor[:, None]


def sums(block: Tensor) -> Tensor:
    """Σ over the columns of [R, C]."""
    return block.sum(1)


def exact_sums(block: Tensor) -> Tensor:
    """The same in float64, from sums of C/32 numbers in their own dtype, in twice the time.

    A float32 sum of 1,024 numbers has a rounding error of 1e-8, which a small divergence would show.
    """
    whole = block.shape[1] // 32 * 32
    lanes = block[:, :whole].unflatten(1, (-1, 32)).sum(1)
    return lanes.sum(1, dtype=torch.float64) + block[:, whole:].sum(1)
