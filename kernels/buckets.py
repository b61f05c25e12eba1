"""Packed sequences on a CPU and in definitions: gathered into padded buckets of similar length.

Rows of a [T, D] tensor are tokens, sequences follow each other, and ``cu_seqlens`` says where each begins; a head is a slice
of D/A columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -1e30  # score of a padded key: finite, so that the difference of two of them is 0 and not NaN
# Entries of a score tile. With fewer, a block's calls cost more than its arithmetic; with more, it no longer fits the cache.
_ENTRIES_PER_THREAD, _MAX_ENTRIES = 1 << 19, 1 << 23
# Lengths of buckets are multiples of it and their sizes powers of two: oneDNN builds and keeps a kernel of about a megabyte for
# every shape of a bfloat16 product, and a stream of new shapes would pay for that in each step.
_LENGTH_STEP = 16


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def padded_rows(cu_seqlens: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Row numbers [B, bound] of every sequence's tokens (0 where padded), and which are tokens."""
    position = torch.arange(bound, device=cu_seqlens.device)
    valid = position < cu_seqlens.diff()[:, None]
    return torch.where(valid, cu_seqlens[:-1, None] + position, 0), valid


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded to one: ``rows[b, i]`` is the packed row of token i of sequence b.

    Padded rows are zeros: they score zero against every row.
    """

    rows: Tensor  # [B, n] int64, 0 where padded
    valid: Tensor  # [B, n] bool
    padded: bool

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def heads(self, x: Tensor, num_heads: int, *, feature: str | None = None) -> Tensor:
        """[T, D] → [B·A, n, D/A] in float32 or float64, padded rows zero.

        In a padded bucket, ``feature="key"`` appends a column that is 0 for a token and ``MASKED`` for padding, and
        ``feature="query"`` one of ones: their product masks padded keys inside the matrix product, at no extra pass.
        """
        (size, length), width = self.rows.shape, x.shape[1] // num_heads
        extra = int(self.padded and feature is not None)
        out = torch.empty(size, num_heads, length, width + extra, dtype=accumulator(x.dtype), device=x.device)
        gathered = x.index_select(0, self.rows.flatten()).view(size, length, num_heads, width)
        if self.padded:
            gathered.mul_(self.valid[:, :, None, None])
        out[..., :width].copy_(gathered.transpose(1, 2))
        if extra:
            out[..., width] = torch.where(self.valid, 0.0, MASKED)[:, None] if feature == "key" else 1.0
        return out.flatten(0, 1)

    def scatter(self, out: Tensor, heads: Tensor) -> None:
        """Write [B·A, n, D/A] back to the rows of ``out`` [T, D], zero so far, in its dtype."""
        size, length = self.rows.shape
        tokens = heads.unflatten(0, (size, -1)).transpose(1, 2).reshape(size * length, -1).to(out.dtype)
        if self.padded:  # gradients of padding are zeros: added to row 0 they change nothing, and need no selection
            out.index_add_(0, self.rows.flatten(), tokens)
        else:
            out.index_copy_(0, self.rows.flatten(), tokens)


def by_length(cu_seqlens: Tensor, num_heads: int, rows: int, max_seqlen: int) -> Iterator[Bucket]:
    """Every sequence that is not empty once, longest first.

    Sequences of similar length share a bucket as long as its score tile fits a block, so that a batch of short ones
    costs a few large matrix products of few shapes instead of thousands of tiny ones of many. A longer sequence is a
    bucket of its own.
    Raises ValueError where ``cu_seqlens`` does not cut ``rows`` rows into sequences of at most ``max_seqlen``.
    """
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != rows or starts != sorted(starts):
        raise ValueError(f"cu_seqlens runs from {starts[0]} to {starts[-1]}: let it rise from 0 to the {rows} rows")
    spans = [(b - a, a) for a, b in itertools.pairwise(starts) if b > a]
    spans.sort(key=lambda span: (-span[0], span[1]))
    if spans and spans[0][0] > max_seqlen:
        raise ValueError(
            f"a sequence has {spans[0][0]} tokens, max_seqlen is {max_seqlen}: give a bound of every length"
        )
    device, budget = cu_seqlens.device, _entries()
    for length, similar in itertools.groupby(spans, lambda span: -(-span[0] // _LENGTH_STEP) * _LENGTH_STEP):
        members, position = list(similar), torch.arange(length, device=device)
        room = max(1, budget // (num_heads * length * length))
        while members:
            size = 1 << min(room, len(members)).bit_length() - 1  # the largest power of two that fits
            lengths, first = (torch.tensor(column, device=device) for column in zip(*members[:size], strict=True))
            members = members[size:]
            valid = position < lengths[:, None]
            yield Bucket(torch.where(valid, first[:, None] + position, 0), valid, padded=int(lengths[-1]) != length)


def blocks(pairs: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cut the scores [pairs, length, length] of a bucket into (pairs, query rows) with all key columns."""
    budget = _entries()
    # All rows if everything fits; else the rows of which four pairs fill the budget, and at least 64.
    rows = length if pairs * length * length <= budget else min(length, max(64, budget // (4 * length)))
    step = max(1, min(pairs, budget // (rows * length)))
    for pair in range(0, pairs, step):
        for row in range(0, length, rows):
            yield slice(pair, min(pair + step, pairs)), slice(row, min(row + rows, length))


class Buffers:
    """Score tiles that every block of a call reuses."""

    def __init__(self, like: Tensor) -> None:
        self._flat = [torch.empty(0, dtype=accumulator(like.dtype), device=like.device) for _ in range(3)]

    def take(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._flat[index].numel() < size:
            self._flat[index] = self._flat[index].new_empty(size)
        return self._flat[index][:size].view(shape)

    def product(self, index: int, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        """alpha · a bᵀ."""
        out = self.take(index, (*a.shape[:2], b.shape[1]))
        return torch.baddbmm(out, a, b.transpose(1, 2), beta=0, alpha=alpha, out=out)


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


def _entries() -> int:
    return min(_ENTRIES_PER_THREAD * torch.get_num_threads(), _MAX_ENTRIES)


def padded(cu_seqlens: Tensor, bound: int) -> Bucket:
    """All sequences as one bucket, padded to ``bound``, without reading ``cu_seqlens`` on the host."""
    return Bucket(*padded_rows(cu_seqlens, bound), padded=True)
