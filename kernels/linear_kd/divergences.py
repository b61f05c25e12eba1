"""The divergences in the blocked path: what a chunk keeps of the teacher's logits, its value, and its part of dz.

Each takes a chunk's logits block by block (``add``), relative to their block's row maxima, in which a float32 knows them best. KL
keeps the exponentials of the teacher's softmax q; the others keep d = z_s − z_t in their place, so that no more than a chunk of
[R, V] is held for any of them. The student's softmax p belongs to the chunk, which closes it first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels.linear_kd.head import Terms
from fastkd.kernels.linear_kd.softmax import Softmax


class KL:
    """Σ_v q (log q − log p)."""

    def __init__(self, p: Softmax, kept: Tensor, terms: Terms) -> None:
        self.p, self.temperature = p, terms.temperature
        self.q = Softmax(kept, terms.temperature, p.exact)
        self.cross: list[Tensor] = []

    def add(self, columns: slice, z_s: Tensor, m_s: Tensor, z_t: Tensor, m_t: Tensor) -> None:
        """Take a block of both models' centred logits [R, C], which may be overwritten, and their maxima [R]."""
        q = self.q.add(columns, z_t, m_t)
        self.cross.append(torch.linalg.vecdot(q, z_t.sub_(z_s)))

    def close(self) -> None:
        self.q.close()

    def rows(self) -> Tensor:
        """The divergence of each row [R], without τ², from differences of logits, of maxima and a ratio of totals.

        A log-sum-exp is ten times the gap between a good student's logits and its teacher's: its float32 rounding would show in KL.
        """
        offsets = (self.q.maxima - self.p.maxima) - (self.q.maximum - self.p.maximum)
        cross = self.q.factor * (torch.stack(self.cross).double() / self.temperature + self.q.sums * offsets)
        return cross.sum(0) - torch.log(self.q.total / self.p.total)

    def dz(self, block: int, columns: slice, weight: Tensor, own: Tensor | None) -> Tensor:
        """weight·(p − q) + own·p of a block [R, C]; the weights are [R]."""
        dz = self.p.weighted(block, columns, weight if own is None else weight + own)
        dz -= self.q.weighted(block, columns, weight)
        return dz


class ReverseKL:
    """Σ_v p (log p − log q). Of q only its sum is needed."""

    def __init__(self, p: Softmax, kept: Tensor, terms: Terms) -> None:
        self.p, self.temperature, self.kept = p, terms.temperature, kept
        self.q = Softmax(kept, terms.temperature, p.exact)  # its exponentials are summed, then overwritten by d
        self.cross: list[Tensor] = []

    def add(self, columns: slice, z_s: Tensor, m_s: Tensor, z_t: Tensor, m_t: Tensor) -> None:
        """As KL's."""
        self.q.add(columns, z_t, m_t)
        d = torch.sub(z_s, z_t, out=self.kept[:, columns])
        self.cross.append(torch.linalg.vecdot(self.p.exponentials[:, columns], d))

    def close(self) -> None:
        """Make of each block what d/τ lacks to the row's difference, and of that the mean under p [R]."""
        self.q.close()
        self.offsets = (self.p.maxima - self.q.maxima) - (self.p.maximum - self.q.maximum)
        cross = torch.stack(self.cross).double() / self.temperature + self.p.sums * self.offsets
        self.expected = (self.p.factor * cross).sum(0)

    def rows(self) -> Tensor:
        """The divergence of each row [R], without τ²."""
        return self.expected - torch.log(self.p.total / self.q.total)

    def dz(self, block: int, columns: slice, weight: Tensor, own: Tensor | None) -> Tensor:
        """p·[weight·(δ − E_p δ)/τ + own] of a block [R, C]."""
        offset = weight * (self.offsets[block] - self.expected)
        offset = offset if own is None else offset + own
        dz = self.kept[:, columns] * (weight / self.temperature).to(self.kept.dtype)[:, None]
        dz += offset.to(dz.dtype)[:, None]
        return dz.mul_(self.p.weighted(block, columns, torch.ones_like(weight)))


class MeanSquare:
    """Σ_v (δ − mean δ)², the parts of each block from the mean of its own."""

    def __init__(self, p: Softmax, kept: Tensor, terms: Terms) -> None:
        self.p, self.kept = p, kept
        self.blocks: list[tuple[Tensor, Tensor]] = []  # mean of δ, and Σ (δ − mean)², [R] each
        self.offsets: list[Tensor] = []
        self.sizes: list[int] = []

    def add(self, columns: slice, z_s: Tensor, m_s: Tensor, z_t: Tensor, m_t: Tensor) -> None:
        """As KL's."""
        d = torch.sub(z_s, z_t, out=self.kept[:, columns])
        mean = self.p.row_sums(d) / d.shape[1]
        apart = torch.sub(d, mean.to(d.dtype)[:, None], out=z_t)
        self.offsets.append(m_s.double() - m_t.double())
        self.blocks.append((mean + self.offsets[-1], torch.linalg.vecdot(apart, apart)))
        self.sizes.append(d.shape[1])

    def close(self) -> None:
        """Make the mean of δ of each row [R] from those of the blocks."""
        means, squares = zip(*self.blocks, strict=True)
        self.means, self.squares = torch.stack(means), torch.stack(squares).double()  # [blocks, R]
        self.size = self.means.new_tensor(self.sizes)[:, None]
        self.mean = (self.size * self.means).sum(0) / sum(self.sizes)

    def rows(self) -> Tensor:
        """The sum of each row [R], without 1/V."""
        return (self.squares + self.size * (self.means - self.mean).square()).sum(0)

    def dz(self, block: int, columns: slice, weight: Tensor, own: Tensor | None) -> Tensor:
        """weight·(δ − mean δ) + own·p of a block [R, C]."""
        dz = self.kept[:, columns] + (self.offsets[block] - self.mean).to(self.kept.dtype)[:, None]
        dz *= weight.to(dz.dtype)[:, None]
        return dz if own is None else dz.add_(self.p.weighted(block, columns, own))


Divergence = KL | ReverseKL | MeanSquare
_KINDS: dict[str, type[Divergence]] = {"kl": KL, "reverse_kl": ReverseKL, "mse": MeanSquare}


def of(terms: Terms, p: Softmax, kept: Tensor) -> Divergence:
    """The divergence that ``terms`` names, for a chunk with the student's softmax p and a buffer [R, V]."""
    return _KINDS[terms.divergence](p, kept, terms)
