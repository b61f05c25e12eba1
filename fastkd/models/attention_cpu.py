"""Attention on a CPU: bfloat16 sequences in padded groups of batched products, float32 ones one by one.

Shapes: Tq query rows, Tk key rows, H heads, d head width; a group holds b sequences padded to Sq queries and Sk
keys. Measured on two AVX512-BF16 cores, 32 sequences of 128, 12 heads of 32, forward and backward together:
bfloat16 SDPA 53 ms, bfloat16 products 7 ms; float32 SDPA 22 ms, float32 products 28 ms.

Layout of a group: [b·H, S, d], sequence by sequence and head by head, so that one batched product serves all its pairs of
(sequence, head). All groups are in one tensor, one after the other, [Σ b·H·S, d]. The packed tensor [T, H, d]
is read as rows of d too: row t·H + h is token t's head h. ``Side`` holds the index from each of the two to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# oneDNN builds and keeps a kernel of about a megabyte for every shape of a product: batches that all differ would pay
# for that in each step and fill the memory. So groups have few shapes: lengths and numbers of sequences are rounded up.
GROUP_STEP = 32  # of key lengths: one group for each multiple, and every sequence in the first that it fits
QUERY_STEP = 16  # of query lengths, which are shorter where only predicted rows ask
SEQUENCE_STEP = 4  # of a group's sequences
MASKED = -1e30  # score of a padded key: finite, so that a row of padding only is no NaN


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v within each sequence, [Tq, H, d] from [Tq, H, d] and twice [Tk, H, d]."""
    lengths_q, lengths_k = (tuple(cu.diff().tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    if q.dtype == torch.bfloat16:
        return _Grouped.apply(q, k, v, lengths_q, lengths_k)
    return _one_by_one(q, k, v, lengths_q, lengths_k)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> Tensor:
    """SDPA of each sequence: no padding, no copy of q, k and v."""
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    contexts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
        for qkv in sequences
        if qkv[0].shape[0]  # a batch ends in empty sequences
    ]
    return torch.cat(contexts)


@dataclass(frozen=True)
class Side:
    """Where the rows of packed queries, or of packed keys and values, are in the groups, and back."""

    sizes: tuple[tuple[int, int], ...]  # (b·H, padded length) of each group
    gather: Tensor  # [Σ b·H·S] the packed row t·H + h of each padded row; padding takes its sequence's first token
    padding: Tensor  # the padded rows that are padding
    scatter: Tensor  # [T·H] the padded row of each packed row

    def split(self, padded: Tensor) -> list[Tensor]:
        """Views [b·H, S, d] of the groups in their padded rows [Σ b·H·S, d]."""
        groups = padded.split([n * s for n, s in self.sizes])
        return [group.unflatten(0, size) for group, size in zip(groups, self.sizes, strict=True)]

    def pad(self, x: Tensor, *, zero: bool = False) -> list[Tensor]:
        """[T, H, d] → the groups; padding repeats a real row, or is 0."""
        rows, step = _rows(x)
        heads = x.shape[1]
        # Token t starts at row t·step, not at t·H, where x is a slice of a fused projection.
        at = self.gather if step == heads else self.gather + self.gather // heads * (step - heads)
        padded = rows.index_select(0, at)
        if zero:
            padded.index_fill_(0, self.padding, 0)
        return self.split(padded)

    def unpad(self, padded: Tensor, heads: int) -> Tensor:
        """The inverse: [T, H, d] from the groups' rows."""
        return padded.index_select(0, self.scatter).unflatten(0, (-1, heads))

    def new_rows(self, x: Tensor) -> Tensor:
        """Room for the groups' rows [Σ b·H·S, d], to be split and written."""
        return x.new_empty(len(self.gather), x.shape[-1])


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """[T, H, d] as rows of d without a copy, and the rows from one token to the next: 3·H in a fused projection."""
    T, H, d = x.shape
    if x.stride()[1:] != (d, 1) or x.stride(0) % d:
        x = x.contiguous()
    step = x.stride(0) // d
    return x.as_strided(((T - 1) * step + H, d), (d, 1)), step


@dataclass(frozen=True)
class Groups:
    """The groups of a batch's sequences."""

    queries: Side
    keys: Side
    biases: tuple[Tensor, ...]  # for each group [b·H, 1, Sk] bfloat16: 0 at keys, MASKED at padding


@lru_cache(maxsize=16)  # the layers of a forward, teacher's and student's, share their batch's groups
def group_sequences(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], heads: int) -> Groups:
    """Group the sequences of these lengths by key length; empty ones are left out."""
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths_k):
        if length:
            groups.setdefault(_up(length, GROUP_STEP), []).append(sequence)
    keys = _side(list(groups.values()), lengths_k, heads, GROUP_STEP)
    queries = _side(list(groups.values()), lengths_q, heads, QUERY_STEP)
    bias = torch.zeros(len(keys.gather), 1, dtype=torch.bfloat16).index_fill_(0, keys.padding, MASKED)
    return Groups(queries, keys, tuple(rows.transpose(1, 2) for rows in keys.split(bias)))


def _up(count: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-count // step) * step


def _side(groups: list[list[int]], lengths: tuple[int, ...], heads: int, length_step: int) -> Side:
    """The index of a batch whose sequences have these lengths; ``groups`` holds the numbers of each group's sequences."""
    starts, head = torch.tensor([0, *lengths]).cumsum(0), torch.arange(heads)[:, None]  # packed tokens; [H, 1]
    tokens = int(starts[-1])
    gathers, reals, sizes = [], [], []
    for group in groups:
        missing = _up(len(group), SEQUENCE_STEP) - len(group)  # sequences of padding only
        own = torch.tensor([lengths[i] for i in group] + [0] * missing)[:, None, None]
        place = torch.arange(_up(int(own.max()), length_step))
        real = place < own  # [b, 1, S]
        first = torch.cat([starts[group], starts.new_zeros(missing)])[:, None, None]
        # Padding repeats its sequence's first token; that of an empty sequence at the end would be one too far.
        token = (first + place * real).clamp_(max=tokens - 1)
        gathers.append((token * heads + head).flatten())  # [b, H, S]
        reals.append(real.expand(-1, heads, -1).flatten())
        sizes.append((len(own) * heads, len(place)))
    gather, real = torch.cat(gathers), torch.cat(reals)
    scatter = torch.empty(tokens * heads, dtype=torch.int64)
    # The inverse index: gather is one to one on real rows.
    scatter[gather[real]] = real.nonzero().flatten()
    return Side(tuple(sizes), gather, (~real).nonzero().flatten(), scatter)


class _Grouped(torch.autograd.Function):
    """Forward and backward as batched products over the (sequence, head) pairs of each group."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]
    ) -> Tensor:
        heads, alpha = q.shape[1], q.shape[-1] ** -0.5
        groups = group_sequences(lengths_q, lengths_k, heads)
        qs, ks, vs = groups.queries.pad(q), groups.keys.pad(k), groups.keys.pad(v)
        weights, context = [], groups.queries.new_rows(q)
        for q_g, k_g, v_g, bias, out in zip(qs, ks, vs, groups.biases, groups.queries.split(context), strict=True):
            weights.append(torch.baddbmm(bias, q_g, k_g.transpose(1, 2), alpha=alpha).softmax(-1))
            torch.bmm(weights[-1], v_g, out=out)
        ctx.groups = groups
        ctx.save_for_backward(*qs, *ks, *vs, *weights)
        return groups.queries.unpad(context, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups: Groups = ctx.groups
        n, heads, alpha = len(groups.biases), grad.shape[1], grad.shape[-1] ** -0.5
        qs, ks, vs, weights = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(4))
        dos = groups.queries.pad(grad, zero=True)
        grads = groups.queries.new_rows(grad), groups.keys.new_rows(grad), groups.keys.new_rows(grad)
        views = (side.split(rows) for side, rows in zip((groups.queries, groups.keys, groups.keys), grads, strict=True))
        for q, k, v, p, do, dq, dk, dv in zip(qs, ks, vs, weights, dos, *views, strict=True):
            torch.bmm(p.transpose(1, 2), do, out=dv)
            dp = torch.bmm(do, v.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.baddbmm(q, ds, k, beta=0, alpha=alpha, out=dq)
            torch.baddbmm(k, ds.transpose(1, 2), q, beta=0, alpha=alpha, out=dk)
        dq_rows, dk_rows, dv_rows = grads
        return (
            groups.queries.unpad(dq_rows, heads),
            groups.keys.unpad(dk_rows, heads),
            groups.keys.unpad(dv_rows, heads),
            None,
            None,
        )
