"""Packed sequences on a CPU: which rows form a block, and the same rows regrouped by head.

The blocked paths of `relation_kl` and `score_mse` share this frame. Sequences of similar length are batched with
their heads into one block of bounded size, so a batch of short sequences costs a few large matrix products instead of
thousands of tiny ones. A group of unequal lengths is padded with rows of zeros: they score zero against every row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ENTRIES_PER_THREAD = 1 << 18  # of one float32 score tile: the three tiles of a block stay in a core's share of cache
MASKED = -1e30  # score of a padded key: finite, so that the difference of two of them is 0 and not NaN


@dataclass(frozen=True)
class Group:
    """Sequences of one block, padded to the longest: `rows[g, i]` is the packed row of token i of sequence g."""

    rows: Tensor  # [G, n] int64, 0 where padded
    valid: Tensor  # [G, n] bool
    padded: bool

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def heads(self, x: Tensor, num_heads: int, dtype: torch.dtype, *, feature: str | None = None) -> Tensor:
        """[T, D] → [G·A, n, D/A], padded rows zero.

        In a padded group, `feature="key"` appends a column that is 0 for a token and `MASKED` for padding, and
        `feature="query"` one of ones: their product masks padded keys inside the matrix product, at no extra pass.
        """
        (size, length), width = self.rows.shape, x.shape[1] // num_heads
        extra = int(self.padded and feature is not None)
        out = torch.empty(size, num_heads, length, width + extra, dtype=dtype, device=x.device)
        gathered = x.index_select(0, self.rows.flatten()).view(size, length, num_heads, width)
        if self.padded:
            gathered.mul_(self.valid[:, :, None, None])
        out[..., :width].copy_(gathered.transpose(1, 2))
        if extra:
            mask = torch.where(self.valid, 0.0, MASKED)[:, None] if feature == "key" else 1.0
            out[..., width] = mask
        return out.flatten(0, 1)

    def scatter(self, out: Tensor, heads: Tensor) -> None:
        """Write [G·A, n, D/A] back to the rows of `out` [T, D], in its dtype."""
        size, length = self.rows.shape
        tokens = heads.unflatten(0, (size, -1)).transpose(1, 2).reshape(size * length, -1).to(out.dtype)
        rows = self.rows.flatten()
        if self.padded:
            keep = self.valid.flatten()
            rows, tokens = rows[keep], tokens[keep]
        out.index_copy_(0, rows, tokens)


def groups(cu_seqlens: Tensor, num_heads: int) -> Iterator[Group]:
    """Every non-empty sequence once, longest first; a group's score tiles hold `ENTRIES_PER_THREAD` or one sequence."""
    starts = cu_seqlens.tolist()
    spans = [(b - a, a) for a, b in itertools.pairwise(starts) if b > a]
    spans.sort(key=lambda span: (-span[0], span[1]))
    device, budget = cu_seqlens.device, _entries()
    while spans:
        longest = spans[0][0]
        room = max(1, budget // (num_heads * longest * longest))
        shortest = longest - max(4, longest // 8)
        size = next((i for i, (n, _) in enumerate(spans[:room]) if n < shortest), min(room, len(spans)))
        lengths, first = (torch.tensor(column, device=device) for column in zip(*spans[:size], strict=True))
        spans = spans[size:]
        position = torch.arange(longest, device=device)
        valid = position < lengths[:, None]
        rows = torch.where(valid, first[:, None] + position, 0)
        yield Group(rows, valid, padded=int(lengths[-1]) != longest)


def blocks(pairs: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cut the scores [pairs, length, length] of a group into (pairs, query rows) with all key columns."""
    budget = _entries()
    rows = length if pairs * length * length <= budget else min(length, max(64, budget // (4 * length)))
    step = max(1, min(pairs, budget // (rows * length)))
    for p in range(0, pairs, step):
        for i in range(0, length, rows):
            yield slice(p, min(p + step, pairs)), slice(i, min(i + rows, length))


@contextmanager
def exact_products(*inputs: Tensor) -> Iterator[None]:
    """Multiply float32 copies of bfloat16 inputs on the CPU's bfloat16 units, accumulating in float32.

    The scores lose nothing, since the operands hold bfloat16 values, and need not be rounded to a bfloat16 output.
    With any other input, products stay in full precision. Autocast is off inside: it would round the scores.
    """
    device = inputs[0].device.type
    half = device == "cpu" and all(x.dtype == torch.bfloat16 for x in inputs)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        if half:
            matmul.fp32_precision = "bf16"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if half:
            matmul.fp32_precision = before


class Buffers:
    """Score tiles that every block of a call reuses."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = [torch.empty(0, dtype=dtype, device=device) for _ in range(3)]

    def take(self, index: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self.flat[index].numel() < size:
            self.flat[index] = self.flat[index].new_empty(size)
        return self.flat[index][:size].view(shape)

    def product(self, index: int, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        """alpha · a bᵀ."""
        out = self.take(index, (*a.shape[:2], b.shape[1]))
        return torch.baddbmm(out, a, b.transpose(1, 2), beta=0, alpha=alpha, out=out)


def _entries() -> int:
    return ENTRIES_PER_THREAD * torch.get_num_threads()
